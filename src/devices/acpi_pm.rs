//! ACPI's fixed registers (ACPI specification, section 4.8): the PM1a event and control blocks, by
//! which a guest powers the machine off, and the power management timer. There are no buttons, no
//! sleep states but S5, and no interrupt: the timer's carry is only a status bit.

use std::time::Instant;

use super::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitReason, Outcome};
use crate::sync::{Mutex, rank};

/// Ports, as offsets from the base.
const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;

/// The timer's frequency in Hz.
const FREQUENCY: u128 = 3_579_545;

/// Status: the timer's highest bit has changed. A write of one clears it.
const TIMER_STATUS: u8 = 1 << 0;
/// The enable bits of the timer and the global lock, and in the second byte those of power button,
/// sleep button and clock.
const ENABLE_BITS: [u8; 2] = [0b10_0001, 0b111];
/// Control: ACPI is enabled, always.
const SCI_ENABLE: u8 = 1 << 0;
/// The bits of control that keep what is written: bus master reload, and in the second byte the
/// sleep type.
const CONTROL_BITS: [u8; 2] = [1 << 1, SLEEP_TYPE];
const SLEEP_TYPE: u8 = 0b1_1100;
const SLEEP: u8 = 1 << 5;

const STATE_BYTES: usize = 8 + 1 + 2 + 2;

/// Answers at 12 ports from the PM1a event block on.
#[derive(Debug)]
pub struct AcpiPm(Mutex<State, rank::AcpiPm>);

#[derive(Debug)]
struct State {
    /// The timer, in 64 bits, at `since`.
    ticks: u64,
    since: Instant,
    /// How often the timer's highest bit had changed when the guest cleared the status.
    cleared: u64,
    enable: [u8; 2],
    control: [u8; 2],
}

impl Default for AcpiPm {
    fn default() -> Self {
        Self(Mutex::new(State::starting_at(0)))
    }
}

impl State {
    fn starting_at(ticks: u64) -> Self {
        let since = Instant::now();
        Self { ticks, since, cleared: changes(ticks), enable: [0; 2], control: [0; 2] }
    }

    fn now(&self) -> u64 {
        let passed = self.since.elapsed().as_nanos() * FREQUENCY / 1_000_000_000;
        self.ticks.wrapping_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }

    fn has_carried(&self) -> bool {
        changes(self.now()) != self.cleared
    }

    /// All registers, in the order of their ports.
    fn registers(&self) -> [u8; 12] {
        let [ticks @ .., _, _, _, _] = self.now().to_le_bytes();
        let [enable, enable_high] = self.enable;
        let [control, control_high] = self.control;
        let status = if self.has_carried() { TIMER_STATUS } else { 0 };
        let [t0, t1, t2, t3] = ticks;
        let control = control | SCI_ENABLE;
        [status, 0, enable, enable_high, control, control_high, 0, 0, t0, t1, t2, t3]
    }

    fn write(&mut self, port: u64, value: u8) -> Outcome {
        let [enable, enable_high] = &mut self.enable;
        let [control, control_high] = &mut self.control;
        let ([may_enable, may_enable_high], [may_control, may_control_high]) =
            (ENABLE_BITS, CONTROL_BITS);
        match port {
            STATUS if value & TIMER_STATUS != 0 => self.cleared = changes(self.now()),
            ENABLE => *enable = value & may_enable,
            port if port == ENABLE + 1 => *enable_high = value & may_enable_high,
            CONTROL => *control = value & may_control,
            port if port == CONTROL + 1 => {
                *control_high = value & may_control_high;
                // S5 has the sleep type 0. There is no other sleep state.
                if value & SLEEP != 0 && value & SLEEP_TYPE == 0 {
                    return Outcome::End(Box::new(Exit::new(ExitReason::Poweroff)));
                }
            }
            _ => {}
        }
        Outcome::Continue
    }

    fn to_bytes(&self) -> Vec<u8> {
        let carried = [u8::from(self.has_carried())];
        [&self.now().to_le_bytes()[..], &carried, &self.enable, &self.control].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (ticks, rest) = bytes.split_first_chunk()?;
        let [carried @ 0..=1, e0, e1, c0, c1] = *rest else { return None };
        let mut state = Self::starting_at(u64::from_le_bytes(*ticks));
        state.cleared = state.cleared.wrapping_sub(u64::from(carried));
        let masked = |[a, b]: [u8; 2], [mask_a, mask_b]: [u8; 2]| [a & mask_a, b & mask_b];
        state.enable = masked([e0, e1], ENABLE_BITS);
        state.control = masked([c0, c1], CONTROL_BITS);
        Some(state)
    }
}

