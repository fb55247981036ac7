//! One direction of a link: its conditions, and what they do to each frame. Pure data; the time
//! comes from the caller.

use std::num::NonZero;
use std::time::Duration;

use super::conditions::Conditions;
use super::random::Draws;

/// A time of CLOCK_MONOTONIC in nanoseconds.
pub(super) type Nanos = u64;

/// A stretch that frames pass in one direction.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    /// The network's seed and the ends: what distinguishes this lane's decisions from others.
    seed: u64,
    ends: [u64; 3],
    pub(super) conditions: Conditions,
    /// How often the conditions were set.
    settings: u64,
    /// The frames since then.
    frames: u64,
    /// Until when the frames before occupy the bandwidth.
    busy_until: Nanos,
}

/// What has become of a frame so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passage {
    /// When it arrives.
    pub(super) at: Nanos,
    /// How many more times.
    pub(super) copies: u8,
    /// Whether the next frame overtakes it.
    pub(super) is_overtaken: bool,
}

/// Why a frame did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// By chance.
    Lost,
    /// It would have waited too long for bandwidth.
    OverBandwidth,
}

impl Passage {
    pub(super) fn starting(now: Nanos) -> Self {
        Self { at: now, copies: 0, is_overtaken: false }
    }
}

pub(super) fn nanos(time: Duration) -> Nanos {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Lane {
    pub(super) fn new(seed: u64, ends: [u64; 3]) -> Self {
        let conditions = Conditions::default();
        Self { seed, ends, conditions, settings: 0, frames: 0, busy_until: 0 }
    }

    /// Change the conditions. The frames are counted anew.
    pub(super) fn set(&mut self, conditions: Conditions) {
        self.conditions = conditions;
        self.settings += 1;
        self.frames = 0;
    }

    /// A frame of this many bytes enters at the time of its passage so far.
    #[inline]
    pub(super) fn pass(&mut self, passage: Passage, length: usize) -> Result<Passage, Loss> {
        if self.conditions.are_perfect() { Ok(passage) } else { self.decide(passage, length) }
    }

    fn decide(&mut self, passage: Passage, length: usize) -> Result<Passage, Loss> {
        let Conditions { delay, jitter, loss, duplicate, reorder, bandwidth, backlog } =
            self.conditions;
        let [kind, from, to] = self.ends;
        let mut draws = Draws::new(self.seed, &[kind, from, to, self.settings, self.frames]);
        self.frames += 1;
        // Always all four, in this order: a change of one condition leaves the others' decisions.
        let is_lost = draws.happens(loss);
        let copies = u8::from(draws.happens(duplicate));
        let is_overtaken = draws.happens(reorder);
        let variation = jitter.mul_f64(2.0 * draws.fraction());
        if is_lost {
            return Err(Loss::Lost);
        }
        let mut at = passage.at;
        if let Some(bandwidth) = NonZero::new(bandwidth) {
            let start = at.max(self.busy_until);
            if start - at > nanos(backlog) {
                return Err(Loss::OverBandwidth);
            }
            let bits = u64::try_from(length).unwrap_or(u64::MAX).saturating_mul(8);
            at = start.saturating_add(bits.saturating_mul(1_000_000_000) / bandwidth);
            self.busy_until = at;
        }
        let delay = (delay + variation).saturating_sub(jitter);
        Ok(Passage {
            at: at.saturating_add(nanos(delay)),
            copies: passage.copies + copies,
            is_overtaken: passage.is_overtaken || is_overtaken,
        })
    }

    /// The same lane of a copy of the network, at another time.
    pub(super) fn moved(&self, shift: impl Fn(Nanos) -> Nanos) -> Self {
        Self { busy_until: shift(self.busy_until), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    fn lane(conditions: Conditions) -> Lane {
        let mut lane = Lane::new(1, [0, 0, 1]);
        lane.set(conditions);
        lane
    }

    fn fates(lane: &mut Lane) -> Vec<Result<Passage, Loss>> {
        (0..200).map(|_| lane.pass(Passage::starting(0), 100)).collect()
    }

    #[test]
    fn a_perfect_lane_does_nothing() {
        let passage = Passage { at: 5, copies: 1, is_overtaken: true };
        assert_eq!(Lane::new(1, [0; 3]).pass(passage, 1), Ok(passage));
    }

    #[test]
    fn the_decisions_repeat_and_each_is_independent_of_other_conditions() {
        let loss = Conditions { loss: 0.3, ..Conditions::default() };
        let both = Conditions { duplicate: 0.5, delay: Duration::from_millis(1), ..loss };
        let lost = |fates: Vec<Result<Passage, Loss>>| {
            fates.iter().map(|fate| fate.is_err()).collect::<Vec<_>>()
        };
        let first = lost(fates(&mut lane(loss)));
        assert_eq!(lost(fates(&mut lane(loss))), first);
        assert_eq!(lost(fates(&mut lane(both))), first);
        assert!((30..90).contains(&first.iter().filter(|lost| **lost).count()));
        let mut again = lane(loss);
        again.set(loss);
        assert_ne!(lost(fates(&mut again)), first, "set again: other decisions");
    }

    #[test]
    fn a_delay_varies_by_the_jitter() {
        let [delay, jitter] = [10, 2].map(Duration::from_millis);
        let times: Vec<_> = fates(&mut lane(Conditions { delay, jitter, ..Conditions::default() }))
            .into_iter()
            .map(|fate| fate.unwrap().at)
            .collect();
        assert!(times.iter().all(|at| (8 * MS..=12 * MS).contains(at)));
        assert!(times.iter().any(|at| *at < 9 * MS) && times.iter().any(|at| *at > 11 * MS));
    }

    #[test]
    fn a_bandwidth_spaces_frames_and_drops_what_would_wait_too_long() {
        let backlog = Duration::from_millis(2);
        let mut lane = lane(Conditions { bandwidth: 800_000, backlog, ..Conditions::default() });
        let times: Vec<_> = fates(&mut lane).into_iter().take(5).collect();
        let at = |at| Ok(Passage::starting(at * MS));
        assert_eq!(
            times,
            [at(1), at(2), at(3), Err(Loss::OverBandwidth), Err(Loss::OverBandwidth)]
        );
        assert_eq!(lane.pass(Passage::starting(10 * MS), 100), at(11));
    }
}
