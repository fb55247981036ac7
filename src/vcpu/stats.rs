//! Counts a machine's exits by kind, port and address, and the time of its vCPUs inside and outside
//! the guest. Each vCPU counts on its own thread in a separate block; any thread may read.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::exit::{ExitKind, VcpuExit};
use super::router::{AnsweredExit, ExitRouter, Observer};
use crate::error::Result;
use crate::process::ProcessTag;
use crate::sync::{Mutex, rank};
use crate::virtio::{CountValues, DeviceStats};

/// A guest can access any number of addresses. For each vCPU, only this many keys are counted
/// separately.
const MAX_PLACES: usize = 1024;

/// The key by which exits are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExitKey {
    /// The name of the kind of exit; "interrupted" for a kick or another signal.
    pub kind: &'static str,
    /// "read" or "write", for an access to a port, an address or a register.
    pub access: Option<&'static str>,
    /// The port, address or register.
    pub address: Option<u64>,
}

impl ExitKey {
    /// The key of this exit.
    #[must_use]
    pub fn of(exit: &VcpuExit) -> Self {
        let address = exit.place();
        let access = match exit.kind() {
            Some(ExitKind::Io | ExitKind::Mmio | ExitKind::Msr) => {
                address.map(|(_, is_write)| if is_write { "write" } else { "read" })
            }
            _ => None,
        };
        let kind = exit.kind().map_or("interrupted", ExitKind::name);
        Self { kind, access, address: address.map(|(address, _)| address) }
    }

    /// The key of exits beyond the limit on keys.
    const OTHER: Self = Self { kind: "other", access: None, address: None };
}

/// The number of exits, and the time that it took to answer them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// The number of exits.
    pub count: u64,
    /// The time from leaving the guest to having the answer.
    pub time: Duration,
}

impl Count {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time += time;
    }
}

/// The exits and times of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuTime {
    /// Its number.
    pub vcpu: u64,
    /// The number of exits.
    pub exits: u64,
    /// Time inside the guest, including a current stay.
    pub guest: Duration,
    /// Time outside the guest, to answer exits.
    pub host: Duration,
}

/// The counters of one vCPU, on separate cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Block(Mutex<Counts, rank::ExitCounts>);

#[derive(Debug, Default)]
struct Counts {
    exits: u64,
    guest: Duration,
    host: Duration,
    /// When the guest was entered, if this stay is counted.
    inside: Option<Instant>,
    places: HashMap<ExitKey, Count>,
    others: Count,
}

impl Counts {
    /// Add the time inside up to now.
    fn add_time_inside(&mut self) {
        if let Some(since) = &mut self.inside {
            let now = Instant::now();
            self.guest += now.saturating_duration_since(*since);
            *since = now;
        }
    }
}

/// Whether they count, and what the virtio devices have counted meanwhile.
#[derive(Debug)]
struct Switch {
    is_enabled: bool,
    devices: DeviceStats,
}

/// The counters of one machine.
#[derive(Debug)]
pub struct Stats {
    vcpus: Vec<Block>,
    switch: Mutex<Switch, rank::StatsSwitch>,
    process_tag: ProcessTag,
}

impl Stats {
    /// Counters for this many vCPUs and these virtio devices, disabled.
    #[must_use]
    pub fn new(vcpus: u64, devices: DeviceStats) -> Self {
        let vcpus = (0..vcpus).map(|_| Block::default()).collect();
        let switch = Mutex::new(Switch { is_enabled: false, devices });
        Self { vcpus, switch, process_tag: ProcessTag::current() }
    }

    /// The number of the machine's vCPUs.
    #[must_use]
    pub fn vcpu_count(&self) -> u64 {
        self.vcpus.len() as u64
    }

    /// Start to count, with each vCPU's next entry, and the devices at once.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] in a forked child, here and below.
    pub fn enable(self: &Arc<Self>, router: &ExitRouter) -> Result<()> {
        self.process_tag.check("machine")?;
        let mut switch = self.switch.lock();
        switch.devices.enable();
        if !std::mem::replace(&mut switch.is_enabled, true) {
            router.observe(Arc::clone(self) as Arc<dyn Observer>);
        }
        Ok(())
    }

