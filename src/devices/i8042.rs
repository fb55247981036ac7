//! The i8042 keyboard controller without a keyboard or a second port. It answers its own commands,
//! so that drivers do not time out, and can reset the machine. It raises no interrupts.

use super::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitReason, Outcome};
use crate::sync::{Mutex, rank};

/// Ports, as offsets from the data port.
const DATA: u64 = 0;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Bits of the controller command byte, which is the first byte of its RAM.
const SYSTEM: u8 = 1 << 2;
const FIRST_PORT_OFF: u8 = 1 << 4;
const SECOND_PORT_OFF: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

/// Bits of the output port.
const NOT_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;
const OUTPUT_FULL: u8 = 1 << 4;

const SELF_TEST_PASSED: u8 = 0x55;
const PORT_WORKS: u8 = 0;
/// The clock line of the second port is stuck low: no device is attached.
const NO_PORT: u8 = 1;
/// The keyboard is not locked.
const INPUT_PORT: u8 = 1 << 7;

const RAM: usize = 32;
/// The RAM, the output port, the command that waits for its byte, the last written port, the output
/// buffer, and whether it is full.
const STATE_BYTES: usize = RAM + 5;

/// Answers at ports 0x60 to 0x64.
#[derive(Debug, Default)]
pub struct I8042(Mutex<State, rank::KeyboardController>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    ram: [u8; RAM],
    output_port: u8,
    /// The command that takes the next write to the data port as its byte; 0 if there is none.
    waiting: u8,
    was_command: bool,
    output: u8,
    is_full: bool,
}

impl Default for State {
    /// The state after the firmware.
    fn default() -> Self {
        let mut ram = [0; RAM];
        let [command_byte, ..] = &mut ram;
        *command_byte = SYSTEM | SECOND_PORT_OFF | TRANSLATE;
        let output_port = 0xcc | A20 | NOT_RESET;
        Self { ram, output_port, waiting: 0, was_command: false, output: 0, is_full: false }
    }
}

impl State {
    fn status(&self) -> u8 {
        let [command_byte, ..] = self.ram;
        let flag = |is_set, bit| if is_set { bit } else { 0 };
        STATUS_UNLOCKED
            | flag(self.is_full, STATUS_OUTPUT_FULL)
            | flag(command_byte & SYSTEM != 0, STATUS_SYSTEM)
            | flag(self.was_command, STATUS_COMMAND)
    }

    fn answer(&mut self, value: u8) {
        (self.output, self.is_full) = (value, true);
    }

    fn cell(&mut self, command: u8) -> &mut u8 {
        let [first, rest @ ..] = &mut self.ram;
        usize::from(command & 0x1f).checked_sub(1).and_then(|at| rest.get_mut(at)).unwrap_or(first)
    }

    /// A write to the command port.
    fn command(&mut self, command: u8) -> Outcome {
        (self.was_command, self.waiting) = (true, 0);
        match command {
            0x20..=0x3f => {
                let value = *self.cell(command);
                self.answer(value);
            }
            0x60..=0x7f | 0xd1..=0xd4 => self.waiting = command,
            0xa9 => self.answer(NO_PORT),
            0xaa => {
                *self.cell(0) |= SYSTEM;
                self.answer(SELF_TEST_PASSED);
            }
            0xab => self.answer(PORT_WORKS),
            0xad => *self.cell(0) |= FIRST_PORT_OFF,
            0xae => *self.cell(0) &= !FIRST_PORT_OFF,
            0xc0 => self.answer(INPUT_PORT),
            0xd0 => {
                let full = if self.is_full { OUTPUT_FULL } else { 0 };
                self.answer(self.output_port & !OUTPUT_FULL | full);
            }
            0xdd => self.output_port &= !A20,
            0xdf => self.output_port |= A20,
            // Pulses the lines of the output port whose bits are zero.
            0xf0..=0xff if command & NOT_RESET == 0 => return reset(),
            _ => {}
        }
        Outcome::Continue
    }

    /// A write to the data port: the byte that a command waits for, or one for the keyboard, which
    /// does not exist.
    fn data(&mut self, value: u8) -> Outcome {
        self.was_command = false;
        match std::mem::take(&mut self.waiting) {
            0x60 => *self.cell(0) = value | SECOND_PORT_OFF,
            command @ 0x61..=0x7f => *self.cell(command) = value,
            0xd1 if value & NOT_RESET == 0 => return reset(),
            0xd1 => self.output_port = value,
            // As if the keyboard or the second port had sent it.
            0xd2 | 0xd3 => self.answer(value),
            _ => {}
        }
        Outcome::Continue
    }

    fn to_bytes(self) -> Vec<u8> {
        let flags = [self.was_command, self.is_full].map(u8::from);
        [&self.ram[..], &[self.output_port, self.waiting, self.output], &flags].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (ram, rest) = bytes.split_first_chunk()?;
        let [output_port, waiting, output, was_command @ 0..=1, is_full @ 0..=1] = *rest else {
            return None;
        };
        let (was_command, is_full) = (was_command == 1, is_full == 1);
        Some(Self { ram: *ram, output_port, waiting, was_command, output, is_full })
    }
}

