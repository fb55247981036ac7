//! The CMOS real-time clock (MC146818): the host's time in UTC, BCD, 24 hours; no alarms, no interrupts.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Device, Flow};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

const INDEX: u64 = 0;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// 24-hour mode; BCD is the absence of the binary bit.
const HOURS_24: u8 = 0b10;
const RAM_AND_TIME_VALID: u8 = 0x80;

/// Answers at an index port and the data port behind it.
#[derive(Debug)]
pub struct Rtc {
    state: Mutex<State, rank::Rtc>,
    now: fn() -> i64,
}

#[derive(Debug)]
struct State {
    index: u8,
    ram: [u8; 128],
}

impl Default for Rtc {
    fn default() -> Self {
        Self::with_clock(host_seconds)
    }
}

impl Rtc {
    fn with_clock(now: fn() -> i64) -> Self {
        Self { state: Mutex::new(State { index: 0, ram: [0; 128] }), now }
    }

    fn register(&self, state: &State) -> u8 {
        let time = utc((self.now)());
        match state.index {
            0x00 => bcd(time.tm_sec),
            0x02 => bcd(time.tm_min),
            0x04 => bcd(time.tm_hour),
            0x06 => bcd(time.tm_wday + 1),
            0x07 => bcd(time.tm_mday),
            0x08 => bcd(time.tm_mon + 1),
            0x09 => bcd(time.tm_year.rem_euclid(100)),
            CENTURY => bcd((time.tm_year + 1900) / 100),
            STATUS_B => HOURS_24,
            STATUS_D => RAM_AND_TIME_VALID,
            0x0a | 0x0c => 0,
            other => state.ram.get(usize::from(other)).copied().unwrap_or(0xff),
        }
    }
}

impl Device for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) -> Flow {
        let state = self.state.lock();
        let value = if offset == INDEX { state.index } else { self.register(&state) };
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
        let restored = State::from_bytes(state).ok_or_else(|| {
            let detail = format!("{} bytes instead of 129", state.len());
            Error::new(ErrorKind::Snapshot, "RTC", detail)
        })?;
        *self.state.lock() = restored;
        Ok(())
    }
}

impl State {
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (index, ram) = bytes.split_first()?;
        Some(Self { index: *index, ram: ram.try_into().ok()? })
    }
}

fn host_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    i64::try_from(since).unwrap_or(0)
}

fn utc(seconds: i64) -> libc::tm {
    // SAFETY: an all-zero tm is valid; gmtime_r writes only to it.
    unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&raw const seconds, &raw mut time);
        time
    }
}

fn bcd(value: i32) -> u8 {
    let value = u8::try_from(value.rem_euclid(100)).unwrap_or(0);
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
        let rtc = Rtc::with_clock(|| 1_793_491_198);
        let registers = [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00];
        let time = registers.map(|index| read(&rtc, index));
        assert_eq!(time, [0x20, 0x26, 0x10, 0x31, 0x07, 0x23, 0x59, 0x58]);
        assert_eq!((read(&rtc, 0x0b), read(&rtc, 0x0d)), (2, 0x80));
    }

    #[test]
    fn its_ram_keeps_what_is_written() {
        let rtc = Rtc::default();
        rtc.write(0, &[0xc0]);
        rtc.write(1, &[0xab]);
        assert_eq!(read(&rtc, 0x40), 0xab);
    }
}
