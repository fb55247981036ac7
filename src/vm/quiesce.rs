//! Quiesces a machine: every vCPU is out of its guest, and no device changes guest-visible state. A
//! pause, a snapshot, a reset and an NMI all use this one counted mechanism. Any thread, except
//! that a vCPU's own thread must not wait for its callback.

use super::KvmVm;
use super::device_calls::{self, DeviceCalls};
use super::vcpus::LeavingVcpus;
use crate::devices::QuiescedDevices;
use crate::error::Result;
use crate::exit_handler::ExitHandler;
use crate::limit::Limit;
use crate::vcpu::VmRunState;

impl<EH: ExitHandler> KvmVm<EH> {
    /// Bring the vCPUs of the run in progress out of their guests, wait until they are at rest, and
    /// quiesce the devices. Does nothing if the machine is paused already.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the machine is not running; the error of `limit`,
    /// which ends the wait; the error of a device. In all cases the machine continues to run.
    pub fn pause(&self, limit: &Limit<'_>) -> Result<()> {
        self.check_process()?;
        self.check_device_calls("pause")?;
        let run_state = &self.shared.run_state;
        let (leaving, epoch) =
            self.vcpus.pause(|| match run_state.set_and_notify(VmRunState::Paused) {
                Ok(_) | Err(VmRunState::Paused) => Ok(()),
                Err(state) => Err(self.not_running("pause", state)),
            })?;
        // When this is dropped, the machine's state still keeps the vCPUs at rest.
        let mut quiesced = self.wait(leaving, limit).inspect_err(|_| {
            self.vcpus.undo_pause(epoch, || {
                // Fails if the guest has ended.
                let _ = run_state.set_and_notify(VmRunState::Running);
            });
        })?;
        let devices = std::mem::take(&mut quiesced.devices);
        let is_paused = || self.state() == VmRunState::Paused;
        self.resume_devices(self.vcpus.keep_paused(epoch, devices, is_paused));
        Ok(())
    }

    /// Hold the machine quiesced until the result is dropped, whether it runs or not. Its state
    /// does not change. A pause or a resume in between takes effect when the last hold is dropped.
    /// A vCPU in a callback counts as out of its guest.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Closed`] if the machine is closed; any error in a forked child;
    /// as for [`Self::check_device_calls`]; the error of `limit`, which ends the wait; the error of
    /// a device.
    pub(crate) fn quiesce(&self, what: &str, limit: &Limit<'_>) -> Result<Quiesced<'_, EH>> {
        self.check_process()?;
        self.check_device_calls(what)?;
        let leaving = self.vcpus.quiesce(|| Ok(()))?;
        self.wait(leaving, limit)
    }

    fn wait(&self, leaving: LeavingVcpus, limit: &Limit<'_>) -> Result<Quiesced<'_, EH>> {
        let mut quiesced = Quiesced { vm: self, devices: QuiescedDevices::default() };
        leaving.wait(limit)?;
        let _calls = self.device_calls();
        quiesced.devices = QuiescedDevices::new(&self.router.buses)?;
        Ok(quiesced)
    }

    /// This thread calls devices of the machine for as long as the result lives.
    pub(crate) fn device_calls(&self) -> DeviceCalls {
        DeviceCalls::begin(self.id())
    }

    /// # Errors
    /// [`crate::error::ErrorKind::State`] in a device's method that quiesces, saves, restores or
    /// resumes it: `what` would call the device again.
    pub(crate) fn check_device_calls(&self, what: &str) -> Result<()> {
        device_calls::check(self.id(), what)
    }

    /// Resume devices that a pause has quiesced. With no lock held: one may be the program's.
    pub(super) fn resume_devices(&self, devices: Option<QuiescedDevices>) {
        if devices.is_some() {
            let _calls = self.device_calls();
            drop(devices);
        }
    }
}

/// Keeps a machine quiesced until it is dropped.
#[derive(Debug)]
pub(crate) struct Quiesced<'a, EH: ExitHandler> {
    vm: &'a KvmVm<EH>,
    devices: QuiescedDevices,
}

impl<EH: ExitHandler> Drop for Quiesced<'_, EH> {
    fn drop(&mut self) {
        // In a child that was forked in a callback, the machine belongs to the parent.
        if self.vm.is_forked_child() {
            std::mem::take(&mut self.devices).forget();
            return;
        }
        self.vm.resume_devices(Some(std::mem::take(&mut self.devices)));
        self.vm.vcpus.release(|| self.vm.state());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::config::{Boot, Code, FlatBoot, VmmConfig};
    use crate::cpu::CpuMode;
    use crate::devices::{Access, Device};
    use crate::error::ErrorKind;
    use crate::exit_handler::Outcome;
    use crate::sync::{Mutex, rank};
    use crate::vmm::Vmm;

    /// Blocks the vCPU in a write until the test lets it continue.
    #[derive(Debug)]
    struct Slow {
        entered: Sender<()>,
        go: Mutex<Receiver<()>, rank::Test>,
    }

    impl Device for Slow {
        fn read(&self, _offset: u64, _data: &mut [u8]) -> Outcome {
            Outcome::Continue
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
            let _ = self.entered.send(());
            // Fails at the end of the test.
            let _ = self.go.lock().recv();
            Outcome::Continue
        }
    }

    #[test]
    fn a_pause_that_cannot_be_waited_for_leaves_the_machine_running() {
        if crate::kvm::open_kvm().is_err() {
            return;
        }
        // back: out 0x80, al; jmp back
        let code = Code::Bytes(vec![0xe6, 0x80, 0xeb, 0xfc]);
        let mode = CpuMode::Protected32;
        let boot = Boot::Flat(FlatBoot { code, address: 0x1000, entry: None, mode });
        let mut config = VmmConfig { boot, ..VmmConfig::default() };
        config.memory.size_mib = 1;
        let vmm = Vmm::try_from(config).unwrap();
        let ((entered, has_entered), (go, goes)) = (channel(), channel());
        let slow = Slow { entered, go: Mutex::new(goes) };
        vmm.add_device(Access::Pio, 0x80, 1, Arc::new(slow)).unwrap();
        vmm.start().unwrap();
        let deadline = Duration::from_secs(60);
        has_entered.recv_timeout(deadline).unwrap();
        let brief = Limit::new(Some(Duration::from_millis(1)), &|| Ok(()));
        assert_eq!(vmm.pause(&brief).unwrap_err().kind, ErrorKind::Timeout);
        assert_eq!(vmm.state(), VmRunState::Running);
        go.send(()).unwrap();
        has_entered.recv_timeout(deadline).unwrap(); // the guest has continued
        go.send(()).unwrap();
        // The next write waits for this sender.
        drop(go);
        vmm.pause(&Limit::NONE).unwrap();
        assert_eq!(vmm.state(), VmRunState::Paused);
    }
}
