//! The pvpanic port, as of QEMU: a guest writes why it cannot continue, and the run ends. A guest
//! whose panic leaves it running, because it loads a crash kernel, continues.

use super::Device;
use crate::exit_handler::{Exit, ExitReason, Outcome};

/// The guest has panicked.
const PANICKED: u8 = 1 << 0;
/// The guest has panicked and continues with its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;
/// The guest asks to be powered off.
const SHUTDOWN: u8 = 1 << 2;

/// The port.
#[derive(Debug)]
pub struct Pvpanic;

impl Device for Pvpanic {
    fn name(&self) -> &str {
        "pvpanic"
    }

    /// The events that it knows.
    fn read(&self, _offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(PANICKED | CRASH_LOADED | SHUTDOWN);
        Outcome::Continue
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Outcome {
        let end = |reason| Outcome::End(Box::new(Exit::new(reason)));
        match data {
            [events, ..] if events & PANICKED != 0 => end(ExitReason::Panic),
            [events, ..] if events & SHUTDOWN != 0 => end(ExitReason::Poweroff),
            _ => Outcome::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_and_a_shutdown_end_the_run_and_a_crash_kernel_does_not() {
        let end = |reason| Outcome::End(Box::new(Exit::new(reason)));
        for (events, outcome) in [
            (PANICKED, end(ExitReason::Panic)),
            (0xff, end(ExitReason::Panic)),
            (SHUTDOWN, end(ExitReason::Poweroff)),
            (CRASH_LOADED | SHUTDOWN, end(ExitReason::Poweroff)),
            (CRASH_LOADED, Outcome::Continue),
            (0xf8, Outcome::Continue),
            (0, Outcome::Continue),
        ] {
            assert_eq!(Pvpanic.write(0, &[events]), outcome, "{events:#x}");
        }
        let mut data = [0xff];
        assert_eq!(Pvpanic.read(0, &mut data), Outcome::Continue);
        assert_eq!(data, [7]);
    }
}