/// How often the highest of the timer's 32 bits has changed since zero.
fn changes(ticks: u64) -> u64 {
    ticks >> 31
}

impl Device for AcpiPm {
    fn name(&self) -> &str {
        "ACPI"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        let registers = self.0.lock().registers();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = registers.get(from..).unwrap_or_default();
        data.iter_mut().zip(found).for_each(|(byte, register)| *byte = *register);
        Outcome::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let mut state = self.0.lock();
        super::each((offset..).zip(data), |(port, value)| state.write(port, *value))
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.0.lock().to_bytes())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        *self.0.lock() = State::from_bytes(state).ok_or_else(|| {
            let detail =
                format!("these {} bytes are not a state, which has {STATE_BYTES}", state.len());
            Error::new(ErrorKind::Snapshot, "ACPI", detail)
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIMER: u64 = 8;

    fn read<const N: usize>(pm: &AcpiPm, port: u64) -> [u8; N] {
        let mut data = [0xff; N];
        assert_eq!(pm.read(port, &mut data), Outcome::Continue);
        data
    }

    fn poweroff() -> Outcome {
        Outcome::End(Box::new(Exit::new(ExitReason::Poweroff)))
    }

    #[test]
    fn only_s5_powers_off_in_a_word_or_in_its_byte() {
        for written in [0x2000u16, 0x2001, 0x2003] {
            assert_eq!(AcpiPm::default().write(CONTROL, &written.to_le_bytes()), poweroff());
        }
        assert_eq!(AcpiPm::default().write(CONTROL + 1, &[0x20]), poweroff());
        let pm = AcpiPm::default();
        for written in [0u16, 0x0400, 0x2400, 0x3c00, 0x00ff, 0xdfff] {
            assert_eq!(pm.write(CONTROL, &written.to_le_bytes()), Outcome::Continue);
            let kept = u16::from_le_bytes(read(&pm, CONTROL));
            assert_eq!(kept, written & 0x1c02 | 1, "{written:#x}");
        }
        assert_eq!(pm.write(STATUS, &[0, 0, 0, 0, 0, 0x20]), poweroff());
    }

    #[test]
    fn the_enable_bits_are_kept_and_the_status_is_cleared_by_ones() {
        let pm = AcpiPm::default();
        pm.write(STATUS, &[0xff; 4]);
        assert_eq!(read(&pm, STATUS), [0, 0, 0x21, 7]);
        pm.write(ENABLE + 1, &[0]);
        assert_eq!(read(&pm, STATUS), [0, 0, 0x21, 0]);
        *pm.0.lock() = State { cleared: 0, ..State::starting_at(1 << 31) };
        assert_eq!(read(&pm, STATUS), [1]);
        pm.write(STATUS, &[0xfe, 0xff]);
        assert_eq!(read(&pm, STATUS), [1]);
        pm.write(STATUS, &[1]);
        assert_eq!(read(&pm, STATUS), [0]);
    }

    #[test]
    fn the_timer_counts_up_and_continues_where_it_was_saved() {
        let pm = AcpiPm::default();
        let before = u32::from_le_bytes(read(&pm, TIMER));
        let after = u32::from_le_bytes(read(&pm, TIMER));
        assert!(before <= after);
        *pm.0.lock() = State { cleared: 0, ..State::starting_at(5 << 31) };
        pm.write(ENABLE, &[1]);
        let other = AcpiPm::default();
        other.restore(&pm.save().unwrap()).unwrap();
        assert!(other.0.lock().now() >= 5 << 31);
        assert_eq!(read(&other, STATUS), [1, 0, 1, 0]);
        for wrong in [&[][..], &[0; STATE_BYTES - 1], &[0; STATE_BYTES + 1], &[2; STATE_BYTES]] {
            assert!(other.restore(wrong).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_access_and_no_state_panics(
            accesses in prop::collection::vec((0u64..12, prop::collection::vec(any::<u8>(), 1..5)), 0..20),
            state in prop::collection::vec(any::<u8>(), STATE_BYTES),
        ) {
            let pm = AcpiPm::default();
            let _ = pm.restore(&state);
            for (port, mut data) in accesses {
                let _ = pm.write(port, &data);
                let _ = pm.read(port, &mut data);
            }
            let kept = pm.save().unwrap();
            pm.restore(&kept).unwrap();
        }
    }
}
