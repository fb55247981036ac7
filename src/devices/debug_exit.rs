//! The exit port, as QEMU's isa-debug-exit: a write ends the run with the value as its code.

use super::Device;
use crate::exit_handler::{Exit, ExitReason, Outcome};

/// A port of four bytes.
#[derive(Debug)]
pub struct DebugExit;

impl Device for DebugExit {
    fn name(&self) -> &str {
        "exit port"
    }

    fn read(&self, _offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0);
        Outcome::Continue
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Outcome {
        let code = data.iter().rev().fold(0, |code, byte| code << 8 | u64::from(*byte));
        Outcome::End(Box::new(Exit::with_code(ExitReason::Code, code)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_written_is_the_code() {
        let exit = Exit::with_code(ExitReason::Code, 0x0403_0201);
        assert_eq!(DebugExit.write(0, &[1, 2, 3, 4]), Outcome::End(Box::new(exit)));
    }
}
