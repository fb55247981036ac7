//! A device whose work the program does: it is given the queues on the loop's thread, outside of
//! the event manager's lock, and completes chains from any thread.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use event_manager::EventOps;

use super::access::QueueAccess;
use super::buffers::ChainWriter;
use super::chain::Chain;
use super::device::{VirtioDevice, read_space};
use super::queues::Queues;
use crate::config::CustomConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

/// The most queues of a device, and the largest of them.
const MAX_QUEUES: usize = 64;
const MAX_SIZE: u16 = 32768;
/// The feature bits of queues and transport, which are not a device's.
const RESERVED: u64 = ((1 << 26) - 1) << 24;

/// What `restored` in create.rs knows the program's devices by, whatever their type.
pub(super) const SPEC: &[u8] = b"a device of the program";

/// What the driver has done with the device, for the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// It has started the device with these features.
    Activated(u64),
    /// It has reset the device.
    Reset,
}

#[derive(Debug)]
struct State {
    space: Vec<u8>,
    /// What the program does not know yet: a reset, a start, or one after the other.
    happened: Vec<Happened>,
    /// Chains that were completed while the queues were closed, with what is to be written.
    deferred: Vec<(Chain, Vec<u8>)>,
    /// How many have quiesced the device.
    holds: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Custom {
    config: CustomConfig,
    /// Once the loop serves the device.
    queues: OnceLock<Arc<Queues>>,
    state: Mutex<State, rank::VirtioDevice>,
}

impl Custom {
    /// # Errors
    /// [`ErrorKind::Config`] if there can be no such device.
    pub fn new(config: CustomConfig) -> Result<Self> {
        let refused = |at: &str, detail: String| Err(Error::new(ErrorKind::Config, at, detail));
        if config.device_type == 0 {
            return refused("device_type", "0 is the type of no device".into());
        }
        if config.features & RESERVED != 0 {
            let bits = config.features & RESERVED;
            return refused("features", format!("{bits:#x} are not those of a device"));
        }
        if config.queues.is_empty() || config.queues.len() > MAX_QUEUES {
            let count = config.queues.len();
            return refused("queues", format!("{count} queues are not from 1 to {MAX_QUEUES}"));
        }
        let is_bad = |size: &&u16| !size.is_power_of_two() || **size > MAX_SIZE;
        if let Some(size) = config.queues.iter().find(is_bad) {
            let detail = format!("{size} is not a power of two from 1 to {MAX_SIZE}");
            return refused("queues", detail);
        }
        check_space(&config.space)?;
        let space = config.space.clone();
        let state = State { space, happened: Vec::new(), deferred: Vec::new(), holds: 0 };
        Ok(Self { config, queues: OnceLock::new(), state: Mutex::new(state) })
    }

    /// What it was made with.
    #[must_use]
    pub fn config(&self) -> &CustomConfig {
        &self.config
    }

    /// The loop serves the device from now on.
    pub fn serve(&self, queues: &Arc<Queues>) {
        // Fails if it does so already.
        let _ = self.queues.set(Arc::clone(queues));
    }

    /// Have the loop ask what has happened.
    fn wake(&self) {
        self.queues.get().iter().for_each(|queues| queues.notify(0));
    }

    /// The configuration space.
    #[must_use]
    pub fn space(&self) -> Vec<u8> {
        self.state.lock().space.clone()
    }

    /// Change the configuration space. [`Queues::config_changed`] interrupts the driver.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if it is too long.
    pub fn set_space(&self, space: Vec<u8>) -> Result<()> {
        check_space(&space)?;
        self.state.lock().space = space;
        Ok(())
    }

    /// Take what the driver has done since the last call, in order. Nothing while the device is
    /// quiesced: what restores it tells the program of a reset itself.
    #[must_use]
    pub fn take_happened(&self) -> Vec<Happened> {
        let mut state = self.state.lock();
        if state.holds > 0 { Vec::new() } else { std::mem::take(&mut state.happened) }
    }

