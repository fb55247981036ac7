//! The flags of the real-time clock's status C, and when they interrupt. Pure arithmetic.

use std::time::Duration;

use super::rtc_cells::{Cells, SET, STATUS_A, STATUS_B};
use super::rtc_time::{next_alarm, seconds};

/// Status B enables the interrupt of a flag with the same bit.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATED: u8 = 0x10;
const ALL: u8 = PERIODIC | ALARM | UPDATED;
/// Status C: an enabled flag is set.
pub(super) const INTERRUPT: u8 = 0x80;

/// A tick of the 32 kHz crystal, times its frequency.
const SECOND_NS: u128 = 1_000_000_000;
const CRYSTAL_HZ: u128 = 32_768;

/// The flags that have been set since status C was last read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flags {
    pending: u8,
    /// The time up to which they are known.
    known: Duration,
}

impl Flags {
    pub(super) fn since(now: Duration) -> Self {
        Self::with(0, now)
    }

    pub(super) fn with(pending: u8, now: Duration) -> Self {
        Self { pending: pending & ALL, known: now }
    }

    pub(super) fn pending(&self) -> u8 {
        self.pending
    }

    /// A read of status C clears them.
    pub(super) fn take(&mut self) -> u8 {
        std::mem::take(&mut self.pending)
    }

    /// Whether one of them interrupts.
    pub(super) fn interrupts(&self, cells: &Cells) -> bool {
        self.pending & cells.get(STATUS_B) & ALL != 0
    }

    /// Set the flags of what has happened since the last call. `ahead`: the seconds by which the
    /// guest's time is ahead.
    pub(super) fn advance(&mut self, cells: &Cells, ahead: i64, now: Duration) {
        // The host's clock may have been set back.
        let before = std::mem::replace(&mut self.known, now).min(now);
        for (flag, at) in events(cells, ahead, before) {
            if self.pending & flag == 0 && at.is_some_and(|at| at <= now) {
                self.pending |= flag;
            }
        }
    }

    /// The time of the next interrupt, while none is pending.
    pub(super) fn next(&self, cells: &Cells, ahead: i64, now: Duration) -> Option<Duration> {
        let enabled = cells.get(STATUS_B);
        if enabled & ALL == 0 || self.interrupts(cells) {
            return None;
        }
        let enabled = events(cells, ahead, now).into_iter().filter(|(flag, _)| enabled & flag != 0);
        enabled.filter_map(|(_, at)| at).min()
    }
}

/// The flags, and when each is set next after this time.
fn events(cells: &Cells, ahead: i64, after: Duration) -> [(u8, Option<Duration>); 3] {
    let is_running = cells.get(STATUS_B) & SET == 0;
    let second = is_running.then(|| Duration::from_secs(after.as_secs().saturating_add(1)));
    let alarm = || {
        let at = next_alarm(cells, seconds(after).checked_add(ahead)?)?.checked_sub(ahead)?;
        u64::try_from(at).ok().map(Duration::from_secs)
    };
    let alarm = if is_running { alarm() } else { None };
    [(PERIODIC, next_period(cells, after)), (ALARM, alarm), (UPDATED, second)]
}

/// The end of the present period, which the four low bits of status A select.
fn next_period(cells: &Cells, after: Duration) -> Option<Duration> {
    let ticks: u128 = match cells.get(STATUS_A) & 15 {
        0 => return None,
        rate @ 1..=2 => 1 << (rate + 6),
        rate => 1 << (rate - 1),
    };
    let periods = after.as_nanos() * CRYSTAL_HZ / (ticks * SECOND_NS) + 1;
    let at = (periods * ticks * SECOND_NS).div_ceil(CRYSTAL_HZ);
    u64::try_from(at).ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::super::rtc_cells::{ALARM_HOURS, ALARM_MINUTES, ALARM_SECONDS};
    use super::*;
    use proptest::prelude::*;

    fn cells(a: u8, b: u8, alarm: [u8; 3]) -> Cells {
        let mut cells = Cells::default();
        cells.set(STATUS_A, a);
        cells.set(STATUS_B, b);
        let places = [ALARM_HOURS, ALARM_MINUTES, ALARM_SECONDS];
        places.into_iter().zip(alarm).for_each(|(index, value)| cells.set(index, value));
        cells
    }

    #[test]
    fn the_periods_are_those_of_the_data_sheet() {
        let period = |rate: u8| next_period(&cells(0x20 | rate, 0, [0; 3]), Duration::ZERO);
        let nanoseconds = |rate| period(rate).map(|period| period.as_nanos());
        assert_eq!(nanoseconds(0), None);
        assert_eq!(nanoseconds(1), Some(3_906_250));
        assert_eq!(nanoseconds(2), Some(7_812_500));
        assert_eq!(nanoseconds(3), Some(122_071), "rounded up");
        assert_eq!(nanoseconds(6), Some(976_563));
        assert_eq!(nanoseconds(15), Some(500_000_000));
    }

    #[test]
    fn a_pending_interrupt_is_the_last_until_status_c_is_read() {
        let cells = cells(0x26, PERIODIC, [0; 3]);
        let mut flags = Flags::since(Duration::ZERO);
        let at = flags.next(&cells, 0, Duration::ZERO).unwrap();
        flags.advance(&cells, 0, at);
        assert!(flags.interrupts(&cells));
        assert_eq!(flags.next(&cells, 0, at), None);
        assert_eq!(flags.take(), PERIODIC);
        assert!(flags.next(&cells, 0, at).is_some_and(|next| next > at));
    }

    proptest! {
        #[test]
        fn at_the_next_interrupt_and_not_before_one_is_pending(
            a in 0u8..0x80, b in any::<u8>(), alarm in any::<[u8; 3]>(),
            ahead in -1_000_000_000i64..1_000_000_000, now in 0u64..3_000_000_000_000_000_000,
        ) {
            let (cells, now) = (cells(a, b, alarm), Duration::from_nanos(now));
            let mut flags = Flags::since(now);
            if let Some(at) = flags.next(&cells, ahead, now) {
                prop_assert!(at > now);
                flags.advance(&cells, ahead, at.saturating_sub(Duration::from_nanos(1)));
                prop_assert!(!flags.interrupts(&cells));
                flags.advance(&cells, ahead, at);
                prop_assert!(flags.interrupts(&cells));
            }
        }

        #[test]
        fn no_numbers_panic(a in any::<u8>(), b in any::<u8>(), alarm in any::<[u8; 3]>(),
                            ahead in any::<i64>(), now in any::<u64>(), later in any::<u64>()) {
            let cells = cells(a, b, alarm);
            let mut flags = Flags::since(Duration::from_secs(now));
            flags.advance(&cells, ahead, Duration::from_secs(later));
            let _ = flags.next(&cells, ahead, Duration::from_secs(later));
        }
    }
}
