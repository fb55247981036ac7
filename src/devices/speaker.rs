//! Port 0x61 of a machine without a PIT: the gate of timer 2, its output, and the refresh toggle.
//! Where there is a PIT, KVM answers this port. There are no locks here; `i8042.rs` has one.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const GATE: u8 = 1 << 0;
/// The gate and the speaker.
const WRITABLE: u8 = 0b11;
const REFRESH: u8 = 1 << 4;
const OUTPUT: u8 = 1 << 5;

/// The refresh bit changes with each row of memory that is refreshed.
const REFRESH_PERIOD_US: u128 = 15;
/// The longest count of timer 2. No timer is programmed here, so a guest that waits for its output
/// waits this long.
const LONGEST_COUNT: Duration = Duration::from_micros(54_925);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Speaker {
    control: u8,
    /// When the gate opened.
    since: Option<Instant>,
}

impl Default for Speaker {
    fn default() -> Self {
        Self::with(0)
    }
}

impl PartialEq for Speaker {
    /// Without the time.
    fn eq(&self, other: &Self) -> bool {
        self.control == other.control
    }
}

impl Eq for Speaker {}

impl Speaker {
    /// With these bits written just now.
    pub(super) fn with(control: u8) -> Self {
        let mut speaker = Self { control: 0, since: None };
        speaker.write(control);
        speaker
    }

    /// What has been written.
    pub(super) fn control(&self) -> u8 {
        self.control
    }

    pub(super) fn write(&mut self, value: u8) {
        match (self.control & GATE != 0, value & GATE != 0) {
            (false, true) => self.since = Some(Instant::now()),
            (_, false) => self.since = None,
            (true, true) => {}
        }
        self.control = value & WRITABLE;
    }

    pub(super) fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let refresh =
            if (now.as_micros() / REFRESH_PERIOD_US).is_multiple_of(2) { 0 } else { REFRESH };
        let is_over = self.since.is_some_and(|since| since.elapsed() >= LONGEST_COUNT);
        self.control | refresh | if is_over { OUTPUT } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read until a bit is this.
    fn wait_for(speaker: &Speaker, bit: u8, is_set: bool) {
        while (speaker.read() & bit != 0) != is_set {}
    }

    #[test]
    fn what_a_guest_waits_for_comes() {
        let mut speaker = Speaker::default();
        assert_eq!(speaker.read() & !REFRESH, 0);
        wait_for(&speaker, REFRESH, true);
        wait_for(&speaker, REFRESH, false);
        speaker.write(0xff);
        assert_eq!(speaker.read() & WRITABLE, WRITABLE);
        wait_for(&speaker, OUTPUT, true);
        speaker.write(0);
        assert_eq!(speaker.read() & OUTPUT, 0, "the gate is closed");
    }
}
