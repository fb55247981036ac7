//! Counts of the instructions executed by fix-ups. Shared by the vCPUs of a machine; usable on any
//! thread.

use std::collections::BTreeMap;

use iced_x86::Mnemonic;

use super::{bits, sse, system, x87, xsave};
use crate::sync::{Mutex, rank};

/// Counts of the executed instructions, by mnemonic. Shared by the vCPUs of a machine.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<&'static str, u64>, rank::FixupCounts>);

impl Counts {
    pub(crate) fn add(&self, mnemonic: Mnemonic) {
        *self.0.lock().entry(name(mnemonic)).or_default() += 1;
    }

    /// Reset all counts.
    pub(crate) fn clear(&self) {
        self.0.lock().clear();
    }

    /// The counts so far.
    #[must_use]
    pub fn all(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().clone()
    }
}

/// The name of an instruction that has a fix-up, as in the manual.
fn name(mnemonic: Mnemonic) -> &'static str {
    match mnemonic {
        Mnemonic::Int => "int",
        Mnemonic::Int1 => "int1",
        Mnemonic::Int3 => "int3",
        Mnemonic::Into => "into",
        other => [bits::name, sse::name, x87::name, xsave::name, system::name]
            .iter()
            .find_map(|name| name(other))
            .unwrap_or("other"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_by_name() {
        let counts = Counts::default();
        for mnemonic in
            [Mnemonic::Int3, Mnemonic::Int3, Mnemonic::Wait, Mnemonic::Popcnt, Mnemonic::Verw]
        {
            counts.add(mnemonic);
        }
        let all = counts.all();
        assert_eq!(all, BTreeMap::from([("int3", 2), ("fwait", 1), ("popcnt", 1), ("verw", 1)]));
    }
}