    /// Write to a chain and give it back to the driver. While the queues are closed, this happens
    /// when they are opened again. Does nothing if the driver has reset the device meanwhile.
    pub fn complete(&self, queues: &Queues, chain: Chain, data: Vec<u8>) {
        match queues.access() {
            Some(access) => write(&access, chain, &data),
            None if chain.epoch() == queues.epoch() => {
                let queue = chain.queue();
                self.state.lock().deferred.push((chain, data));
                // The queues may have been opened meanwhile.
                queues.notify(queue);
            }
            None => {}
        }
    }

    /// Complete what was deferred. Returns whether the queues are open.
    pub fn catch_up(&self, queues: &Queues) -> bool {
        let Some(access) = queues.access() else { return false };
        let deferred = std::mem::take(&mut self.state.lock().deferred);
        deferred.into_iter().for_each(|(chain, data)| write(&access, chain, &data));
        true
    }
}

fn check_space(space: &[u8]) -> Result<()> {
    // A page, without the registers.
    const MOST: usize = 4096 - 256;
    if space.len() <= MOST {
        return Ok(());
    }
    let detail = format!("{} bytes are more than the {MOST} of a configuration space", space.len());
    Err(Error::new(ErrorKind::Config, "config", detail))
}

fn write(access: &QueueAccess<'_>, chain: Chain, data: &[u8]) {
    if chain.epoch() != access.epoch() {
        // Its buffers may belong to something else by now.
        return;
    }
    let mut writer = ChainWriter::new(access, &chain);
    // Fails only if memory was removed: what was written is counted.
    let _ = writer.write_all(data);
    let written = writer.written();
    access.complete(chain, written);
}

impl VirtioDevice for Custom {
    fn device_type(&self) -> u32 {
        self.config.device_type
    }

    fn features(&self) -> u64 {
        self.config.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.config.queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.state.lock().space, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if !self.config.program.write_config(offset, data) {
            self.wake();
        }
    }

    fn activate(&self, _queues: &Arc<Queues>, features: u64) {
        self.state.lock().happened.push(Happened::Activated(features));
    }

    fn reset(&self) {
        let mut state = self.state.lock();
        let void = std::mem::take(&mut state.deferred);
        state.happened = vec![Happened::Reset];
        drop(state);
        drop(void);
        self.wake();
    }

    fn is_served_by_program(&self) -> bool {
        true
    }

