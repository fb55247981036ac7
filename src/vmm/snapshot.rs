//! Takes a snapshot of a [`Vmm`]. Any thread but a vCPU's.

use kvm_ioctls::VmFd;

use super::machine::Vmm;
use super::parts::Vm;
use super::virtio;
use crate::config::{ExitPort, Platform};
use crate::devices::Buses;
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;
use crate::limit::Limit;
use crate::snapshot::{
    DeviceState, Snapshot, VcpuStateFormat, VirtioDeviceState, chips, new_id, vcpu,
};
use crate::vcpu::Vcpu;
use crate::vm::MachineSpec;

impl Vmm {
    /// Capture all guest-visible state of this machine. A running machine is paused meanwhile. Its
    /// memory is not copied: from now on the machine writes to private copies of pages.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine is closed, a device cannot save its state, memory is
    /// shared, or another thread resumes the machine meanwhile. If KVM refuses. In all cases the
    /// machine continues as before.
    pub fn snapshot(&self, limit: &Limit<'_>) -> Result<Snapshot> {
        hop!();
        let vm = self.vm()?;
        vm.check_process()?;
        vm.prepare(self.entry)?;
        let _quiesced = vm.quiesce("snapshot", limit)?;
        vm.complete_pending_io(limit)?;
        let (rests, resets) = (rests(&vm), self.resets.check(None)?);
        // With no lock held: a device may be implemented in Python.
        let devices = save_devices(&vm, &self.router().buses)?;
        let virtio = virtio::freeze_all(&self.virtio()?)?;
        let spec = self.spec(&vm);
        vm.at_rest(limit, |fd, vcpus| {
            check_rests(vcpus, &rests)?;
            self.resets.check(Some(resets))?;
            capture(&vm, spec, fd, vcpus, (devices, virtio))
        })
    }

    pub(super) fn spec(&self, vm: &Vm) -> MachineSpec {
        let (irqchip, pit, fixups) = vm.chips();
        let Platform { exit_port: ExitPort(exit_port), parts, .. } = *self.platform.lock();
        let vcpus = u16::try_from(vm.handles().len()).unwrap_or(u16::MAX);
        MachineSpec { vcpus, irqchip, pit, fixups, exit_port, parts }
    }
}

fn capture(
    vm: &Vm,
    spec: MachineSpec,
    fd: &VmFd,
    vcpus: &mut [impl std::ops::DerefMut<Target = Vcpu>],
    (devices, virtio): (Vec<DeviceState>, Vec<VirtioDeviceState>),
) -> Result<Snapshot> {
    let format = VcpuStateFormat::of(fd, spec.irqchip);
    let mut states = Vec::with_capacity(vcpus.len());
    for (number, vcpu) in (0..).zip(vcpus.iter_mut()) {
        states.push(vcpu::capture(vcpu, number, format)?);
    }
    let chips = chips::capture(fd, &spec, *vm.lines())?;
    let ranges = vm.memory().kvm_slots().freeze()?;
    let cache = std::sync::Arc::default();
    let (id, vcpus, host) = (new_id()?, states, None);
    Ok(Snapshot { id, spec, chips, vcpus, devices, virtio, ranges, host, cache })
}

fn rests(vm: &Vm) -> Vec<u64> {
    vm.handles().iter().map(|handle| handle.rests()).collect()
}

/// # Errors
/// [`ErrorKind::State`] if a vCPU has left rest since `before` was counted.
fn check_rests(vcpus: &[impl std::ops::Deref<Target = Vcpu>], before: &[u64]) -> Result<()> {
    if vcpus.iter().map(|vcpu| vcpu.rests).eq(before.iter().copied()) {
        return Ok(());
    }
    let detail = "the machine was resumed during the snapshot";
    Err(Error::new(ErrorKind::State, "snapshot", detail))
}

