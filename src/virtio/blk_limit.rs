//! Rate limits of a disk: buckets of bytes and of requests that fill with time. A request is let
//! through while there is something in the bucket, and may leave a debt. Pure data.

use std::time::{Duration, Instant};

use crate::config::RateLimits;

const SECOND: i128 = 1_000_000_000;

/// A bucket. What it contains is counted in billionths.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    contents: i128,
    at: Instant,
}

impl Bucket {
    fn new(per_second: u64, now: Instant) -> Self {
        let mut bucket = Self { per_second, contents: 0, at: now };
        bucket.contents = bucket.most();
        bucket
    }

    /// What comes in a tenth of a second, and one at least.
    fn most(&self) -> i128 {
        (i128::from(self.per_second) * SECOND / 10).max(SECOND)
    }

    /// How long it takes until there is something in it.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let passed = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX >> 64);
        let filled = self.contents.saturating_add(passed.saturating_mul(self.per_second.into()));
        self.contents = filled.min(self.most());
        if self.contents > 0 {
            return None;
        }
        let nanoseconds = -self.contents / i128::from(self.per_second.max(1)) + 1;
        Some(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, count: u64) {
        self.contents = self.contents.saturating_sub(i128::from(count) * SECOND);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    pub(super) fn new(limits: RateLimits, now: Instant) -> Self {
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, now));
        Self { bytes: bucket(limits.bytes), operations: bucket(limits.operations) }
    }

    /// Whether there is a limit.
    pub(super) fn limits(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }

    /// Let a request of this many bytes through, or say how long to wait before asking again.
    pub(super) fn admit(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let Self { bytes: of_bytes, operations } = self;
        let waits = [of_bytes.as_mut(), operations.as_mut()];
        let longest = waits.into_iter().flatten().filter_map(|bucket| bucket.wait(now)).max();
        if let Some(longest) = longest {
            return Err(longest);
        }
        of_bytes.iter_mut().for_each(|bucket| bucket.take(bytes));
        operations.iter_mut().for_each(|bucket| bucket.take(1));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_pass_until_the_bucket_is_empty() {
        let start = Instant::now();
        let limits = RateLimits { bytes: None, operations: Some(20) };
        let mut limiter = Limiter::new(limits, start);
        assert_eq!([limiter.admit(9, start), limiter.admit(9, start)], [Ok(()), Ok(())]);
        let wait = limiter.admit(9, start).unwrap_err();
        assert!(wait <= Duration::from_millis(50) + Duration::from_nanos(1));
        let later = start + Duration::from_millis(50) + Duration::from_nanos(1);
        assert_eq!(limiter.admit(9, later), Ok(()));
        assert_eq!(limiter.admit(9, later), Ok(()), "20 billionths are left");
        assert!(limiter.admit(9, start).is_err(), "a clock that goes back gives nothing");
    }

    #[test]
    fn a_request_larger_than_the_bucket_leaves_a_debt() {
        let start = Instant::now();
        let mut limiter = Limiter::new(RateLimits { bytes: Some(1000), operations: None }, start);
        limiter.admit(5100, start).unwrap();
        assert_eq!(limiter.admit(1, start).unwrap_err().as_secs(), 5);
    }

    proptest! {
        #[test]
        fn no_more_passes_than_the_rate_and_a_request(
            rate in 1u64..1_000_000, sizes in prop::collection::vec(1u64..10_000, 1..50),
        ) {
            let start = Instant::now();
            let limits = RateLimits { bytes: Some(rate), operations: None };
            let (mut limiter, mut now) = (Limiter::new(limits, start), start);
            for size in &sizes {
                while let Err(wait) = limiter.admit(*size, now) {
                    now += wait;
                }
            }
            let all: u64 = sizes.iter().sum::<u64>() - sizes.last().unwrap();
            let most = rate as f64 * (now - start).as_secs_f64() + (rate as f64 / 10.0).max(1.0);
            prop_assert!(all as f64 <= most + 1.0, "{all} {most}");
        }
    }
}
