//! The memory balloon (virtio 1.2, 5.5): the driver gives pages to the device, whose memory the
//! host gets back, and reports pages that are free. On the loop's thread; any thread sets the
//! target.

use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::access::QueueAccess;
use super::buffers::ChainReader;
use super::chain::Chain;
use super::device::{VirtioDevice, read_space};
use super::queues::Queues;
use crate::bytes::Reader;
use crate::config::BalloonConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Expiry, TimerFd};
use crate::sync::{Mutex, rank};

// Feature bits.
const STATS_VQ: u32 = 1;
const DEFLATE_ON_OOM: u32 = 2;
const REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The statistics, if the driver has accepted them; free pages are reported in the next queue.
const THIRD: usize = 2;
const PAGES_PER_MIB: u32 = 256;
/// A driver puts 256 page numbers into a chain; no more than this are read at once.
const MOST: usize = 64 << 10;
/// A statistic: its tag and its value.
const STATISTIC: usize = 10;
/// More are not kept.
const MAX_STATISTICS: usize = 64;

#[derive(Debug, Default)]
struct State {
    /// In pages: what the host wants, and what the driver says it has given.
    target: u32,
    actual: u32,
    /// The driver's buffer, which is given back to ask for new statistics.
    statistics_chain: Option<Chain>,
    /// Tags and values.
    statistics: Vec<(u16, u64)>,
    queues: Option<Arc<Queues>>,
}

/// See the module.
#[derive(Debug)]
pub struct Balloon {
    config: BalloonConfig,
    /// Expires when new statistics are due.
    timer: Option<TimerFd>,
    state: Mutex<State, rank::VirtioDevice>,
}

const fn bit(number: u32) -> u64 {
    1 << number
}

