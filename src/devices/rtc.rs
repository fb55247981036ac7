//! The CMOS real-time clock (MC146818): the host's time in UTC, in the form that status B asks for;
//! no alarms, no interrupts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Device, Flow};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

const INDEX: u64 = 0;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// Status A: an update is in progress or about to begin.
const UPDATING: u8 = 0x80;
/// Status A after a reset: the 32 kHz crystal, 1,024 Hz.
const OSCILLATOR: u8 = 0x26;
/// The update at each full second takes 1,984 us, and is announced 244 us before.
const UPDATE: Duration = Duration::from_micros(2228);
/// Status B: the clock stands still to be set.
const SET: u8 = 0x80;
const UPDATE_INTERRUPT: u8 = 0x10;
const BINARY: u8 = 0b100;
const HOURS_24: u8 = 0b10;
/// Status C: an update has ended, and an interrupt that is enabled was due.
const UPDATED: u8 = 0x10;
const INTERRUPT: u8 = 0x80;
const AFTERNOON: u8 = 0x80;
const RAM_AND_TIME_VALID: u8 = 0x80;

/// Answers at an index port and the data port behind it.
#[derive(Debug)]
pub struct Rtc {
    state: Mutex<State, rank::Rtc>,
    /// Since 1970.
    now: fn() -> Duration,
}

#[derive(Debug)]
struct State {
    index: u8,
    ram: [u8; 128],
    /// The second at which status C was last read, which clears it.
    told: u64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::with_clock(host_time)
    }
}

impl Rtc {
    fn with_clock(now: fn() -> Duration) -> Self {
        let mut ram = [0; 128];
        for (index, value) in [(STATUS_A, OSCILLATOR), (STATUS_B, HOURS_24)] {
            if let Some(cell) = ram.get_mut(usize::from(index)) {
                *cell = value;
            }
        }
        Self { state: Mutex::new(State { index: 0, ram, told: now().as_secs() }), now }
    }

    fn register(&self, state: &mut State) -> u8 {
        let now = (self.now)();
        let time = utc(i64::try_from(now.as_secs()).unwrap_or(0));
        let mode = state.cell(STATUS_B);
        let number = |value| if mode & BINARY == 0 { bcd(value) } else { binary(value) };
        match state.index {
            0x00 => number(time.tm_sec),
            0x02 => number(time.tm_min),
            0x04 if mode & HOURS_24 == 0 => {
                let half = if time.tm_hour < 12 { 0 } else { AFTERNOON };
                number((time.tm_hour + 11) % 12 + 1) | half
            }
            0x04 => number(time.tm_hour),
            0x06 => number(time.tm_wday + 1),
            0x07 => number(time.tm_mday),
            0x08 => number(time.tm_mon + 1),
            0x09 => number(time.tm_year.rem_euclid(100)),
            CENTURY => number((time.tm_year + 1900) / 100),
            STATUS_A => {
                let left = Duration::from_secs(1).saturating_sub(subsecond(now));
                let is_updating = mode & SET == 0 && left <= UPDATE;
                state.cell(STATUS_A) & !UPDATING | if is_updating { UPDATING } else { 0 }
            }
            STATUS_C => {
                let before = std::mem::replace(&mut state.told, now.as_secs());
                let flags = if before == now.as_secs() || mode & SET != 0 { 0 } else { UPDATED };
                flags | if flags & mode & UPDATE_INTERRUPT == 0 { 0 } else { INTERRUPT }
            }
            STATUS_D => RAM_AND_TIME_VALID,
            other => state.cell(other),
        }
    }
}

impl Device for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) -> Flow {
        let mut state = self.state.lock();
        let value = if offset == INDEX { state.index } else { self.register(&mut state) };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
        Flow::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Flow {
        let Some(value) = data.first() else {
            return Flow::Continue;
        };
        let mut state = self.state.lock();
        if offset == INDEX {
            state.index = value & 0x7f; // the top bit masks the NMI
        } else {
            let index = usize::from(state.index);
            if let Some(cell) = state.ram.get_mut(index) {
                *cell = *value;
            }
        }
        Flow::Continue
    }