    fn process_queue(&self, _queues: &Arc<Queues>, _queue: usize, _ops: &mut EventOps<'_>) {}

    fn quiesce(&self) -> Result<()> {
        self.state.lock().holds += 1;
        Ok(())
    }

    /// The queues' notifications follow, and with them what has happened.
    fn resume(&self) {
        let mut state = self.state.lock();
        state.holds = state.holds.saturating_sub(1);
    }

    fn spec(&self) -> Vec<u8> {
        SPEC.to_vec()
    }

    fn save(&self) -> Result<Vec<u8>> {
        let own = self.config.program.save()?;
        let space = self.space();
        let length = u32::try_from(space.len()).unwrap_or(0);
        Ok([&length.to_le_bytes()[..], &space, &own].concat())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = crate::bytes::Reader::new("virtio device", state);
        let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        self.set_space(reader.bytes(length)?.to_vec())?;
        // In this order, or the program would reset what it has restored.
        let happened = std::mem::take(&mut self.state.lock().happened);
        if happened.contains(&Happened::Reset) {
            self.config.program.reset()?;
        }
        self.config.program.restore(reader.rest())
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/config/custom.rs.

    use super::super::mock::{MockDriver, readable, writable};
    use super::*;
    use crate::config::CustomProgram;

    #[derive(Debug)]
    struct Nothing;

    impl CustomProgram for Nothing {
        fn write_config(&self, _offset: u64, _data: &[u8]) -> bool {
            true
        }
        fn reset(&self) -> Result<()> {
            Ok(())
        }
        fn save(&self) -> Result<Vec<u8>> {
            Ok(b"own".to_vec())
        }
        fn restore(&self, state: &[u8]) -> Result<()> {
            assert_eq!(state, b"own");
            Ok(())
        }
        fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
            self
        }
    }

    fn config() -> CustomConfig {
        let (queues, space) = (vec![8, 16], b"space".to_vec());
        CustomConfig { device_type: 42, features: 5, queues, space, program: Arc::new(Nothing) }
    }

    #[test]
    fn a_chain_that_is_completed_while_quiesced_is_given_back_afterwards() {
        let custom = Arc::new(Custom::new(config()).unwrap());
        let mut driver = MockDriver::new(Arc::clone(&custom) as _, 4).unwrap();
        assert_eq!(driver.start(5), 15);
        assert_eq!(custom.take_happened(), [Happened::Reset, Happened::Activated(1 << 32 | 5)]);
        let at = MockDriver::BUFFERS;
        driver.add(1, &[readable(at, 4), writable(at + 64, 8)]).unwrap();
        let queues = Arc::clone(driver.attached.transport.queues());
        let chain = queues.access().unwrap().pop(1).unwrap();
        let transport = Arc::clone(&driver.attached.transport);
        crate::devices::Device::quiesce(&*transport).unwrap();
        custom.complete(&queues, chain, b"data".to_vec());
        assert_eq!((driver.used(1), custom.catch_up(&queues)), (None, false));
        crate::devices::Device::resume(&*transport);
        assert!(custom.catch_up(&queues));
        assert_eq!(driver.used(1), Some((0, 4)));
        let mut found = [0; 4];
        driver.memory.read(at + 64, &mut found).unwrap();
        assert_eq!(&found, b"data");
    }

    #[test]
    fn a_chain_of_before_a_reset_is_not_written() {
        let custom = Arc::new(Custom::new(config()).unwrap());
        let mut driver = MockDriver::new(Arc::clone(&custom) as _, 4).unwrap();
        let queues = Arc::clone(driver.attached.transport.queues());
        let at = MockDriver::BUFFERS;
        for is_started_first in [true, false] {
            assert_eq!(driver.start(5), 15);
            driver.add(1, &[writable(at, 4)]).unwrap();
            let chain = queues.access().unwrap().pop(1).unwrap();
            driver.attached.transport.reset();
            if is_started_first {
                driver.start(5);
            }
            custom.complete(&queues, chain, b"data".to_vec());
            driver.start(5);
            assert!(custom.catch_up(&queues));
            let mut found = [9; 4];
            driver.memory.read(at, &mut found).unwrap();
            assert_eq!((found, driver.used(1)), ([0; 4], None));
        }
    }

    #[test]
    fn its_space_and_the_programs_state_come_back() {
        let custom = Custom::new(config()).unwrap();
        custom.set_space(b"other".to_vec()).unwrap();
        let other = Custom::new(config()).unwrap();
        other.restore(&custom.save().unwrap()).unwrap();
        let mut found = [9; 7];
        other.read_config(1, &mut found);
        assert_eq!(&found, b"ther\x09\x09\x09");
        assert!(custom.set_space(vec![0; 4096]).is_err());
    }

    #[test]
    fn devices_that_cannot_be_are_refused() {
        let refused = |config| Custom::new(config).unwrap_err().at;
        assert_eq!(refused(CustomConfig { device_type: 0, ..config() }), "device_type");
        assert_eq!(refused(CustomConfig { features: 1 << 32, ..config() }), "features");
        assert_eq!(refused(CustomConfig { queues: vec![], ..config() }), "queues");
        assert_eq!(refused(CustomConfig { queues: vec![3], ..config() }), "queues");
        assert_eq!(refused(CustomConfig { space: vec![0; 4000], ..config() }), "config");
    }
}
