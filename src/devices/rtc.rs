//! The CMOS real-time clock (MC146818). It shows the host's time in UTC until the guest sets
//! another. Its registers are in `rtc_state.rs`, the formats and the alarm in `rtc_time.rs`, its
//! interrupts in `rtc_flags.rs`, and the timer that raises them in `rtc_timer.rs`.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Device;
use super::line::{LineEnd, SharedLine};
use super::rtc_cells::Cells;
use super::rtc_flags::Flags;
use super::rtc_state::State;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Expiry, TimerFd};
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};

const INDEX: u64 = 0;

/// Answers at an index port and the data port after it.
#[derive(Debug)]
pub(crate) struct Rtc {
    guest: Mutex<Guest, rank::Rtc>,
    /// Expires at the next interrupt. `None` on a machine without an interrupt controller.
    timer: Option<TimerFd>,
    /// The time since 1970.
    now: fn() -> Duration,
}

#[derive(Debug)]
struct Guest {
    state: State,
    irq: LineEnd,
    /// How many have quiesced the clock.
    quiesced: usize,
}

impl Rtc {
    /// The clock of a machine with this much memory and this many vCPUs.
    ///
    /// # Errors
    /// If there is an interrupt line and no timer can be created for it.
    pub(crate) fn new(irq: Option<Arc<SharedLine>>, memory: u64, vcpus: u64) -> Result<Self> {
        let failed = |e| Error::os(ErrorKind::Io, "timerfd", &e);
        let timer = irq.as_ref().map(|_| TimerFd::new().map_err(failed)).transpose()?;
        Ok(Self { timer, ..Self::with_clock(host_time, irq, Cells::of_machine(memory, vcpus)) })
    }

    fn with_clock(now: fn() -> Duration, irq: Option<Arc<SharedLine>>, cells: Cells) -> Self {
        let state = State { index: 0, cells, ahead: 0, flags: Flags::since(now()) };
        let guest = Guest { state, irq: LineEnd::new(irq), quiesced: 0 };
        Self { guest: Mutex::new(guest), timer: None, now }
    }

    /// The timer that expires at the next interrupt; see [`Self::expire`].
    pub(super) fn timer(&self) -> Option<&TimerFd> {
        self.timer.as_ref()
    }

    /// The timer has expired.
    pub(super) fn expire(&self) {
        if let Some(timer) = &self.timer {
            let _ = timer.read();
        }
        self.change(|_, _| ());
    }

    /// Change the state at the present time; then drive the line and set the timer.
    fn change<T>(&self, change: impl FnOnce(&mut State, Duration) -> T) -> T {
        let mut guest = self.guest.lock();
        let Guest { state, irq, quiesced } = &mut *guest;
        let now = (self.now)();
        // What is quiesced changes only with the guest's own accesses.
        state.flags.advance(&state.cells, state.ahead, now);
        let result = change(state, now);
        if let (Some(timer), 0) = (&self.timer, *quiesced) {
            irq.drive(state.flags.interrupts(&state.cells), false);
            // Fails for no time.
            let _ = match state.flags.next(&state.cells, state.ahead, now) {
                Some(at) => timer.set(Expiry::In(at.saturating_sub(now)), Duration::ZERO),
                None => timer.clear(),
            };
        }
        result
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "RTC"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        let value = match offset {
            INDEX => self.guest.lock().state.index,
            _ => self.change(State::read),
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
        Outcome::Continue
    }

    /// A word goes to both ports: the index, and the value.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        for (port, value) in (offset..).zip(data).take(2) {
            match port {
                INDEX => self.guest.lock().state.index = *value,
                1 => self.change(|state, now| state.write(*value, now)),
                _ => {}
            }
        }
        Outcome::Continue
    }

    fn acts_by_itself(&self) -> bool {
        self.timer.is_some()
    }

    fn quiesce(&self) -> Result<()> {
        self.guest.lock().quiesced += 1;
        Ok(())
    }

    fn resume(&self) {
        let mut guest = self.guest.lock();
        guest.quiesced = guest.quiesced.saturating_sub(1);
        drop(guest);
        self.change(|_, _| ());
    }

    /// The index, the cells, the seconds by which the time is ahead of the host's, and the pending
    /// flags of status C.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.change(|state, _| state.to_bytes()))
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let restored = State::from_bytes(state, (self.now)())?;
        self.change(|state, _| *state = restored);
        Ok(())
    }
}