    /// The index, then the cells. The time is the host's.
    fn save(&self) -> Result<Vec<u8>> {
        let state = self.state.lock();
        Ok([&[state.index][..], &state.ram].concat())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let now = (self.now)().as_secs();
        let restored = State::from_bytes(state, now).ok_or_else(|| {
            let detail = format!("{} bytes instead of 129", state.len());
            Error::new(ErrorKind::Snapshot, "RTC", detail)
        })?;
        *self.state.lock() = restored;
        Ok(())
    }
}

impl State {
    fn from_bytes(bytes: &[u8], told: u64) -> Option<Self> {
        let (index, ram) = bytes.split_first()?;
        Some(Self { index: *index, ram: ram.try_into().ok()?, told })
    }

    fn cell(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0xff)
    }
}

fn host_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn subsecond(time: Duration) -> Duration {
    Duration::from_nanos(u64::from(time.subsec_nanos()))
}

fn utc(seconds: i64) -> libc::tm {
    // SAFETY: an all-zero tm is valid; gmtime_r writes only to it.
    unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&raw const seconds, &raw mut time);
        time
    }
}

fn binary(value: i32) -> u8 {
    u8::try_from(value.rem_euclid(100)).unwrap_or(0)
}

fn bcd(value: i32) -> u8 {
    let value = binary(value);
    ((value / 10) << 4) | (value % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    #[test]
    fn the_time_is_utc_in_bcd() {
        // Saturday 2026-10-31 23:59:58 UTC
        let rtc = Rtc::with_clock(|| Duration::from_secs(1_793_491_198));
        let registers = [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00];
        let time = registers.map(|index| read(&rtc, index));
        assert_eq!(time, [0x20, 0x26, 0x10, 0x31, 0x07, 0x23, 0x59, 0x58]);
        assert_eq!((read(&rtc, 0x0b), read(&rtc, 0x0d)), (2, 0x80));
    }

    #[test]
    fn the_form_of_the_time_is_that_of_status_b() {
        let rtc = Rtc::with_clock(|| Duration::from_secs(1_793_491_198));
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[BINARY]);
        let time = [CENTURY, 0x09, 0x04, 0x00].map(|index| read(&rtc, index));
        assert_eq!(time, [20, 26, 11 | AFTERNOON, 58]);
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[0]);
        assert_eq!(read(&rtc, 0x04), 0x11 | AFTERNOON);
        let midnight = Rtc::with_clock(|| Duration::from_secs(86_400));
        midnight.write(0, &[STATUS_B]);
        midnight.write(1, &[0]);
        assert_eq!((read(&midnight, 0x04), read(&midnight, STATUS_B)), (0x12, 0));
    }

    #[test]
    fn an_update_is_seen_before_each_second_and_told_once_behind_it() {
        use std::sync::atomic::{AtomicU64, Ordering};
        static MICROSECONDS: AtomicU64 = AtomicU64::new(500_000);
        let rtc = Rtc::with_clock(|| Duration::from_micros(MICROSECONDS.load(Ordering::Relaxed)));
        assert_eq!((read(&rtc, STATUS_A), read(&rtc, STATUS_C)), (OSCILLATOR, 0));
        MICROSECONDS.store(998_000, Ordering::Relaxed);
        assert_eq!((read(&rtc, STATUS_A), read(&rtc, STATUS_C)), (OSCILLATOR | UPDATING, 0));
        MICROSECONDS.store(1_000_000, Ordering::Relaxed);
        assert_eq!(read(&rtc, STATUS_A), OSCILLATOR);
        assert_eq!((read(&rtc, STATUS_C), read(&rtc, STATUS_C)), (UPDATED, 0));
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[HOURS_24 | UPDATE_INTERRUPT]);
        MICROSECONDS.store(2_999_000, Ordering::Relaxed);
        assert_eq!(read(&rtc, STATUS_C), UPDATED | INTERRUPT);
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[SET]);
        assert_eq!(read(&rtc, STATUS_A), OSCILLATOR, "nothing is updated while the clock is set");
    }

    #[test]
    fn its_ram_keeps_what_is_written() {
        let rtc = Rtc::default();
        rtc.write(0, &[0xc0]);
        rtc.write(1, &[0xab]);
        assert_eq!(read(&rtc, 0x40), 0xab);
    }
}