fn reset() -> Outcome {
    Outcome::End(Box::new(Exit::new(ExitReason::Reset)))
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0);
        let mut state = self.0.lock();
        if let Some(first) = data.first_mut() {
            *first = match offset {
                // An empty buffer returns its last byte.
                DATA => {
                    state.is_full = false;
                    state.output
                }
                COMMAND => state.status(),
                _ => 0,
            };
        }
        Outcome::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match (offset, data) {
            (DATA, [value, ..]) => self.0.lock().data(*value),
            (COMMAND, [command, ..]) => self.0.lock().command(*command),
            _ => Outcome::Continue,
        }
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.0.lock().to_bytes())
    }

    /// Snapshots of older versions have no state for this device.
    fn restore(&self, state: &[u8]) -> Result<()> {
        *self.0.lock() = match state {
            [] => State::default(),
            _ => State::from_bytes(state).ok_or_else(|| {
                let detail =
                    format!("these {} bytes are not a state, which has {STATE_BYTES}", state.len());
                Error::new(ErrorKind::Snapshot, "i8042", detail)
            })?,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(controller: &I8042) -> u8 {
        let mut data = [0];
        controller.read(COMMAND, &mut data);
        data[0]
    }

    /// The answer of a command, if there is one.
    fn asked(controller: &I8042, command: u8) -> Option<u8> {
        assert_eq!(controller.write(COMMAND, &[command]), Outcome::Continue);
        let is_full = status(controller) & STATUS_OUTPUT_FULL != 0;
        let mut data = [0];
        is_full.then(|| controller.read(DATA, &mut data));
        assert_eq!(status(controller) & STATUS_OUTPUT_FULL, 0, "read, and gone");
        is_full.then_some(data[0])
    }

    fn with_byte(controller: &I8042, command: u8, value: u8) -> Outcome {
        assert_eq!(controller.write(COMMAND, &[command]), Outcome::Continue);
        controller.write(DATA, &[value])
    }

    #[test]
    fn its_own_commands_are_answered() {
        let controller = I8042::default();
        assert_eq!(status(&controller), STATUS_UNLOCKED | STATUS_SYSTEM);
        for (command, answer) in [
            (0x20, Some(0x64)),
            (0xaa, Some(0x55)),
            (0xab, Some(0)),
            (0xa9, Some(1)),
            (0xc0, Some(0x80)),
            (0xd0, Some(0xcf)),
            (0xae, None),
            (0xd4, None),
        ] {
            assert_eq!(asked(&controller, command), answer, "{command:#x}");
        }
    }

    #[test]
    fn the_command_byte_and_the_ram_keep_what_is_written() {
        let controller = I8042::default();
        with_byte(&controller, 0x60, 0x43);
        assert_eq!(asked(&controller, 0x20), Some(0x63), "there is no second port to switch on");
        assert_eq!(status(&controller) & STATUS_SYSTEM, 0);
        assert_eq!(asked(&controller, 0xad), None);
        assert_eq!(asked(&controller, 0x20), Some(0x73));
        assert_eq!(asked(&controller, 0xae), None);
        assert_eq!(asked(&controller, 0x20), Some(0x63));
        with_byte(&controller, 0x7f, 0x99);
        assert_eq!((asked(&controller, 0x3f), asked(&controller, 0x3e)), (Some(0x99), Some(0)));
        controller.write(DATA, &[0xf2]);
        assert_eq!(status(&controller) & STATUS_OUTPUT_FULL, 0, "no keyboard says what it is");
    }

    #[test]
    fn the_machine_is_reset_in_three_ways_and_in_no_other() {
        let reset = Outcome::End(Box::new(Exit::new(ExitReason::Reset)));
        let controller = I8042::default();
        assert_eq!(controller.write(COMMAND, &[0xfe]), reset);
        assert_eq!(controller.write(COMMAND, &[0xfe, 0xfe]), reset);
        assert_eq!(with_byte(&controller, 0xd1, 0xce), reset);
        assert_eq!(controller.write(COMMAND, &[0xff]), Outcome::Continue);
        assert_eq!(controller.write(DATA, &[0xfe]), Outcome::Continue);
        assert_eq!(with_byte(&controller, 0xd1, 0xdf), Outcome::Continue);
        assert_eq!(asked(&controller, 0xd0), Some(0xcf));
        with_byte(&controller, 0xd1, 0xdd);
        assert_eq!(asked(&controller, 0xd0), Some(0xcd), "A20");
    }

    #[test]
    fn a_state_comes_back_and_any_other_bytes_are_refused() {
        let (controller, other) = (I8042::default(), I8042::default());
        with_byte(&controller, 0x61, 7);
        controller.write(COMMAND, &[0xaa]);
        other.restore(&controller.save().unwrap()).unwrap();
        let state = *controller.0.lock();
        assert_eq!(*other.0.lock(), state);
        other.restore(&[]).unwrap();
        assert_eq!(*other.0.lock(), State::default());
        for wrong in [&[0; STATE_BYTES - 1][..], &[0; STATE_BYTES + 1], &[2; STATE_BYTES]] {
            assert!(other.restore(wrong).is_err());
        }
    }
}
