//! A PS/2 keyboard on which nobody types: it answers its commands, as drivers that probe expect.
//! There are no locks here; the controller in `i8042.rs` has one.

use std::collections::VecDeque;

use crate::bytes::{Reader, bad};
use crate::error::Result;

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const ECHO: u8 = 0xee;
const SELF_TEST_PASSED: u8 = 0xaa;
/// The id of an MF2 keyboard.
const ID: [u8; 2] = [0xab, 0x83];
/// A keyboard has room for this many bytes to send.
const BUFFER: usize = 16;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keyboard {
    /// The command that takes the next byte; 0 if there is none.
    waiting: u8,
    scan_code_set: u8,
    /// The byte that was sent last.
    last: u8,
    /// What it has to send.
    queue: VecDeque<u8>,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { waiting: 0, scan_code_set: 2, last: 0, queue: VecDeque::new() }
    }
}

impl Keyboard {
    /// A byte from the controller: a command, or the byte that one waits for. What the keyboard had
    /// to send before is dropped, as a keyboard does when it receives a command.
    pub(super) fn receive(&mut self, byte: u8) {
        self.queue.clear();
        match (std::mem::take(&mut self.waiting), byte) {
            // Bytes of these values are commands even when another one waits.
            (_, 0xee) => self.send(&[ECHO]),
            (_, 0xfe) => self.send(&[self.last]),
            (_, 0xff) => {
                *self = Self::default();
                self.send(&[ACKNOWLEDGE, SELF_TEST_PASSED]);
            }
            (0xf0, 0) => self.send(&[ACKNOWLEDGE, self.scan_code_set]),
            (0xf0, 1..=3) => {
                self.scan_code_set = byte;
                self.send(&[ACKNOWLEDGE]);
            }
            (0xed, 0..=0x7f) | (0xf3, 0..=0x7f) => self.send(&[ACKNOWLEDGE]),
            (_, 0xed | 0xf0 | 0xf3) => {
                self.waiting = byte;
                self.send(&[ACKNOWLEDGE]);
            }
            (_, 0xf2) => self.send(&[ACKNOWLEDGE, ID[0], ID[1]]),
            (_, 0xf6) => {
                self.scan_code_set = 2;
                self.send(&[ACKNOWLEDGE]);
            }
            (_, 0xf4 | 0xf5 | 0xf7..=0xfa) => self.send(&[ACKNOWLEDGE]),
            _ => self.send(&[RESEND]),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.queue.extend(bytes);
    }

    /// The next byte that it sends.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last = byte;
        Some(byte)
    }

    pub(super) fn save(&self, bytes: &mut Vec<u8>) {
        bytes.extend([self.waiting, self.scan_code_set, self.last]);
        bytes.extend(u8::try_from(self.queue.len()));
        bytes.extend(&self.queue);
    }

    pub(super) fn from_bytes(mut reader: Reader<'_>) -> Result<Self> {
        let [waiting, scan_code_set, last, length] = reader.take()?;
        let queue: VecDeque<u8> = reader.bytes(usize::from(length))?.iter().copied().collect();
        reader.end()?;
        if queue.len() > BUFFER || !(1..=3).contains(&scan_code_set) {
            return Err(bad("i8042", "a keyboard is never in this state"));
        }
        Ok(Self { waiting, scan_code_set, last, queue })
    }
}

/// What the controller makes of a byte from the keyboard when it translates scan codes of the
/// second set into the first. Answers keep their values, except for those that are scan codes too.
pub(super) fn translated(byte: u8) -> u8 {
    match byte {
        0x01 => 0x43,
        0x02 | 0x83 => 0x41,
        0x03 => 0x3f,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What it sends after these bytes.
    fn answers(keyboard: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        let mut all = Vec::new();
        for byte in bytes {
            keyboard.receive(*byte);
            all.extend(std::iter::from_fn(|| keyboard.take()));
        }
        all
    }

    #[test]
    fn the_commands_of_a_driver_are_answered() {
        let keyboard = &mut Keyboard::default();
        for (bytes, expected) in [
            (&[0xff][..], &[0xfa, 0xaa][..]),
            (&[0xf2], &[0xfa, 0xab, 0x83]),
            (&[0xed, 7], &[0xfa, 0xfa]),
            (&[0xf3, 0x20], &[0xfa, 0xfa]),
            (&[0xf0, 1, 0xf0, 0], &[0xfa, 0xfa, 0xfa, 0xfa, 1]),
            (&[0xf6, 0xf0, 0], &[0xfa, 0xfa, 0xfa, 2]),
            (&[0xf4], &[0xfa]),
            (&[0xfe], &[0xfa]),
            (&[0xee], &[0xee]),
            (&[0xed, 0xf4], &[0xfa, 0xfa]),
            (&[0x12], &[0xfe]),
        ] {
            assert_eq!(answers(keyboard, bytes), expected, "{bytes:x?}");
        }
    }

    proptest! {
        #[test]
        fn every_byte_is_answered_and_a_state_comes_back(
            bytes in prop::collection::vec(any::<u8>(), 1..20), read in any::<bool>()
        ) {
            let mut keyboard = Keyboard::default();
            for byte in bytes {
                keyboard.receive(byte);
                prop_assert!((1..=3).contains(&keyboard.queue.len()));
                if read { keyboard.take(); }
            }
            let mut saved = Vec::new();
            keyboard.save(&mut saved);
            prop_assert_eq!(Keyboard::from_bytes(Reader::new("i8042", &saved)).unwrap(), keyboard);
        }
    }
}