fn save_devices(vm: &Vm, buses: &Buses) -> Result<Vec<DeviceState>> {
    let _calls = vm.device_calls();
    let mut all = Vec::new();
    for (is_mmio, bus) in [(false, &buses.pio), (true, &buses.mmio)] {
        for (base, length, device) in bus.devices() {
            all.push(DeviceState { is_mmio, base, length, state: device.save()? });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::super::restore::ForkConfig;
    use super::*;
    use crate::config::{Boot, Code, FlatBoot, VmmConfig};
    use crate::cpu::CpuMode;
    use crate::devices::{Access, Device};
    use crate::event::NextTurn;
    use crate::exit_handler::{ExitReason, Outcome};
    use crate::sync::{Mutex, rank};
    use crate::vcpu::VcpuHandle;

    /// At which access, of which vCPU, and where to report it.
    type Park = (u64, Arc<VcpuHandle>, Sender<()>);

    /// Counts accesses. A read returns its number. At one of them the vCPU is parked after the
    /// exit.
    #[derive(Debug, Default)]
    struct Counter {
        seen: AtomicU64,
        park: Mutex<Option<Park>, rank::Test>,
    }

    impl Counter {
        fn count(&self) -> u64 {
            let now = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
            let park = self.park.lock().take_if(|(at, ..)| *at == now);
            if let Some((_, handle, told)) = park {
                handle.pause();
                told.send(()).unwrap();
            }
            now
        }
    }

    impl Device for Counter {
        fn read(&self, _offset: u64, data: &mut [u8]) -> Outcome {
            data.fill(u8::try_from(self.count() & 0xff).unwrap());
            Outcome::Continue
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
            self.count();
            Outcome::Continue
        }
        fn save(&self) -> Result<Vec<u8>> {
            Ok(self.seen.load(Ordering::Relaxed).to_le_bytes().to_vec())
        }
        fn restore(&self, state: &[u8]) -> Result<()> {
            self.seen.store(u64::from_le_bytes(state.try_into().unwrap()), Ordering::Relaxed);
            Ok(())
        }
    }

    /// Port reads and writes of one and two bytes, repeated ones, and MMIO reads and writes. The
    /// guest prints each value that it reads. 32 bits, at 0x1000.
    const LIFE: &[u8] = &[
        0xbb, 0x00, 0x00, 0x00, 0xd0, //       mov ebx, 0xd0000000
        0xb9, 0x05, 0x00, 0x00, 0x00, //       mov ecx, 5
        // back:
        0xe6, 0x80, //                         out 0x80, al
        0xe4, 0x80, //                         in al, 0x80
        0x66, 0xba, 0xf8, 0x03, 0xee, //       mov dx, 0x3f8; out dx, al
        0x88, 0x03, //                         mov [ebx], al
        0x8a, 0x03, //                         mov al, [ebx]
        0xee, //                               out dx, al
        0x66, 0xe5, 0x80, 0xee, //             in ax, 0x80; out dx, al
        0x51, //                               push ecx
        0x66, 0xba, 0x80, 0x00, //             mov dx, 0x80
        0xbe, 0x00, 0x10, 0x00, 0x00, //       mov esi, 0x1000
        0xb9, 0x07, 0x00, 0x00, 0x00, //       mov ecx, 7
        0xf3, 0x6e, //                         rep outsb
        0xbf, 0x00, 0x30, 0x00, 0x00, //       mov edi, 0x3000
        0xb9, 0x05, 0x00, 0x00, 0x00, //       mov ecx, 5
        0xf3, 0x6c, //                         rep insb
        0xbe, 0x00, 0x30, 0x00, 0x00, //       mov esi, 0x3000
        0xb9, 0x05, 0x00, 0x00, 0x00, //       mov ecx, 5
        0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e, // mov dx, 0x3f8; rep outsb
        0x59, //                               pop ecx
        0xe2, 0xb6, //                         loop back
        0xb0, 0x2a, 0xe6, 0xf4, //             mov al, 42; out 0xf4, al
    ];

    fn life() -> VmmConfig {
        let code = Code::Bytes(LIFE.to_vec());
        let mode = CpuMode::Protected32;
        let boot = Boot::Flat(FlatBoot { code, address: 0x1000, entry: None, mode });
        let mut config = VmmConfig { boot, ..VmmConfig::default() };
        config.memory.size_mib = 1;
        config
    }

    fn with_counter(vmm: &Vmm) -> Arc<Counter> {
        let counter = Arc::new(Counter::default());
        let places = [(Access::Pio, 0x80, 2), (Access::Mmio, 0xd000_0000, 4096)];
        for (access, base, length) in places {
            let device = Arc::clone(&counter) as Arc<dyn Device>;
            vmm.add_device(access, base, length, device).unwrap();
        }
        counter
    }

    fn turn(vmm: &Vmm, next: NextTurn) -> Result<()> {
        vmm.event_manager()?.run_until(next, None).map(drop)
    }

    fn finish(vmm: &Vmm) -> Vec<u8> {
        let exit = vmm.run(Some(Duration::from_secs(60)), |next| turn(vmm, next)).unwrap();
        assert_eq!((exit.reason, exit.code), (ExitReason::Code, Some(42)));
        vmm.serial().take_output()
    }

    /// Run up to an access, take a snapshot right after it, and finish.
    fn snapshot_at(access: u64) -> (Snapshot, Vec<u8>) {
        let vmm = Vmm::try_from(life()).unwrap();
        let counter = with_counter(&vmm);
        let (told, parked) = channel();
        let handle = vmm.vcpus().unwrap().remove(0);
        *counter.park.lock() = Some((access, handle, told));
        vmm.start().unwrap();
        parked.recv_timeout(Duration::from_secs(60)).unwrap();
        let snapshot = vmm.snapshot(&Limit::NONE).unwrap();
        let exit =
            vmm.wait(Some(Duration::from_secs(60)), &|| Ok(()), |next| turn(&vmm, next)).unwrap();
        assert_eq!(exit.unwrap().code, Some(42));
        (snapshot, vmm.serial().take_output())
    }

    #[test]
    fn a_snapshot_at_every_exit_goes_on_to_the_same_output() {
        if crate::kvm::open_kvm().is_err() {
            return;
        }
        let whole = Vmm::try_from(life()).unwrap();
        let counter = with_counter(&whole);
        let expected = finish(&whole);
        assert_eq!(expected.len(), 5 * 8);
        let accesses = counter.seen.load(Ordering::Relaxed);
        assert_eq!(accesses, 5 * (2 + 2 + 1 + 7 + 5));
        for access in 1..=accesses {
            let (snapshot, output) = snapshot_at(access);
            assert_eq!(output, expected, "the original, stopped at access {access}");
            let fork = Vmm::fork(&snapshot, ForkConfig::default()).unwrap();
            with_counter(&fork);
            fork.restore_devices(&snapshot).unwrap();
            assert_eq!(finish(&fork), expected, "the fork, from access {access}");
            fork.reset(&snapshot, &Limit::NONE, || ()).unwrap();
            assert_eq!(finish(&fork), expected, "reset to access {access}");
        }
    }

    #[test]
    fn a_device_that_is_missing_is_named() {
        if crate::kvm::open_kvm().is_err() {
            return;
        }
        let vmm = Vmm::try_from(life()).unwrap();
        with_counter(&vmm);
        let snapshot = vmm.snapshot(&Limit::NONE).unwrap();
        let fork = Vmm::fork(&snapshot, ForkConfig::default()).unwrap();
        let error = fork.restore_devices(&snapshot).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::State, "pio 0x80"));
    }
}
