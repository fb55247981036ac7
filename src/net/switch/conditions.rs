//! What a link does to the frames that pass it. Pure data.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// The conditions of a link. The default is a perfect one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// How long a frame takes.
    pub delay: Duration,
    /// By how much the delay varies, in both directions. Frames keep their order.
    pub jitter: Duration,
    /// The probability that a frame is lost.
    pub loss: f64,
    /// The probability that a frame arrives twice.
    pub duplicate: f64,
    /// The probability that the next frame overtakes a frame.
    pub reorder: f64,
    /// Bits per second; 0 means no limit.
    pub bandwidth: u64,
    /// How long a frame may wait for bandwidth before it is dropped.
    pub backlog: Duration,
}

/// Longer delays are mistakes, and sums of three stay far below the end of the clock.
const LONGEST: Duration = Duration::from_secs(3600);

impl Default for Conditions {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            bandwidth: 0,
            backlog: Duration::from_secs(1),
        }
    }
}

impl Conditions {
    /// Whether a frame passes at once and unchanged.
    pub(super) fn are_perfect(&self) -> bool {
        let Self { delay, jitter, loss, duplicate, reorder, bandwidth, backlog: _ } = self;
        let times = *delay + *jitter;
        times.is_zero() && *bandwidth == 0 && *loss + *duplicate + *reorder == 0.0
    }

    /// # Errors
    /// [`ErrorKind::Config`] if a value is out of range; the error names it.
    pub fn check(&self) -> Result<()> {
        for (name, value) in
            [("loss", self.loss), ("duplicate", self.duplicate), ("reorder", self.reorder)]
        {
            if !(0.0..=1.0).contains(&value) {
                return Err(refused(name, &format!("{value} is not a probability from 0 to 1")));
            }
        }
        for (name, value) in
            [("delay", self.delay), ("jitter", self.jitter), ("backlog", self.backlog)]
        {
            if value > LONGEST {
                return Err(refused(name, "more than 3600 seconds are too long"));
            }
        }
        Ok(())
    }
}

fn refused(name: &str, detail: &str) -> Error {
    Error::new(ErrorKind::Config, name, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_named() {
        let at = |conditions: Conditions| conditions.check().unwrap_err().at;
        let long = LONGEST + Duration::from_nanos(1);
        let perfect = Conditions::default();
        assert!(perfect.check().is_ok() && perfect.are_perfect());
        assert_eq!(at(Conditions { loss: 1.5, ..perfect }), "loss");
        assert_eq!(at(Conditions { duplicate: f64::NAN, ..perfect }), "duplicate");
        assert_eq!(at(Conditions { reorder: -0.1, ..perfect }), "reorder");
        assert_eq!(at(Conditions { delay: long, ..perfect }), "delay");
        assert_eq!(at(Conditions { jitter: long, ..perfect }), "jitter");
        assert_eq!(at(Conditions { backlog: long, ..perfect }), "backlog");
        assert!(!Conditions { loss: 0.1, ..perfect }.are_perfect());
        assert!(!Conditions { jitter: LONGEST, ..perfect }.are_perfect());
        assert!(!Conditions { bandwidth: 1, ..perfect }.are_perfect());
    }
}