fn host_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    //! Covers src/devices/rtc_state.rs.

    use super::super::line::tests::Levels;
    use super::super::rtc_cells::{
        AFTERNOON, BINARY, CENTURY, DAY, HOURS, HOURS_24, MODES, MONTH, OSCILLATOR, SECONDS, SET,
        STATUS_A, STATUS_B, STATUS_C, STATUS_D, TIME, UPDATE_INTERRUPT, YEAR,
    };
    use super::super::rtc_flags::INTERRUPT;
    use super::super::rtc_state::UPDATING;
    use super::*;
    use proptest::prelude::*;

    const UPDATED: u8 = 0x10;

    fn at(now: fn() -> Duration) -> Rtc {
        Rtc::with_clock(now, None, Cells::default())
    }

    fn read(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    #[test]
    fn the_time_is_utc_in_bcd() {
        // Saturday 2026-10-31 23:59:58 UTC
        let rtc = at(|| Duration::from_secs(1_793_491_198));
        let registers = [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00];
        let time = registers.map(|index| read(&rtc, index));
        assert_eq!(time, [0x20, 0x26, 0x10, 0x31, 0x07, 0x23, 0x59, 0x58]);
        assert_eq!((read(&rtc, 0x0b), read(&rtc, 0x0d)), (2, 0x80));
    }

    #[test]
    fn the_form_of_the_time_is_that_of_status_b() {
        let rtc = at(|| Duration::from_secs(1_793_491_198));
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[BINARY]);
        let time = [CENTURY, 0x09, 0x04, 0x00].map(|index| read(&rtc, index));
        assert_eq!(time, [20, 26, 11 | AFTERNOON, 58]);
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[0]);
        assert_eq!(read(&rtc, 0x04), 0x11 | AFTERNOON);
        let midnight = at(|| Duration::from_secs(86_400));
        midnight.write(0, &[STATUS_B]);
        midnight.write(1, &[0]);
        assert_eq!((read(&midnight, 0x04), read(&midnight, STATUS_B)), (0x12, 0));
    }

    #[test]
    fn an_update_is_seen_before_each_second_and_told_once_behind_it() {
        use std::sync::atomic::{AtomicU64, Ordering};
        static MICROSECONDS: AtomicU64 = AtomicU64::new(500_000);
        let rtc = at(|| Duration::from_micros(MICROSECONDS.load(Ordering::Relaxed)));
        assert_eq!((read(&rtc, STATUS_A), read(&rtc, STATUS_C)), (OSCILLATOR, 0));
        write(&rtc, STATUS_A, OSCILLATOR & 0x70); // without a period
        MICROSECONDS.store(998_000, Ordering::Relaxed);
        assert_eq!((read(&rtc, STATUS_A), read(&rtc, STATUS_C)), (0x20 | UPDATING, 0));
        MICROSECONDS.store(1_000_000, Ordering::Relaxed);
        assert_eq!(read(&rtc, STATUS_A), 0x20);
        assert_eq!((read(&rtc, STATUS_C) & UPDATED, read(&rtc, STATUS_C)), (UPDATED, 0));
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[HOURS_24 | UPDATE_INTERRUPT]);
        MICROSECONDS.store(2_999_000, Ordering::Relaxed);
        assert_eq!(read(&rtc, STATUS_C), UPDATED | INTERRUPT);
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[SET]);
        assert_eq!(read(&rtc, STATUS_A), 0x20, "nothing is updated while the clock is set");
    }

    fn write(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn a_time_that_the_guest_sets_goes_on_from_there() {
        use std::sync::atomic::{AtomicU64, Ordering};
        static SECOND: AtomicU64 = AtomicU64::new(1_793_491_198); // 2026-10-31 23:59:58 UTC
        let now = || Duration::from_secs(SECOND.load(Ordering::Relaxed));
        let rtc = at(now);
        write(&rtc, YEAR, 0x55);
        assert_eq!([CENTURY, YEAR, DAY].map(|index| read(&rtc, index)), [0x20, 0x55, 0x31]);
        // Set together while the clock is stopped, because the intermediate dates are invalid.
        write(&rtc, STATUS_B, HOURS_24 | SET);
        for (index, value) in [(MONTH, 0x02), (DAY, 0x28), (YEAR, 0x00), (CENTURY, 0x21)] {
            write(&rtc, index, value);
        }
        SECOND.fetch_add(5, Ordering::Relaxed);
        assert_eq!((read(&rtc, SECONDS), read(&rtc, DAY)), (0x58, 0x28), "it stands still");
        write(&rtc, STATUS_B, HOURS_24);
        SECOND.fetch_add(3, Ordering::Relaxed);
        let time = || TIME.map(|index| read(&rtc, index));
        // Monday 2100-03-01: that year has no leap day.
        assert_eq!(time(), [0x01, 0x00, 0x00, 0x02, 0x01, 0x03, 0x00, 0x21]);
        // Changing the format does not change the time.
        write(&rtc, STATUS_B, BINARY);
        assert_eq!((read(&rtc, HOURS), read(&rtc, YEAR)), (12, 0));
        write(&rtc, HOURS, 11 | AFTERNOON);
        write(&rtc, STATUS_B, HOURS_24);
        assert_eq!(read(&rtc, HOURS), 0x23);
        let other = at(now);
        other.restore(&rtc.save().unwrap()).unwrap();
        assert_eq!(TIME.map(|index| read(&other, index)), time());
        for wrong in [129, 136, 139] {
            assert!(other.restore(&vec![0; wrong]).is_err());
        }
        other.restore(&rtc.save().unwrap()[..137]).unwrap(); // of an earlier version
    }

    #[test]
    fn no_time_that_is_none_does_harm() {
        let rtc = at(|| Duration::from_secs(1_793_491_198));
        for (index, value) in TIME.into_iter().flat_map(|index| [(index, 0), (index, 0xff)]) {
            for mode in MODES {
                write(&rtc, STATUS_B, mode);
                write(&rtc, index, value);
                let _ = TIME.map(|index| read(&rtc, index));
            }
        }
    }

    #[test]
    fn its_ram_keeps_what_is_written() {
        let rtc = at(host_time);
        rtc.write(0, &[0xc0]);
        rtc.write(1, &[0xab]);
        assert_eq!(read(&rtc, 0x40), 0xab);
        rtc.write(0, &[0x41, 0xcd]); // a word
        assert_eq!(read(&rtc, 0x41), 0xcd);
        rtc.write(0, &[0x80 | STATUS_D]);
        let mut index = [0];
        rtc.read(0, &mut index);
        assert_eq!(index, [0x80 | STATUS_D]);
    }

    #[test]
    fn the_line_is_high_from_an_interrupt_to_the_read_of_status_c() {
        let levels = Levels::default();
        let rtc = Rtc::new(Some(levels.line()), 1 << 20, 1).unwrap();
        let wait = || {
            let mut poll = libc::pollfd {
                fd: std::os::fd::AsRawFd::as_raw_fd(rtc.timer().unwrap()),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd that lives through the call.
            assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 60_000) }, 1);
        };
        write(&rtc, STATUS_B, HOURS_24 | 0x40);
        wait();
        rtc.quiesce().unwrap();
        rtc.expire();
        assert!(!levels.is_high(), "nothing comes from a quiesced clock");
        rtc.resume();
        assert!(levels.is_high());
        assert_eq!(read(&rtc, STATUS_C) & 0xc0, 0xc0);
        assert!(!levels.is_high());
        wait();
        rtc.expire();
        assert_eq!((levels.rises(), levels.is_high()), (2, true));
        let other = Rtc::new(Some(levels.line()), 1 << 20, 1).unwrap();
        other.restore(&rtc.save().unwrap()).unwrap();
        assert_eq!(levels.rises(), 3, "a pending interrupt comes back");
    }

    proptest! {
        #[test]
        fn no_accesses_panic(accesses in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u8>()), 0..40)) {
            let rtc = at(host_time);
            for (is_write, index, value) in accesses {
                if is_write { write(&rtc, index, value); } else { read(&rtc, index); }
            }
            let other = at(host_time);
            other.restore(&rtc.save().unwrap()).unwrap();
        }
    }
}
