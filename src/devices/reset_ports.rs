//! The registers of a PC that reset it: the reset control register at port 0xcf9, and system
//! control port A at 0x92. Each resets the machine when its reset bit becomes one.

use super::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitReason, Outcome};
use crate::sync::{Mutex, rank};

/// A register of one byte with a reset bit.
#[derive(Debug)]
pub struct ResetRegister {
    name: &'static str,
    reset: u8,
    /// The bits that keep what is written.
    kept: u8,
    value: Mutex<u8, rank::ResetRegister>,
}

impl ResetRegister {
    /// The reset control register. Bit 1 chooses a hard reset, bit 2 starts it, bit 3 has the power
    /// switched off and on.
    #[must_use]
    pub fn reset_control() -> Self {
        Self::new("reset control", 1 << 2, 0b1110, 0)
    }

    /// System control port A. Bit 0 is the fast reset; bit 1 is the A20 gate, which is open.
    #[must_use]
    pub fn system_control() -> Self {
        Self::new("system control", 1 << 0, 0b11, 0b10)
    }

    fn new(name: &'static str, reset: u8, kept: u8, value: u8) -> Self {
        Self { name, reset, kept, value: Mutex::new(value) }
    }
}

impl Device for ResetRegister {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&self, _offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(*self.value.lock());
        Outcome::Continue
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Outcome {
        let [written, ..] = data else { return Outcome::Continue };
        // The bit is zero whenever the guest runs: a reset clears it.
        if written & self.reset != 0 {
            return Outcome::End(Box::new(Exit::new(ExitReason::Reset)));
        }
        *self.value.lock() = written & self.kept;
        Outcome::Continue
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(vec![*self.value.lock()])
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        match *state {
            [value] if value & !self.kept | value & self.reset == 0 => *self.value.lock() = value,
            _ => {
                let detail = format!("{state:?} is not the byte of this register");
                return Err(Error::new(ErrorKind::Snapshot, self.name, detail));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(register: &ResetRegister) -> u8 {
        let mut data = [0xff];
        register.read(0, &mut data);
        data[0]
    }

    #[test]
    fn the_reset_bit_resets_and_the_others_are_kept() {
        let reset = Outcome::End(Box::new(Exit::new(ExitReason::Reset)));
        let control = ResetRegister::reset_control();
        assert_eq!(value(&control), 0);
        assert_eq!(control.write(0, &[0xfb]), Outcome::Continue);
        assert_eq!(value(&control), 0b1010);
        for written in [4, 6, 0xe, 0xff] {
            assert_eq!(control.write(0, &[written]), reset, "{written:#x}");
        }
        assert_eq!(value(&control), 0b1010);
        let system = ResetRegister::system_control();
        assert_eq!(value(&system), 2);
        assert_eq!(system.write(0, &[0xfc]), Outcome::Continue);
        assert_eq!(value(&system), 0);
        assert_eq!(system.write(0, &[3]), reset);
    }

    #[test]
    fn a_state_comes_back_and_any_other_bytes_are_refused() {
        let (control, other) = (ResetRegister::reset_control(), ResetRegister::reset_control());
        control.write(0, &[2]);
        other.restore(&control.save().unwrap()).unwrap();
        assert_eq!(value(&other), 2);
        for wrong in [&[][..], &[2, 0], &[4], &[1]] {
            assert!(other.restore(wrong).is_err());
        }
    }
}