    /// Stop counting and keep the counts.
    ///
    /// # Errors
    /// As for `enable`.
    pub fn disable(self: &Arc<Self>, router: &ExitRouter) -> Result<()> {
        self.process_tag.check("machine")?;
        let mut switch = self.switch.lock();
        switch.devices.disable();
        if std::mem::replace(&mut switch.is_enabled, false) {
            router.unobserve(&(Arc::clone(self) as Arc<dyn Observer>));
            for block in &self.vcpus {
                let mut counts = block.0.lock();
                counts.add_time_inside();
                counts.inside = None;
            }
        }
        Ok(())
    }

    /// Whether counting is enabled.
    ///
    /// # Errors
    /// As for `enable`.
    pub fn is_enabled(&self) -> Result<bool> {
        self.process_tag.check("machine")?;
        Ok(self.switch.lock().is_enabled)
    }

    /// Set all counts to zero.
    ///
    /// # Errors
    /// As for `enable`.
    pub fn reset(&self) -> Result<()> {
        self.process_tag.check("machine")?;
        self.switch.lock().devices.reset();
        for block in &self.vcpus {
            let mut counts = block.0.lock();
            let inside = counts.inside.map(|_| Instant::now());
            *counts = Counts { inside, ..Counts::default() };
        }
        Ok(())
    }

    /// The exits of each vCPU by key, the most frequent first.
    ///
    /// # Errors
    /// As for `enable`.
    pub fn exits(&self) -> Result<Vec<(u64, ExitKey, Count)>> {
        self.process_tag.check("machine")?;
        let mut rows = Vec::new();
        for (vcpu, block) in (0..).zip(&self.vcpus) {
            let counts = block.0.lock();
            rows.extend(counts.places.iter().map(|(place, count)| (vcpu, *place, *count)));
            if counts.others.count > 0 {
                rows.push((vcpu, ExitKey::OTHER, counts.others));
            }
        }
        rows.sort_unstable_by_key(|(vcpu, place, count)| {
            (std::cmp::Reverse(count.count), *vcpu, *place)
        });
        Ok(rows)
    }

    /// The counts of each virtio device, by name.
    ///
    /// # Errors
    /// As for `enable`.
    pub fn devices(&self) -> Result<Vec<(String, CountValues)>> {
        self.process_tag.check("machine")?;
        Ok(self.switch.lock().devices.rows())
    }

    /// The time of each vCPU, by number.
    ///
    /// # Errors
    /// As for `enable`.
    pub fn vcpus(&self) -> Result<Vec<VcpuTime>> {
        self.process_tag.check("machine")?;
        let times = (0..).zip(&self.vcpus).map(|(vcpu, block)| {
            let mut counts = block.0.lock();
            counts.add_time_inside();
            VcpuTime { vcpu, exits: counts.exits, guest: counts.guest, host: counts.host }
        });
        Ok(times.collect())
    }

    fn with(&self, vcpu: u64, change: impl FnOnce(&mut Counts)) {
        // In a forked child, a thread that does not exist there may hold the lock.
        if self.process_tag.is_forked_child() {
            return;
        }
        let block = usize::try_from(vcpu).ok().and_then(|vcpu| self.vcpus.get(vcpu));
        if let Some(block) = block {
            change(&mut block.0.lock());
        }
    }
}

impl Observer for Stats {
    fn before_entry(&self, vcpu: u64, at: Instant) {
        self.with(vcpu, |counts| counts.inside = Some(at));
    }

