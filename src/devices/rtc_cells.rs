//! The cells of the real-time clock's CMOS RAM: their numbers, and what the firmware leaves in
//! them. Pure data.

use crate::layout;

pub(super) const SECONDS: u8 = 0x00;
pub(super) const ALARM_SECONDS: u8 = 0x01;
pub(super) const MINUTES: u8 = 0x02;
pub(super) const ALARM_MINUTES: u8 = 0x03;
pub(super) const HOURS: u8 = 0x04;
pub(super) const ALARM_HOURS: u8 = 0x05;
pub(super) const WEEKDAY: u8 = 0x06;
pub(super) const DAY: u8 = 0x07;
pub(super) const MONTH: u8 = 0x08;
pub(super) const YEAR: u8 = 0x09;
pub(super) const STATUS_A: u8 = 0x0a;
pub(super) const STATUS_B: u8 = 0x0b;
pub(super) const STATUS_C: u8 = 0x0c;
pub(super) const STATUS_D: u8 = 0x0d;
pub(super) const CENTURY: u8 = 0x32;
/// The time registers.
pub(super) const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

/// Status A after a reset: the 32 kHz crystal, 1,024 Hz.
pub(super) const OSCILLATOR: u8 = 0x26;
/// Status B: the clock is stopped so that it can be set.
pub(super) const SET: u8 = 0x80;
pub(super) const UPDATE_INTERRUPT: u8 = 0x10;
pub(super) const BINARY: u8 = 0b100;
pub(super) const HOURS_24: u8 = 0b10;
/// In an hour of the format with twelve hours.
pub(super) const AFTERNOON: u8 = 0x80;
#[cfg(test)]
pub(super) const MODES: [u8; 4] = [0, BINARY, HOURS_24, HOURS_24 | BINARY];

/// An x87, and a display that its own firmware describes.
const EQUIPMENT: (u8, u8) = (0x14, 0b10);
/// Sizes of memory, as 16-bit values: their cells, the size of a unit, and where they begin.
const BASE_MEMORY_KIB: u8 = 0x15;
const EXTENDED_MEMORY_KIB: [u8; 2] = [0x17, 0x30];
const ABOVE_16_MIB: u8 = 0x34;
const ABOVE_4_GIB: u8 = 0x5b;
/// The number of the last processor.
const LAST_VCPU: u8 = 0x5f;
/// The checksum, most significant byte first, and the cells that it is of.
const CHECKSUM: u8 = 0x2e;
const CHECKED: std::ops::Range<u8> = 0x10..0x2e;

/// The cells. Those of the time are valid only while the clock is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cells(pub(super) [u8; 128]);

impl Default for Cells {
    fn default() -> Self {
        let mut cells = Self([0; 128]);
        cells.set(STATUS_A, OSCILLATOR);
        cells.set(STATUS_B, HOURS_24);
        cells
    }
}

impl Cells {
    /// As firmware leaves them on a machine with this much memory and this many vCPUs.
    pub(super) fn of_machine(memory: u64, vcpus: u64) -> Self {
        let mut cells = Self::default();
        let [below, above] = match *layout::ram_ranges(memory) {
            [(_, below)] => [below, 0],
            [(_, below), (_, above), ..] => [below, above],
            [] => [0; 2],
        };
        cells.set(EQUIPMENT.0, EQUIPMENT.1);
        cells.set_word(BASE_MEMORY_KIB, below.min(640 << 10) >> 10);
        for cell in EXTENDED_MEMORY_KIB {
            cells.set_word(cell, below.saturating_sub(1 << 20) >> 10);
        }
        cells.set_word(ABOVE_16_MIB, below.saturating_sub(16 << 20) >> 16);
        let [low, middle, high, ..] = (above >> 16).min(0xff_ffff).to_le_bytes();
        for (cell, value) in (ABOVE_4_GIB..).zip([low, middle, high]) {
            cells.set(cell, value);
        }
        cells.set(LAST_VCPU, u8::try_from(vcpus.saturating_sub(1)).unwrap_or(u8::MAX));
        let sum = CHECKED.map(|cell| u16::from(cells.get(cell))).sum::<u16>();
        let [high, low] = sum.to_be_bytes();
        cells.set(CHECKSUM, high);
        cells.set(CHECKSUM + 1, low);
        cells
    }

    pub(super) fn get(&self, index: u8) -> u8 {
        self.0.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    pub(super) fn set(&mut self, index: u8, value: u8) {
        if let Some(cell) = self.0.get_mut(usize::from(index)) {
            *cell = value;
        }
    }

    /// Two cells, the less significant first. A larger value is shown as the largest.
    fn set_word(&mut self, index: u8, value: u64) {
        let [low, high] = u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
        self.set(index, low);
        self.set(index + 1, high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_finds_the_size_of_memory() {
        let word = |cells: &Cells, at| u16::from_le_bytes([cells.get(at), cells.get(at + 1)]);
        let words = |memory| {
            let cells = Cells::of_machine(memory, 2);
            [0x15, 0x17, 0x30, 0x34, 0x5b].map(|at| word(&cells, at))
        };
        assert_eq!(words(512 << 10), [512, 0, 0, 0, 0]);
        assert_eq!(words(2 << 20), [640, 1024, 1024, 0, 0]);
        assert_eq!(words(128 << 20), [640, 0xffff, 0xffff, 112 * 16, 0]);
        assert_eq!(words(5 << 30), [640, 0xffff, 0xffff, 0xbf00, 0x8000]);
        let cells = Cells::of_machine(2 << 20, 3);
        let sum = (0x10..0x2e).map(|cell| u16::from(cells.get(cell))).sum::<u16>();
        assert_eq!((word(&cells, 0x2e).swap_bytes(), cells.get(0x5f)), (sum, 2));
        assert_eq!((cells.get(STATUS_A), cells.get(STATUS_B)), (OSCILLATOR, HOURS_24));
    }
}
