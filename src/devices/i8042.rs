//! The i8042 keyboard controller with a keyboard and no second port. It answers, so that drivers do
//! not time out, and can reset the machine. Port 0x61 is in its range. The registers are in
//! `i8042_state.rs`.

use std::sync::Arc;

use super::Device;
use super::i8042_state::State;
use super::line::{LineEnd, SharedLine};
use crate::error::Result;
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};

/// Ports, as offsets from the data port.
const DATA: u64 = 0;
const SPEAKER: u64 = 1;
const COMMAND: u64 = 4;

/// Answers at ports 0x60 to 0x64.
#[derive(Debug, Default)]
pub(crate) struct I8042(Mutex<Wired, rank::KeyboardController>);

/// The controller and its interrupt line.
#[derive(Debug, Default)]
struct Wired {
    state: State,
    irq: LineEnd,
}

impl I8042 {
    pub(crate) fn new(irq: Option<Arc<SharedLine>>) -> Self {
        Self(Mutex::new(Wired { state: State::default(), irq: LineEnd::new(irq) }))
    }

    /// Change the state, and let the keyboard send what it has to and the controller has room for.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut wired = self.0.lock();
        let Wired { state, irq } = &mut *wired;
        let result = change(state);
        let has_new = state.transfer();
        irq.drive(state.interrupts(), has_new);
        result
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.change(|state| match offset {
                DATA => state.read_data(),
                SPEAKER => state.speaker.read(),
                COMMAND => state.status(),
                _ => 0,
            });
        }
        Outcome::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let Some(value) = data.first() else { return Outcome::Continue };
        self.change(|state| match offset {
            DATA => state.data(*value),
            COMMAND => state.command(*value),
            SPEAKER => {
                state.speaker.write(*value);
                Outcome::Continue
            }
            _ => Outcome::Continue,
        })
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.0.lock().state.to_bytes())
    }

    /// Snapshots of older versions have no state for this device.
    fn restore(&self, state: &[u8]) -> Result<()> {
        let restored = match state {
            [] => State::default(),
            _ => State::from_bytes(state)?,
        };
        self.change(|state| {
            *state = restored;
            state.is_new = state.is_full;
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/devices/i8042_state.rs.

    use super::super::i8042_state::{
        RAM, RESEND, STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_UNLOCKED,
    };
    use super::super::line::tests::Levels;
    use super::*;
    use crate::exit_handler::{Exit, ExitReason};
    use proptest::prelude::*;

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
    }

    fn take(controller: &I8042) -> Vec<u8> {
        let mut all = Vec::new();
        while status(controller) & STATUS_OUTPUT_FULL != 0 {
            let mut data = [0];
            controller.read(DATA, &mut data);
            all.push(data[0]);
        }
        all
    }

    #[test]
    fn the_keyboard_answers_with_translation_and_without() {
        let controller = I8042::default();
        controller.write(DATA, &[0xf2]);
        assert_eq!(take(&controller), [0xfa, 0xab, 0x41]);
        with_byte(&controller, 0x60, 4);
        controller.write(DATA, &[0xf2]);
        assert_eq!(take(&controller), [0xfa, 0xab, 0x83]);
        controller.write(DATA, &[0xff]);
        controller.write(COMMAND, &[0xad]);
        assert_eq!(take(&controller), [0xfa], "the port is off: the rest waits");
        controller.write(COMMAND, &[0xae]);
        assert_eq!(take(&controller), [0xaa]);
    }

    #[test]
    fn a_byte_for_the_second_port_times_out() {
        let controller = I8042::default();
        with_byte(&controller, 0xd4, 0xff);
        assert_eq!(status(&controller) & 0xe1, 0x61);
        assert_eq!(take(&controller), [RESEND]);
        assert_eq!(status(&controller) & 0xe1, 0);
    }

    #[test]
    fn each_byte_interrupts_where_that_is_enabled() {
        let levels = Levels::default();
        let controller = I8042::new(Some(levels.line()));
        controller.write(DATA, &[0xff]);
        assert_eq!((levels.rises(), take(&controller).len()), (0, 2));
        with_byte(&controller, 0x60, 0x41);
        controller.write(DATA, &[0xff]);
        assert_eq!((levels.rises(), levels.is_high()), (1, true));
        let mut data = [0];
        controller.read(DATA, &mut data);
        assert_eq!((levels.rises(), levels.is_high()), (2, true));
        controller.read(DATA, &mut data);
        assert!(!levels.is_high());
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
        assert_eq!(take(&controller), [0], "the keyboard sends its last byte again");
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
        let state = |controller: &I8042| controller.0.lock().state.clone();
        assert_eq!(state(&other), state(&controller));
        other.restore(&[]).unwrap();
        assert_eq!(state(&other), State::default());
        let saved = controller.save().unwrap();
        let earlier = RAM + 5;
        for length in (1..saved.len()).filter(|length| *length != earlier) {
            assert!(other.restore(&saved[..length]).is_err());
        }
        other.restore(&saved[..earlier]).unwrap();
        assert!(other.restore(&[&saved[..], &[0]].concat()).is_err());
        assert!(other.restore(&[2; RAM + 5]).is_err());
    }

    proptest! {
        #[test]
        fn no_accesses_panic_and_what_is_saved_comes_back(
            accesses in prop::collection::vec((any::<bool>(), 0u64..6, any::<u8>()), 0..40)
        ) {
            let controller = I8042::default();
            for (is_write, offset, value) in accesses {
                if is_write { controller.write(offset, &[value]); }
                else { controller.read(offset, &mut [0]); }
            }
            let other = I8042::default();
            other.restore(&controller.save().unwrap()).unwrap();
            prop_assert_eq!(other.save().unwrap(), controller.save().unwrap());
            prop_assert_eq!(take(&other), take(&controller));
        }
    }
}