    fn after_exit(&self, seen: &AnsweredExit) {
        self.with(seen.vcpu, |counts| {
            // `None` if counting began during this stay in the guest.
            if let Some(since) = counts.inside.take() {
                counts.guest += seen.left.saturating_duration_since(since);
            }
            let time = seen.answered.saturating_duration_since(seen.left);
            counts.exits += 1;
            counts.host += time;
            let place = ExitKey::of(seen.exit);
            let room = counts.places.len() < MAX_PLACES || place.address.is_none();
            match counts.places.get_mut(&place) {
                Some(count) => count.add(time),
                None if room => counts.places.entry(place).or_default().add(time),
                None => counts.others.add(time),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn see(stats: &Stats, vcpu: u64, exit: &VcpuExit, (inside_us, outside_us): (u64, u64)) {
        let entered = Instant::now();
        let left = entered + Duration::from_micros(inside_us);
        let answered = left + Duration::from_micros(outside_us);
        stats.before_entry(vcpu, entered);
        stats.after_exit(&AnsweredExit { vcpu, exit, entered, left, answered });
    }

    fn port(port: u16) -> VcpuExit {
        VcpuExit::IoIn { port, size: 1, count: 1 }
    }

    #[test]
    fn exits_are_told_apart_by_kind_direction_and_address() {
        let stats = Stats::new(2, DeviceStats::default());
        see(&stats, 0, &port(0x60), (3, 5));
        see(&stats, 0, &port(0x60), (4, 6));
        see(&stats, 1, &VcpuExit::Hlt, (1, 2));
        see(&stats, 1, &VcpuExit::Interrupted, (1, 0));
        let rows = stats.exits().unwrap();
        let read = ExitKey { kind: "io", access: Some("read"), address: Some(0x60) };
        assert_eq!(rows[0], (0, read, Count { count: 2, time: Duration::from_micros(11) }));
        let kinds: Vec<&str> = rows.iter().map(|(_, place, _)| place.kind).collect();
        assert_eq!(kinds, ["io", "hlt", "interrupted"]);
        let times = stats.vcpus().unwrap();
        let (guest, host) = (Duration::from_micros(7), Duration::from_micros(11));
        assert_eq!(times[0], VcpuTime { vcpu: 0, exits: 2, guest, host });
        assert_eq!(times[1].exits, 2);
        stats.reset().unwrap();
        assert!(stats.exits().unwrap().is_empty());
    }

    #[test]
    fn places_are_bounded_and_the_rest_is_summed_up() {
        let stats = Stats::new(1, DeviceStats::default());
        (0..2000).for_each(|number| see(&stats, 0, &port(number), (1, 1)));
        see(&stats, 0, &VcpuExit::Hlt, (1, 1));
        let rows = stats.exits().unwrap();
        assert_eq!(rows.len(), MAX_PLACES + 2);
        assert_eq!((rows[0].1, rows[0].2.count), (ExitKey::OTHER, 2000 - 1024));
        assert!(rows.iter().any(|(_, place, _)| place.kind == "hlt"));
    }

    #[test]
    fn a_stay_that_lasts_is_counted_and_ends_with_the_counting() {
        let (stats, router) =
            (Arc::new(Stats::new(1, DeviceStats::default())), ExitRouter::default());
        stats.enable(&router).unwrap();
        let long_ago = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
        stats.before_entry(0, long_ago);
        assert!(stats.vcpus().unwrap()[0].guest >= Duration::from_secs(5));
        stats.disable(&router).unwrap();
        let before = stats.vcpus().unwrap();
        assert_eq!(stats.vcpus().unwrap(), before);
        // Its exit comes after counting is enabled again, so its time is unknown.
        stats.enable(&router).unwrap();
        let now = Instant::now();
        let exit = VcpuExit::Hlt;
        stats.after_exit(&AnsweredExit {
            vcpu: 0,
            exit: &exit,
            entered: long_ago,
            left: now,
            answered: now,
        });
        assert_eq!(stats.vcpus().unwrap()[0].guest, before[0].guest);
    }

    #[test]
    fn enabling_twice_counts_once() {
        let (stats, router) =
            (Arc::new(Stats::new(1, DeviceStats::default())), ExitRouter::default());
        assert!(!stats.is_enabled().unwrap());
        stats.enable(&router).unwrap();
        stats.enable(&router).unwrap();
        let now = Instant::now();
        let exit = &VcpuExit::Hlt;
        let answered = AnsweredExit { vcpu: 0, exit, entered: now, left: now, answered: now };
        router.after_exit(&answered);
        stats.disable(&router).unwrap();
        router.after_exit(&answered);
        assert_eq!(stats.vcpus().unwrap()[0].exits, 1);
    }
}
