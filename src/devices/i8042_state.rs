//! The registers of the i8042, as its commands change them. There are no locks here; `i8042.rs` has
//! one.

use super::keyboard::{Keyboard, translated};
use super::speaker::Speaker;
use crate::bytes::{Reader, bad};
use crate::error::Result;
use crate::exit_handler::{Exit, ExitReason, Outcome};

pub(super) const STATUS_OUTPUT_FULL: u8 = 1 << 0;
pub(super) const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
pub(super) const STATUS_UNLOCKED: u8 = 1 << 4;
/// The byte is from the second port, where no device has answered in time.
const SECOND_PORT_TIMEOUT: u8 = 1 << 5 | 1 << 6;
pub(super) const RESEND: u8 = 0xfe;

/// Bits of the controller command byte, which is the first byte of its RAM.
const INTERRUPT: u8 = 1 << 0;
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

pub(super) const RAM: usize = 32;
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    ram: [u8; RAM],
    output_port: u8,
    /// The command that takes the next write to the data port as its byte; 0 if there is none.
    waiting: u8,
    was_command: bool,
    output: u8,
    pub(super) is_full: bool,
    /// The bits of the status that say where the output is from.
    source: u8,
    /// Whether the output has been filled since the interrupt line was driven.
    pub(super) is_new: bool,
    keyboard: Keyboard,
    pub(super) speaker: Speaker,
}

impl Default for State {
    /// The state after the firmware.
    fn default() -> Self {
        let mut ram = [0; RAM];
        let [command_byte, ..] = &mut ram;
        *command_byte = SYSTEM | SECOND_PORT_OFF | TRANSLATE;
        let output_port = 0xcc | A20 | NOT_RESET;
        Self {
            ram,
            output_port,
            waiting: 0,
            was_command: false,
            output: 0,
            is_full: false,
            source: 0,
            is_new: false,
            keyboard: Keyboard::default(),
            speaker: Speaker::default(),
        }
    }
}

impl State {
    pub(super) fn status(&self) -> u8 {
        let [command_byte, ..] = self.ram;
        let flag = |is_set, bit| if is_set { bit } else { 0 };
        STATUS_UNLOCKED
            | flag(self.is_full, STATUS_OUTPUT_FULL)
            | flag(self.is_full, self.source)
            | flag(command_byte & SYSTEM != 0, STATUS_SYSTEM)
            | flag(self.was_command, STATUS_COMMAND)
    }

    fn answer(&mut self, value: u8) {
        (self.output, self.is_full, self.is_new, self.source) = (value, true, true, 0);
    }

    /// An empty buffer returns its last byte.
    pub(super) fn read_data(&mut self) -> u8 {
        self.is_full = false;
        self.output
    }

    /// Move a byte of the keyboard to the output, if it may be sent. Returns whether the output has
    /// been filled.
    pub(super) fn transfer(&mut self) -> bool {
        let [command_byte, ..] = self.ram;
        if !self.is_full
            && command_byte & FIRST_PORT_OFF == 0
            && let Some(byte) = self.keyboard.take()
        {
            let is_translated = command_byte & TRANSLATE != 0;
            self.answer(if is_translated { translated(byte) } else { byte });
        }
        std::mem::take(&mut self.is_new)
    }

    /// Whether the interrupt line is high.
    pub(super) fn interrupts(&self) -> bool {
        let [command_byte, ..] = self.ram;
        let enabled = command_byte & (INTERRUPT | FIRST_PORT_OFF) == INTERRUPT;
        self.is_full && enabled && self.source == 0
    }

    fn cell(&mut self, command: u8) -> &mut u8 {
        let [first, rest @ ..] = &mut self.ram;
        usize::from(command & 0x1f).checked_sub(1).and_then(|at| rest.get_mut(at)).unwrap_or(first)
    }

    /// A write to the command port.
    pub(super) fn command(&mut self, command: u8) -> Outcome {
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

    /// A write to the data port: the byte that a command waits for, or one for the keyboard.
    pub(super) fn data(&mut self, value: u8) -> Outcome {
        self.was_command = false;
        match std::mem::take(&mut self.waiting) {
            0x60 => *self.cell(0) = value | SECOND_PORT_OFF,
            command @ 0x61..=0x7f => *self.cell(command) = value,
            0xd1 if value & NOT_RESET == 0 => return reset(),
            0xd1 => self.output_port = value,
            // As if the keyboard or the second port had sent it.
            0xd2 | 0xd3 => self.answer(value),
            // A byte for the second port, where nothing answers.
            0xd4 => {
                self.answer(RESEND);
                self.source = SECOND_PORT_TIMEOUT;
            }
            _ => {
                // The controller turns the first port on to send a byte.
                *self.cell(0) &= !FIRST_PORT_OFF;
                self.keyboard.receive(value);
            }
        }
        Outcome::Continue
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let flags = [self.was_command, self.is_full].map(u8::from);
        let mut bytes =
            [&self.ram[..], &[self.output_port, self.waiting, self.output], &flags].concat();
        bytes.extend([self.source, self.speaker.control()]);
        self.keyboard.save(&mut bytes);
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("i8042", bytes);
        let ram = reader.take()?;
        let [output_port, waiting, output, was_command, is_full] = reader.take()?;
        if was_command > 1 || is_full > 1 {
            return Err(bad("i8042", "a flag is neither 0 nor 1"));
        }
        let (was_command, is_full) = (was_command == 1, is_full == 1);
        let mut state =
            Self { ram, output_port, waiting, was_command, output, is_full, ..Self::default() };
        // States of older versions have no keyboard.
        if !reader.is_empty() {
            let [source, control] = reader.take()?;
            state.source = source & SECOND_PORT_TIMEOUT;
            state.speaker = Speaker::with(control);
            state.keyboard = Keyboard::from_bytes(reader)?;
        }
        Ok(state)
    }
}

fn reset() -> Outcome {
    Outcome::End(Box::new(Exit::new(ExitReason::Reset)))
}
