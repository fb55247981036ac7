//! The CMOS real-time clock (MC146818). It shows the host's time in UTC until the guest sets
//! another, in the format that status B selects. It has no alarms and no interrupts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};

const INDEX: u64 = 0;
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// Status A: an update is in progress or about to begin.
const UPDATING: u8 = 0x80;
/// Status A after a reset: the 32 kHz crystal, 1,024 Hz.
const OSCILLATOR: u8 = 0x26;
/// The update at each full second takes 1,984 us, and is announced 244 us earlier.
const UPDATE: Duration = Duration::from_micros(2228);
/// Status B: the clock is stopped so that it can be set.
const SET: u8 = 0x80;
/// The time registers.
const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
const UPDATE_INTERRUPT: u8 = 0x10;
const BINARY: u8 = 0b100;
const HOURS_24: u8 = 0b10;
/// Status C: an update has ended, which would have raised an interrupt if enabled.
const UPDATED: u8 = 0x10;
const INTERRUPT: u8 = 0x80;
const AFTERNOON: u8 = 0x80;
const RAM_AND_TIME_VALID: u8 = 0x80;

/// Answers at an index port and the data port after it.
#[derive(Debug)]
pub struct Rtc {
    state: Mutex<State, rank::Rtc>,
    /// The time since 1970.
    now: fn() -> Duration,
}

#[derive(Debug)]
struct State {
    index: u8,
    /// The time cells are valid only while the clock is stopped.
    ram: [u8; 128],
    /// The seconds by which the guest's time is ahead of the host's.
    ahead: i64,
    /// The second at which status C was last read, which clears it.
    status_read_s: u64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::with_clock(host_time)
    }
}

impl Rtc {
    fn with_clock(now: fn() -> Duration) -> Self {
        let mut state = State { index: 0, ram: [0; 128], ahead: 0, status_read_s: now().as_secs() };
        state.set_cell(STATUS_A, OSCILLATOR);
        state.set_cell(STATUS_B, HOURS_24);
        Self { state: Mutex::new(state), now }
    }

    fn register(&self, state: &mut State) -> u8 {
        let now = (self.now)();
        let mode = state.cell(STATUS_B);
        match state.index {
            index if TIME.contains(&index) && mode & SET == 0 => state.time_in(index, now),
            STATUS_A => {
                let left = Duration::from_secs(1).saturating_sub(subsecond(now));
                let is_updating = mode & SET == 0 && left <= UPDATE;
                state.cell(STATUS_A) & !UPDATING | if is_updating { UPDATING } else { 0 }
            }
            STATUS_C => {
                let before = std::mem::replace(&mut state.status_read_s, now.as_secs());
                let flags = if before == now.as_secs() || mode & SET != 0 { 0 } else { UPDATED };
                flags | if flags & mode & UPDATE_INTERRUPT == 0 { 0 } else { INTERRUPT }
            }
            STATUS_D => RAM_AND_TIME_VALID,
            other => state.cell(other),
        }
    }

    fn set_register(&self, state: &mut State, value: u8) {
        let (index, now) = (state.index, (self.now)());
        let is_time = TIME.contains(&index) || index == STATUS_B;
        if !is_time {
            return state.set_cell(index, value);
        }
        let stood = state.cell(STATUS_B) & SET != 0;
        if index == STATUS_B {
            state.set_cell(index, value);
        }
        if !stood {
            TIME.iter().for_each(|index| state.set_cell(*index, state.time_in(*index, now)));
        }
        if index != STATUS_B {
            state.set_cell(index, value);
        }
        let stands = state.cell(STATUS_B) & SET != 0;
        // Changing only the format does not set the time.
        if !stands && (stood || index != STATUS_B) {
            state.ahead = state.time_in_cells().saturating_sub(seconds(now));
        }
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "RTC"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        let mut state = self.state.lock();
        let value = if offset == INDEX { state.index } else { self.register(&mut state) };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
        Outcome::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let Some(value) = data.first() else {
            return Outcome::Continue;
        };
        let mut state = self.state.lock();
        if offset == INDEX {
            state.index = value & 0x7f; // the top bit masks the NMI
        } else {
            self.set_register(&mut state, *value);
        }
        Outcome::Continue
    }

