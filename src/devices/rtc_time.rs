//! The time of the real-time clock in the format that status B selects, and its alarm. Pure
//! arithmetic.

use std::time::Duration;

use super::rtc_cells::{
    AFTERNOON, ALARM_HOURS, ALARM_MINUTES, ALARM_SECONDS, BINARY, CENTURY, Cells, DAY, HOURS,
    HOURS_24, MINUTES, MONTH, SECONDS, STATUS_B, WEEKDAY, YEAR,
};

/// From here on, a value of an alarm register matches everything.
const ANY: u8 = 0xc0;
const DAY_S: i64 = 86_400;

/// The value of a time register at a time since 1970.
pub(super) fn register(cells: &Cells, index: u8, seconds: i64) -> u8 {
    let time = utc(seconds);
    let mode = cells.get(STATUS_B);
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
pub(super) fn in_cells(cells: &Cells) -> i64 {
    let [second, minute, day, month, year, century] = [SECONDS, MINUTES, DAY, MONTH, YEAR, CENTURY]
        .map(|index| i32::from(number(cells, cells.get(index))));
    let hour = i32::from(hour(cells, cells.get(HOURS)));
    // SAFETY: an all-zero tm is valid; timegm reads and writes only it, whatever is in it.
    unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        (time.tm_sec, time.tm_min, time.tm_hour) = (second, minute, hour);
        (time.tm_mday, time.tm_mon, time.tm_year) = (day, month - 1, century * 100 + year - 1900);
        libc::timegm(&raw mut time)
    }
}

/// The first second after this one at which the alarm goes off; `None` if it never does.
pub(super) fn next_alarm(cells: &Cells, after: i64) -> Option<i64> {
    let value = |index, convert: fn(&Cells, u8) -> u8| match cells.get(index) {
        ANY.. => None,
        value => Some(i64::from(convert(cells, value))),
    };
    let (hour, minute, second) =
        (value(ALARM_HOURS, hour), value(ALARM_MINUTES, number), value(ALARM_SECONDS, number));
    let matches = |wanted: Option<i64>, value| wanted.is_none_or(|wanted| wanted == value);
    let mut at = after.checked_add(1)?;
    // Each step goes to the next hour, minute or second.
    while at.saturating_sub(after) <= DAY_S {
        let of_day = at.rem_euclid(DAY_S);
        let step = if !matches(hour, of_day / 3600) {
            3600 - of_day % 3600
        } else if !matches(minute, of_day / 60 % 60) {
            60 - of_day % 60
        } else if !matches(second, of_day % 60) {
            1
        } else {
            return Some(at);
        };
        at = at.checked_add(step)?;
    }
    None
}

fn number(cells: &Cells, value: u8) -> u8 {
    match cells.get(STATUS_B) & BINARY {
        0 => (value >> 4) * 10 + (value & 15),
        _ => value,
    }
}

fn hour(cells: &Cells, value: u8) -> u8 {
    if cells.get(STATUS_B) & HOURS_24 != 0 {
        return number(cells, value);
    }
    let half = if value & AFTERNOON == 0 { 0 } else { 12 };
    number(cells, value & !AFTERNOON) % 12 + half
}

pub(super) fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
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
    use super::super::rtc_cells::MODES;
    use super::*;
    use proptest::prelude::*;

    fn cells(mode: u8, alarm: [u8; 3]) -> Cells {
        let mut cells = Cells::default();
        cells.set(STATUS_B, mode);
        let places = [ALARM_HOURS, ALARM_MINUTES, ALARM_SECONDS];
        places.into_iter().zip(alarm).for_each(|(index, value)| cells.set(index, value));
        cells
    }

    #[test]
    fn alarms_with_values_that_do_not_matter() {
        let at = |alarm, after| next_alarm(&cells(HOURS_24, alarm), after);
        assert_eq!(at([0x10, 0x20, 0x30], 0), Some(10 * 3600 + 20 * 60 + 30));
        assert_eq!(at([0, 0, 0], 0), Some(DAY_S), "a day later");
        assert_eq!(at([0xff, 0xc0, 0xee], 77), Some(78));
        assert_eq!(at([0xff, 0x05, 0x00], 301), Some(3900));
        assert_eq!(at([0x25, 0, 0], 0), None, "a day has no such hour");
        assert_eq!(next_alarm(&cells(BINARY, [1 | AFTERNOON, 0, 0]), 0), Some(13 * 3600));
    }

    proptest! {
        #[test]
        fn the_next_alarm_shows_what_the_registers_say(
            mode in 0usize..4, after in 0i64..4_000_000_000, ahead in 1..=DAY_S,
            any in any::<[bool; 3]>(),
        ) {
            let mut cells = cells(MODES[mode], [ANY; 3]);
            let registers = [(ALARM_HOURS, HOURS), (ALARM_MINUTES, MINUTES), (ALARM_SECONDS, SECONDS)];
            for ((alarm, shown), is_any) in registers.into_iter().zip(any) {
                let value = register(&cells, shown, after + ahead);
                cells.set(alarm, if is_any { ANY | value } else { value });
            }
            let found = next_alarm(&cells, after).unwrap();
            prop_assert!(after < found && found <= after + ahead);
            for (alarm, shown) in registers {
                let wanted = cells.get(alarm);
                prop_assert!(wanted >= ANY || wanted == register(&cells, shown, found));
            }
        }
    }
}
