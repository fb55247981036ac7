//! What a device counts, and how much of it came while a machine's counters were enabled. The
//! device's threads count; any thread reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of a device.
#[derive(Debug, Default)]
pub struct Counts {
    /// Notifications of the driver.
    pub notifications: AtomicU64,
    /// Chains taken from the driver.
    pub taken: AtomicU64,
    /// Chains given back to the driver.
    pub chains: AtomicU64,
    /// Interrupts of the guest.
    pub interrupts: AtomicU64,
    /// Bytes that these chains had for the device.
    pub bytes_from_guest: AtomicU64,
    /// Bytes that the device has written to them.
    pub bytes_to_guest: AtomicU64,
}

/// The values of [`Counts`] at a moment, or how much was added to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountValues {
    /// Notifications of the driver.
    pub notifications: u64,
    /// Chains taken from the driver.
    pub taken: u64,
    /// Chains given back to the driver.
    pub chains: u64,
    /// Interrupts of the guest.
    pub interrupts: u64,
    /// Bytes that these chains had for the device.
    pub bytes_from_guest: u64,
    /// Bytes that the device has written to them.
    pub bytes_to_guest: u64,
}

impl Counts {
    /// The values now.
    #[must_use]
    pub fn values(&self) -> CountValues {
        // Relaxed: each is a count by itself.
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CountValues {
            notifications: of(&self.notifications),
            taken: of(&self.taken),
            chains: of(&self.chains),
            interrupts: of(&self.interrupts),
            bytes_from_guest: of(&self.bytes_from_guest),
            bytes_to_guest: of(&self.bytes_to_guest),
        }
    }

    /// Set them to zero.
    pub(super) fn clear(&self) {
        let Self { notifications, taken, chains, interrupts, bytes_from_guest, bytes_to_guest } =
            self;
        for count in [notifications, taken, chains, interrupts, bytes_from_guest, bytes_to_guest] {
            count.store(0, Ordering::Relaxed);
        }
    }
}

impl CountValues {
    fn with(self, other: Self, f: fn(u64, u64) -> u64) -> Self {
        Self {
            notifications: f(self.notifications, other.notifications),
            taken: f(self.taken, other.taken),
            chains: f(self.chains, other.chains),
            interrupts: f(self.interrupts, other.interrupts),
            bytes_from_guest: f(self.bytes_from_guest, other.bytes_from_guest),
            bytes_to_guest: f(self.bytes_to_guest, other.bytes_to_guest),
        }
    }
}

/// A device as the counters have it.
#[derive(Debug)]
struct Counted {
    name: String,
    counts: Arc<Counts>,
    /// The values when the counters were enabled; None while they are not.
    since: Option<CountValues>,
    /// What was counted before.
    before: CountValues,
}

impl Counted {
    fn values(&self) -> CountValues {
        // A chain that was given back untouched is taken back from its count.
        let added = |since| self.counts.values().with(since, u64::saturating_sub);
        let now = self.since.map(added).unwrap_or_default();
        self.before.with(now, u64::saturating_add)
    }
}

/// What the devices of a machine have counted between `enable` and `disable`. Costs the devices
/// nothing, and is kept when they are closed.
#[derive(Debug, Default)]
pub struct DeviceStats(Vec<Counted>);

impl DeviceStats {
    /// For these devices, disabled.
    #[must_use]
    pub fn new(devices: impl IntoIterator<Item = (String, Arc<Counts>)>) -> Self {
        let counted =
            |(name, counts)| Counted { name, counts, since: None, before: CountValues::default() };
        Self(devices.into_iter().map(counted).collect())
    }

    /// Start to count, if this is not done already.
    pub fn enable(&mut self) {
        for device in &mut self.0 {
            device.since.get_or_insert_with(|| device.counts.values());
        }
    }

    /// Stop counting, and keep the counts.
    pub fn disable(&mut self) {
        for device in &mut self.0 {
            (device.before, device.since) = (device.values(), None);
        }
    }

    /// Set all counts to zero.
    pub fn reset(&mut self) {
        for device in &mut self.0 {
            device.before = CountValues::default();
            device.since = device.since.map(|_| device.counts.values());
        }
    }

    /// The counts of each device, by name, in the order of the devices.
    #[must_use]
    pub fn rows(&self) -> Vec<(String, CountValues)> {
        self.0.iter().map(|device| (device.name.clone(), device.values())).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn only_what_comes_while_they_are_enabled_is_counted() {
        let counts = Arc::new(Counts::default());
        let mut stats = DeviceStats::new([("rng".to_owned(), Arc::clone(&counts))]);
        let add = |number| {
            counts.chains.fetch_add(number, Relaxed);
        };
        let chains = |stats: &DeviceStats| stats.rows()[0].1.chains;
        add(1);
        assert_eq!(chains(&stats), 0);
        stats.enable();
        add(2);
        stats.enable();
        add(4);
        assert_eq!(chains(&stats), 6);
        stats.disable();
        stats.disable();
        add(8);
        assert_eq!(chains(&stats), 6);
        stats.enable();
        add(16);
        assert_eq!(chains(&stats), 22);
        stats.reset();
        assert_eq!(stats.rows(), [("rng".to_owned(), CountValues::default())]);
        add(32);
        assert_eq!(chains(&stats), 32);
        stats.disable();
        stats.reset();
        add(64);
        assert_eq!(chains(&stats), 0);
    }

    #[test]
    fn a_chain_that_is_given_back_untouched_makes_no_count_negative() {
        let counts = Arc::new(Counts::default());
        let mut stats = DeviceStats::new([("net0".to_owned(), Arc::clone(&counts))]);
        counts.taken.fetch_add(1, Relaxed);
        stats.enable();
        counts.taken.fetch_sub(1, Relaxed);
        assert_eq!(stats.rows()[0].1.taken, 0);
    }
}