    /// The index, the cells, and the seconds by which the time is ahead of the host's.
    fn save(&self) -> Result<Vec<u8>> {
        let state = self.state.lock();
        Ok([&[state.index][..], &state.ram, &state.ahead.to_le_bytes()].concat())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let now = (self.now)().as_secs();
        let restored = State::from_bytes(state, now).ok_or_else(|| {
            let detail = format!("{} bytes instead of 137", state.len());
            Error::new(ErrorKind::Snapshot, "RTC", detail)
        })?;
        *self.state.lock() = restored;
        Ok(())
    }
}

impl State {
    fn from_bytes(bytes: &[u8], status_read_s: u64) -> Option<Self> {
        let (index, rest) = bytes.split_first()?;
        let (ram, ahead) = rest.split_first_chunk()?;
        let ahead = i64::from_le_bytes(ahead.try_into().ok()?);
        Some(Self { index: *index, ram: *ram, ahead, status_read_s })
    }

    fn cell(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn set_cell(&mut self, index: u8, value: u8) {
        if let Some(cell) = self.ram.get_mut(usize::from(index)) {
            *cell = value;
        }
    }

    /// The value of a time register at a host time.
    fn time_in(&self, index: u8, now: Duration) -> u8 {
        let time = utc(seconds(now).saturating_add(self.ahead));
        let mode = self.cell(STATUS_B);
        let number = |value| if mode & BINARY == 0 { bcd(value) } else { binary(value) };
        match index {
            SECONDS => number(time.tm_sec),
            MINUTES => number(time.tm_min),
            HOURS if mode & HOURS_24 == 0 => {
                let half = if time.tm_hour < 12 { 0 } else { AFTERNOON };
                number((time.tm_hour + 11) % 12 + 1) | half
            }
            HOURS => number(time.tm_hour),
            WEEKDAY => number(time.tm_wday + 1),
            DAY => number(time.tm_mday),
            MONTH => number(time.tm_mon + 1),
            YEAR => number(time.tm_year.rem_euclid(100)),
            _ => number((time.tm_year + 1900) / 100),
        }
    }

    /// The time that the cells show, since 1970. The day of the week follows from the others.
    fn time_in_cells(&self) -> i64 {
        let mode = self.cell(STATUS_B);
        let number = |value: u8| match mode & BINARY {
            0 => i32::from(value >> 4) * 10 + i32::from(value & 15),
            _ => i32::from(value),
        };
        let [second, minute, day, month, year, century] =
            [SECONDS, MINUTES, DAY, MONTH, YEAR, CENTURY].map(|index| number(self.cell(index)));
        let hour = match self.cell(HOURS) {
            value if mode & HOURS_24 == 0 => {
                let half = if value & AFTERNOON == 0 { 0 } else { 12 };
                number(value & !AFTERNOON) % 12 + half
            }
            value => number(value),
        };
        // SAFETY: an all-zero tm is valid; timegm reads and writes only it, whatever is in it.
        unsafe {
            let mut time: libc::tm = std::mem::zeroed();
            (time.tm_sec, time.tm_min, time.tm_hour) = (second, minute, hour);
            (time.tm_mday, time.tm_mon, time.tm_year) =
                (day, month - 1, century * 100 + year - 1900);
            libc::timegm(&raw mut time)
        }
    }
}

fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
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

    fn write(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn a_time_that_the_guest_sets_goes_on_from_there() {
        use std::sync::atomic::{AtomicU64, Ordering};
        static SECOND: AtomicU64 = AtomicU64::new(1_793_491_198); // 2026-10-31 23:59:58 UTC
        let now = || Duration::from_secs(SECOND.load(Ordering::Relaxed));
        let rtc = Rtc::with_clock(now);
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
        let other = Rtc::with_clock(now);
        other.restore(&rtc.save().unwrap()).unwrap();
        assert_eq!(TIME.map(|index| read(&other, index)), time());
        assert!(other.restore(&[0; 129]).is_err());
    }

    #[test]
    fn no_time_that_is_none_does_harm() {
        let rtc = Rtc::with_clock(|| Duration::from_secs(1_793_491_198));
        for (index, value) in TIME.into_iter().flat_map(|index| [(index, 0), (index, 0xff)]) {
            for mode in [0, BINARY, HOURS_24, HOURS_24 | BINARY] {
                write(&rtc, STATUS_B, mode);
                write(&rtc, index, value);
                let _ = TIME.map(|index| read(&rtc, index));
            }
        }
    }

    #[test]
    fn its_ram_keeps_what_is_written() {
        let rtc = Rtc::default();
        rtc.write(0, &[0xc0]);
        rtc.write(1, &[0xab]);
        assert_eq!(read(&rtc, 0x40), 0xab);
    }
}
