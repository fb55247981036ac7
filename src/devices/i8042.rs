//! The i8042 keyboard controller, as much of it as resets the machine (`reboot=k`).

use super::{Device, Flow};
use crate::exit_handler::{Exit, ExitReason};

const COMMAND: u64 = 4;
const RESET: u8 = 0xfe;

/// Answers at ports 0x60 to 0x64. Its status is always: nothing to read, ready for a command.
#[derive(Debug)]
pub struct I8042;

impl Device for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0);
        Flow::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Flow {
        match (offset, data) {
            (COMMAND, [RESET, ..]) => Flow::End(Exit::new(ExitReason::Reset)),
            _ => Flow::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        assert_eq!(I8042.write(4, &[0xfe]), Flow::End(Exit::new(ExitReason::Reset)));
        assert_eq!(I8042.write(0, &[0xfe]), Flow::Continue);
        assert_eq!(I8042.write(4, &[0xd1]), Flow::Continue);
    }
}
