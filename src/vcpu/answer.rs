//! How an exit was answered. Data only; `report.rs` passes it to hooks.

use std::sync::Arc;

use super::exit::Data;
use crate::devices::Device;

/// What answered an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnsweredBy {
    /// A device on a bus.
    Device,
    /// A hook.
    Hook,
    /// Memory that was added at the address after the exit.
    Memory,
    /// A hook has the guest execute the instruction again.
    Retry,
    /// No device and no hook.
    Nothing,
}

impl AnsweredBy {
    /// Its name, as Python's `AnsweredBy` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Hook => "hook",
            Self::Memory => "memory",
            Self::Retry => "retry",
            Self::Nothing => "nothing",
        }
    }
}

/// How an exit was answered.
#[derive(Debug)]
pub struct Answer<'a> {
    /// What answered it.
    pub by: AnsweredBy,
    /// The bytes that the guest reads or has written; `None` for other exits, and for a read that
    /// is executed again or faults.
    pub data: Option<Data>,
    /// The name of the device that answered.
    pub device: Option<&'a str>,
    /// Whether the run ends with this exit.
    pub ends_run: bool,
}

/// What is noted while an exit is answered that has hooks for its answer.
#[derive(Debug, Default)]
pub(super) struct Noted {
    /// The device that was called.
    pub(super) device: Option<Arc<dyn Device>>,
    /// All elements of a coalesced write.
    pub(super) written: Option<Data>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_its_name() {
        use AnsweredBy::{Device, Hook, Memory, Nothing, Retry};
        let names = [Device, Hook, Memory, Retry, Nothing].map(AnsweredBy::name);
        assert_eq!(names, ["device", "hook", "memory", "retry", "nothing"]);
    }
}
