//! The registers of the real-time clock at a time that the caller gives. There are no locks here;
//! `rtc.rs` has one.

use std::time::Duration;

use super::rtc_cells::{
    Cells, SET, STATUS_A, STATUS_B, STATUS_C, STATUS_D, TIME, UPDATE_INTERRUPT,
};
use super::rtc_flags::{Flags, INTERRUPT};
use super::rtc_time::{in_cells, register, seconds};
use crate::bytes::Reader;
use crate::error::Result;

/// The bit of the index port that masks the NMIs of the board. The host's NMIs are not masked.
const NMI_MASK: u8 = 0x80;
/// Status A: an update is in progress or about to begin.
pub(super) const UPDATING: u8 = 0x80;
/// The update at each full second takes 1,984 us, and is announced 244 us earlier.
const UPDATE: Duration = Duration::from_micros(2228);
const RAM_AND_TIME_VALID: u8 = 0x80;

#[derive(Clone, Debug)]
pub(super) struct State {
    /// With the bit that masks NMIs.
    pub(super) index: u8,
    pub(super) cells: Cells,
    /// The seconds by which the guest's time is ahead of the host's.
    pub(super) ahead: i64,
    pub(super) flags: Flags,
}

impl State {
    pub(super) fn read(&mut self, now: Duration) -> u8 {
        let mode = self.cells.get(STATUS_B);
        match self.index & !NMI_MASK {
            index if TIME.contains(&index) && mode & SET == 0 => self.time_in(index, now),
            STATUS_A => {
                let into = Duration::from_nanos(u64::from(now.subsec_nanos()));
                let left = Duration::from_secs(1).saturating_sub(into);
                let is_updating = mode & SET == 0 && left <= UPDATE;
                self.cells.get(STATUS_A) & !UPDATING | if is_updating { UPDATING } else { 0 }
            }
            STATUS_C => {
                let interrupt = if self.flags.interrupts(&self.cells) { INTERRUPT } else { 0 };
                self.flags.take() | interrupt
            }
            STATUS_D => RAM_AND_TIME_VALID,
            other => self.cells.get(other),
        }
    }

    pub(super) fn write(&mut self, value: u8, now: Duration) {
        let index = self.index & !NMI_MASK;
        let is_time = TIME.contains(&index) || index == STATUS_B;
        if !is_time {
            return self.cells.set(index, value);
        }
        let stood = self.cells.get(STATUS_B) & SET != 0;
        if index == STATUS_B {
            // While the clock stands, no update interrupts.
            let off = if value & SET == 0 { 0 } else { UPDATE_INTERRUPT };
            self.cells.set(index, value & !off);
        }
        if !stood {
            for index in TIME {
                let value = self.time_in(index, now);
                self.cells.set(index, value);
            }
        }
        if index != STATUS_B {
            self.cells.set(index, value);
        }
        let stands = self.cells.get(STATUS_B) & SET != 0;
        // Changing only the format does not set the time.
        if !stands && (stood || index != STATUS_B) {
            self.ahead = in_cells(&self.cells).saturating_sub(seconds(now));
        }
    }

    fn time_in(&self, index: u8, now: Duration) -> u8 {
        register(&self.cells, index, seconds(now).saturating_add(self.ahead))
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let ahead = self.ahead.to_le_bytes();
        [&[self.index][..], &self.cells.0, &ahead, &[self.flags.pending()]].concat()
    }

    pub(super) fn from_bytes(bytes: &[u8], now: Duration) -> Result<Self> {
        let mut reader = Reader::new("RTC", bytes);
        let [index] = reader.take()?;
        let cells = Cells(reader.take()?);
        let ahead = i64::from_le_bytes(reader.take()?);
        // States of older versions have no flags.
        let [pending] = if reader.is_empty() { [0] } else { reader.take()? };
        reader.end()?;
        Ok(Self { index, cells, ahead, flags: Flags::with(pending, now) })
    }
}