impl Balloon {
    /// A balloon with the target of the configuration.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn new(config: BalloonConfig) -> Result<Self> {
        let failed = |e| Error::os(ErrorKind::Event, "timerfd", &e);
        let timer = match config.statistics {
            Some(_) => Some(TimerFd::new().map_err(failed)?),
            None => None,
        };
        let target = config.target_mib.saturating_mul(PAGES_PER_MIB);
        let state = Mutex::new(State { target, ..State::default() });
        Ok(Self { config, timer, state })
    }

    pub(super) fn from_spec(spec: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("balloon", spec);
        let target_mib = reader.u32()?;
        let [deflate_on_oom, reporting] = reader.take()?.map(|flag: u8| flag != 0);
        let statistics = Some(reader.u64()?).filter(|nanos| *nanos > 0).map(Duration::from_nanos);
        reader.end()?;
        Self::new(BalloonConfig { target_mib, deflate_on_oom, reporting, statistics })
    }

    /// Ask the driver for a balloon of this size.
    pub fn set_target(&self, mib: u32) {
        // With the lock held: a snapshot has both the target and the interrupt, or neither.
        let mut state = self.state.lock();
        state.target = mib.saturating_mul(PAGES_PER_MIB);
        state.queues.iter().for_each(|queues| queues.config_changed());
    }

    /// What the host wants and what the driver says it has given, in MiB, rounded down.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        let state = self.state.lock();
        (state.target / PAGES_PER_MIB, state.actual / PAGES_PER_MIB)
    }

    /// The driver's newest statistics: tags and values.
    #[must_use]
    pub fn statistics(&self) -> Vec<(u16, u64)> {
        self.state.lock().statistics.clone()
    }

    fn inflate(access: &QueueAccess<'_>) {
        while let Some(chain) = access.pop(INFLATE) {
            let mut reader = ChainReader::new(access, &chain);
            loop {
                let bytes = reader.read_vec(MOST);
                if bytes.is_empty() {
                    break;
                }
                access.memory().discard_pages(&bytes);
            }
            access.complete(chain, 0);
        }
    }

    /// What the driver takes back is there again when it touches it.
    fn deflate(access: &QueueAccess<'_>) {
        while let Some(chain) = access.pop(DEFLATE) {
            access.complete(chain, 0);
        }
    }

    fn report(access: &QueueAccess<'_>, queue: usize) {
        while let Some(chain) = access.pop(queue) {
            for segment in chain.writable() {
                // It was checked with the chain; memory that was removed since has nothing to give.
                let _ = access.memory().discard(segment.address, u64::from(segment.length));
            }
            access.complete(chain, 0);
        }
    }

    fn take_statistics(&self, access: &QueueAccess<'_>) {
        while let Some(chain) = access.pop(THIRD) {
            let bytes = ChainReader::new(access, &chain).read_vec(STATISTIC * MAX_STATISTICS);
            let statistic = |bytes: &[u8]| {
                let mut reader = Reader::new("", bytes);
                Some((reader.u16().ok()?, reader.u64().ok()?))
            };
            let mut state = self.state.lock();
            state.statistics = bytes.chunks_exact(STATISTIC).filter_map(statistic).collect();
            let former = state.statistics_chain.replace(chain);
            drop(state);
            if let Some(former) = former {
                access.complete(former, 0);
            }
        }
    }

    /// Arm the timer of the statistics.
    fn arm(&self) {
        if let (Some(timer), Some(period)) = (&self.timer, self.config.statistics) {
            // Fails for no time that a configuration has.
            let _ = timer.set(Expiry::In(period), period);
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        let offered = [
            (self.config.statistics.is_some(), STATS_VQ),
            (self.config.deflate_on_oom, DEFLATE_ON_OOM),
            (self.config.reporting, REPORTING),
        ];
        offered.iter().filter(|(is_offered, _)| *is_offered).map(|(_, number)| bit(*number)).sum()
    }

    fn queue_sizes(&self) -> &[u16] {
        const ALL: [u16; 4] = [128; 4];
        let more =
            usize::from(self.config.statistics.is_some()) + usize::from(self.config.reporting);
        ALL.get(..THIRD + more).unwrap_or(&ALL)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let config = [state.target.to_le_bytes(), state.actual.to_le_bytes()].concat();
        read_space(&config, offset, data);
    }

    /// The driver writes how many pages it has given.
    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.state.lock().actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&self, queues: &Arc<Queues>, _features: u64) {
        self.state.lock().queues = Some(Arc::clone(queues));
        self.arm();
    }

    fn reset(&self) {
        let mut state = self.state.lock();
        (state.actual, state.queues) = (0, None);
        let former = state.statistics_chain.take();
        drop(state);
        drop(former);
        // Fails never in practice.
        self.timer.iter().for_each(|timer| drop(timer.clear()));
    }

    fn init(&self, ops: &mut EventOps<'_>) {
        // Fails only without memory: there are no new statistics then.
        self.timer.iter().for_each(|timer| drop(ops.add(Events::new(timer, EventSet::IN))));
    }

    fn process_queue(&self, queues: &Arc<Queues>, queue: usize, _ops: &mut EventOps<'_>) {
        let Some(access) = queues.access() else { return };
        let has = |feature| access.features() & bit(feature) != 0;
        let reports = THIRD + usize::from(has(STATS_VQ));
        match queue {
            INFLATE => Self::inflate(&access),
            DEFLATE => Self::deflate(&access),
            THIRD if has(STATS_VQ) => self.take_statistics(&access),
            _ if queue == reports && has(REPORTING) => Self::report(&access, queue),
            _ => {}
        }
    }

    fn process_event(&self, queues: &Arc<Queues>, _events: Events, _ops: &mut EventOps<'_>) {
        // Fails if another thread has read it.
        self.timer.iter().for_each(|timer| drop(timer.read()));
        let Some(access) = queues.access() else { return };
        let chain = self.state.lock().statistics_chain.take();
        if let Some(chain) = chain {
            access.complete(chain, 0);
        }
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = self.state.lock();
        Ok([state.target.to_le_bytes(), state.actual.to_le_bytes()].concat())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = Reader::new("balloon", state);
        let (target, actual) = (reader.u32()?, reader.u32()?);
        reader.end()?;
        let mut state = self.state.lock();
        (state.target, state.actual) = (target, actual);
        Ok(())
    }

    fn spec(&self) -> Vec<u8> {
        let BalloonConfig { deflate_on_oom, reporting, statistics, .. } = self.config;
        let (target_mib, _) = self.size();
        let mut bytes = target_mib.to_le_bytes().to_vec();
        bytes.extend([deflate_on_oom, reporting].map(u8::from));
        let nanos = statistics.map_or(0, |period| period.as_nanos());
        bytes.extend(u64::try_from(nanos).unwrap_or(u64::MAX).to_le_bytes());
        bytes
    }

    fn close(&self) {
        self.state.lock().queues = None;
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::mock::{MockDriver, readable, writable};
    use super::*;
    use proptest::prelude::*;

    const AT: u64 = MockDriver::BUFFERS;

    pub(in super::super) fn balloon(statistics: Option<Duration>) -> (Arc<Balloon>, MockDriver) {
        let config =
            BalloonConfig { target_mib: 3, deflate_on_oom: true, reporting: true, statistics };
        let balloon = Arc::new(Balloon::new(config).unwrap());
        let mut driver = MockDriver::new(Arc::clone(&balloon) as _, 8).unwrap();
        let features = driver.offered() & 0xffff;
        assert_eq!(driver.start(features), 15);
        (balloon, driver)
    }

    fn first(driver: &MockDriver, at: u64) -> u8 {
        let mut byte = [0];
        driver.memory.read(at, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn pages_that_are_given_are_dropped() {
        let (balloon, mut driver) = balloon(None);
        driver.memory.fill(0x20_0000, 0x5000, 7).unwrap();
        let numbers: Vec<u8> =
            [0x201u32, 0x202, 0x200, 0xffff_ffff].iter().flat_map(|n| n.to_le_bytes()).collect();
        driver.memory.write(AT, &numbers).unwrap();
        assert_eq!(driver.exchange(0, &[readable(AT, 16)]), Some(0));
        let bytes = [0x20_0000, 0x20_1000, 0x20_2000, 0x20_3000].map(|at| first(&driver, at));
        assert_eq!(bytes, [0, 0, 0, 7]);
        assert_eq!(driver.exchange(1, &[readable(AT, 12)]), Some(0));
        driver.write_config(4, &768u32.to_le_bytes());
        assert_eq!(balloon.size(), (3, 3));
    }

    #[test]
    fn free_pages_that_are_reported_are_dropped() {
        let (_, mut driver) = balloon(None);
        driver.memory.fill(0x20_0000, 0x5000, 7).unwrap();
        assert_eq!(driver.exchange(2, &[writable(0x20_0000, 0x2000)]), Some(0));
        assert_eq!((first(&driver, 0x20_1000), first(&driver, 0x20_2000)), (0, 7));
    }

    #[test]
    fn a_new_target_interrupts() {
        let (balloon, driver) = balloon(None);
        let pages = || {
            let mut bytes = [0; 4];
            driver.config(0, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        assert_eq!(pages(), 768);
        balloon.set_target(5);
        assert_eq!((pages(), driver.interrupt_status()), (1280, 2));
    }

    #[test]
    fn statistics_are_asked_for_again_and_again() {
        let (balloon, mut driver) = balloon(Some(Duration::from_millis(1)));
        for value in [5u64, 6] {
            let statistic = [&4u16.to_le_bytes()[..], &value.to_le_bytes()].concat();
            driver.memory.write(AT, &statistic).unwrap();
            // The device gives the buffer back when the timer expires.
            assert_eq!(driver.exchange(2, &[readable(AT, 10)]), Some(0));
            assert_eq!(balloon.statistics(), [(4, value)]);
        }
    }

    #[test]
    fn the_free_pages_have_the_third_queue_without_statistics() {
        let (_, mut driver) = balloon(Some(Duration::from_secs(3600)));
        driver.start(1 << REPORTING);
        driver.memory.fill(0x20_0000, 0x1000, 7).unwrap();
        assert_eq!(driver.exchange(2, &[writable(0x20_0000, 0x1000)]), Some(0));
        assert_eq!(first(&driver, 0x20_0000), 0);
    }

    proptest! {
        #[test]
        fn no_chain_makes_it_panic(
            queue in 0u32..4, bytes in prop::collection::vec(any::<u8>(), 0..64),
            at in 0u64..0x90_0000, length in 0u32..0x3000, is_writable in any::<bool>(),
        ) {
            let (_, mut driver) = balloon(Some(Duration::from_secs(3600)));
            driver.memory.write(AT, &bytes).unwrap();
            let buffer = super::super::mock::Buffer { address: at, length, is_writable };
            driver.add(queue as usize, &[readable(AT, 64), buffer]);
            driver.notify(queue);
            driver.turn(0).unwrap();
        }
    }
}
