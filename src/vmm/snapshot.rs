//! From a machine to a snapshot and back: `snapshot`, `fork` and `reset` of a [`Vmm`]. Any thread
//! but a vCPU's.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::machine::Vmm;
use super::parts::Parts;
use crate::config::SerialConfig;
use crate::devices::{self, Buses, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::exit_handler::WrappedExitHandler;
use crate::hop::hop;
use crate::layout;
use crate::limit::Limit;
use crate::memory::{GuestMemory, MemoryRange};
use crate::snapshot::{Classes, DeviceState, Snapshot, chips, new_id, vcpu};
use crate::vcpu::{ExitRouter, Vcpu, VmRunState};
use crate::vm::{KvmVm, Shape, claim_platform};

type Vm = KvmVm<WrappedExitHandler>;

/// What a fork has of its own.
#[derive(Debug, Default)]
pub struct ForkConfig {
    /// Its serial port's streams.
    pub serial: SerialConfig,
    /// A loop that others use too; none for one of its own.
    pub event_manager: Option<Arc<EventManager>>,
}

impl Vmm {
    /// Everything a guest can see of this machine. A running one is paused for it and goes on. Its
    /// memory is not copied: it goes on with private copies of the pages that it writes from now
    /// on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed, a device's state cannot be kept, memory is
    /// shared with others, or somebody resumes it meanwhile; when KVM refuses. The machine goes on
    /// as before then.
    pub fn snapshot(&self, limit: &Limit<'_>) -> Result<Snapshot> {
        hop!();
        let vm = self.vm()?;
        vm.check_process()?;
        vm.prepare(self.entry)?;
        let _quiesced = vm.quiesce(limit)?;
        vm.complete_pending_io(limit)?;
        let (rests, resets) = (rests(&vm), self.resets.check(None)?);
        // Without a lock: a device may be Python's.
        let devices = save_devices(&self.router().buses)?;
        let shape = self.shape(&vm);
        vm.at_rest(limit, |fd, vcpus| {
            check_rests(vcpus, &rests)?;
            self.resets.check(Some(resets))?;
            capture(&vm, shape, fd, vcpus, devices)
        })
    }

    /// Bring a snapshot back in place: memory, vCPUs, devices and clock. A guest that has ended
    /// lives again; a running one goes on from there. How many pages of memory were changed for it.
    /// `forget_stop` is called when a stop that nobody has run into is dropped: it was for a run of
    /// the guest that went.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed, a run is ending, or the snapshot is of a
    /// machine of another shape or CPUID, or with a device that this one has not: nothing is
    /// changed then. When KVM or a device refuses or memory is missing the machine may be part one
    /// and part the other: reset it again, or close it.
    pub fn reset(
        &self,
        snapshot: &Snapshot,
        limit: &Limit<'_>,
        forget_stop: impl FnOnce(),
    ) -> Result<u64> {
        let vm = self.vm()?;
        vm.check_process()?;
        self.shape(&vm).check_same(&snapshot.shape)?;
        vm.memory().kvm_slots().check(&snapshot.ranges)?;
        snapshot.ranges.iter().try_for_each(|range| range.image.check())?;
        let devices = devices_of(&self.router().buses, snapshot)?;
        // Nobody starts a run meanwhile; of a run in progress the vCPUs stand still.
        let in_run = self.is_in_run();
        let _running = if in_run { None } else { Some(self.enter_run("reset", false)?) };
        let _quiesced = vm.quiesce(limit)?;
        vm.handles().iter().try_for_each(|handle| handle.wait_while_leaving(limit))?;
        // Only now: a callback that was waited for may have ended the guest.
        if in_run && vm.state() == VmRunState::Exiting {
            let detail = "the guest has ended, and its run is not over yet";
            return Err(Error::new(ErrorKind::State, "reset", detail));
        }
        self.resets.reset(|| {
            let changed = vm.at_rest(limit, |fd, vcpus| bring_back(&vm, fd, vcpus, snapshot))?;
            vm.revive();
            if !in_run {
                // A stop that came before this was for a run of the guest that went.
                self.exit_handler()?.take_stop();
                forget_stop();
            }
            restore_devices(&devices)?;
            Ok(changed / layout::PAGE)
        })
    }

    /// A new machine that goes on from a snapshot, which it leaves as it is. It shares every page
    /// that it does not write.
    ///
    /// # Errors
    /// When KVM refuses a part, there is no memory or descriptor left, or a device of the snapshot
    /// is missing.
    pub fn fork(snapshot: &Snapshot, config: ForkConfig) -> Result<Self> {
        hop!();
        let ForkConfig { serial: streams, event_manager } = config;
        let shape = &snapshot.shape;
        let memory = GuestMemory::empty();
        for MemoryRange { start, read_only, image } in &snapshot.ranges {
            memory.add_image(*start, image, *read_only)?;
        }
        claim_platform(memory.resources(), shape.irqchip, shape.exit_port())?;
        let event_manager = match event_manager {
            Some(shared) => shared.share().map(|()| shared)?,
            None => Arc::new(EventManager::new()?),
        };
        let exit_handler =
            WrappedExitHandler::new().map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?;
        let router = Arc::new(ExitRouter::default());
        let vm = KvmVm::of_shape(shape, memory, &router, exit_handler.clone())?;
        vm.at_rest(&Limit::NONE, |fd, vcpus| set_state(&vm, fd, vcpus, snapshot))?;
        let irq = vm.irq(layout::COM1_IRQ);
        let serial = devices::attach(&router.buses, irq, &streams, shape.exit_port())?;
        let parts = Parts { vm, event_manager, exit_handler, router, serial, entry: 0 };
        Self::assemble(parts, streams, shape.exit_port())
    }

    /// Give the devices what the snapshot kept of them: the last step of a fork, when all are
    /// attached.
    ///
    /// # Errors
    /// When one is missing, or refuses its state.
    pub fn restore_devices(&self, snapshot: &Snapshot) -> Result<()> {
        restore_devices(&devices_of(&self.router().buses, snapshot)?)
    }

    fn shape(&self, vm: &Vm) -> Shape {
        let (irqchip, pit, fixups) = vm.chips();
        let vcpus = u16::try_from(vm.handles().len()).unwrap_or(u16::MAX);
        Shape { vcpus, irqchip, pit, fixups, exit_port: self.exit_port.0 }
    }
}

fn capture(
    vm: &Vm,
    shape: Shape,
    fd: &VmFd,
    vcpus: &mut [impl std::ops::DerefMut<Target = Vcpu>],
    devices: Vec<DeviceState>,
) -> Result<Snapshot> {
    let classes = Classes::of(fd, shape.irqchip);
    let mut states = Vec::with_capacity(vcpus.len());
    for (number, vcpu) in (0..).zip(vcpus.iter_mut()) {
        states.push(vcpu::capture(vcpu, number, classes)?);
    }
    let chips = chips::capture(fd, &shape, *vm.lines())?;
    let ranges = vm.memory().kvm_slots().freeze()?;
    Ok(Snapshot { id: new_id()?, shape, chips, vcpus: states, devices, ranges, host: None })
}

fn rests(vm: &Vm) -> Vec<u64> {
    vm.handles().iter().map(|handle| handle.rests()).collect()
}

/// # Errors
/// [`ErrorKind::State`] when a vCPU has run since its rests were counted.
fn check_rests(vcpus: &[impl std::ops::Deref<Target = Vcpu>], before: &[u64]) -> Result<()> {
    if vcpus.iter().map(|vcpu| vcpu.rests).eq(before.iter().copied()) {
        return Ok(());
    }
    let detail = "the machine was resumed while it was looked at";
    Err(Error::new(ErrorKind::State, "snapshot", detail))
}

fn save_devices(buses: &Buses) -> Result<Vec<DeviceState>> {
    let mut all = Vec::new();
    for (is_mmio, bus) in [(false, &buses.pio), (true, &buses.mmio)] {
        for (base, length, device) in bus.devices() {
            all.push(DeviceState { is_mmio, base, length, state: device.save()? });
        }
    }
    Ok(all)
}

/// A device, and the state that it is to be given.
type Restored<'a> = (Arc<dyn Device>, &'a [u8]);

/// The device of each state that the snapshot has.
///
/// # Errors
/// [`ErrorKind::State`] when one is missing, or cannot be given a state.
fn devices_of<'a>(buses: &Buses, snapshot: &'a Snapshot) -> Result<Vec<Restored<'a>>> {
    let find = |saved: &'a DeviceState| {
        let bus = if saved.is_mmio { &buses.mmio } else { &buses.pio };
        let mut there = bus.devices().into_iter();
        match there.find(|(base, length, _)| (*base, *length) == (saved.base, saved.length)) {
            Some((.., device)) => {
                device.check_restorable()?;
                Ok((device, saved.state.as_slice()))
            }
            None => {
                let detail = "the snapshot has a device there, and this machine has none like it";
                let error = Error::new(ErrorKind::State, saved.place(), detail);
                Err(error.hint("fork(setup=...) adds devices"))
            }
        }
    };
    snapshot.devices.iter().map(find).collect()
}

fn restore_devices(devices: &[Restored<'_>]) -> Result<()> {
    devices.iter().try_for_each(|(device, state)| device.restore(state))
}

/// Everything but memory and devices, in the order that docs/snapshots.md gives with its reasons.
fn set_state(
    vm: &Vm,
    fd: &VmFd,
    vcpus: &mut [impl std::ops::DerefMut<Target = Vcpu>],
    snapshot: &Snapshot,
) -> Result<()> {
    let Snapshot { shape, chips, .. } = snapshot;
    let classes = Classes::of(fd, shape.irqchip);
    chips::apply_controllers(fd, shape, chips, &mut vm.lines())?;
    for ((number, vcpu), state) in (0..).zip(vcpus.iter_mut()).zip(&snapshot.vcpus) {
        vcpu::apply(vcpu, number, state, classes)?;
    }
    chips::apply_timers(fd, shape, chips)
}

fn bring_back(
    vm: &Vm,
    fd: &VmFd,
    vcpus: &mut [impl std::ops::DerefMut<Target = Vcpu>],
    snapshot: &Snapshot,
) -> Result<u64> {
    for ((number, vcpu), state) in (0..).zip(vcpus.iter_mut()).zip(&snapshot.vcpus) {
        vcpu::check_cpuid(vcpu, number, state)?;
    }
    let changed = vm.memory().kvm_slots().reset(&snapshot.ranges, || {
        // What KVM would complete at the next entry belongs to the guest that goes. It may write
        // memory.
        vcpus.iter_mut().for_each(|vcpu| vcpu.abandon());
    })?;
    set_state(vm, fd, vcpus, snapshot)?;
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::{Duration, Instant};

    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::config::{Boot, Code, FlatBoot, VmmConfig};
    use crate::cpu::CpuMode;
    use crate::exit_handler::ExitReason;
    use crate::exit_handler::Outcome;
    use crate::sync::{Mutex, rank};
    use crate::vcpu::VcpuHandle;

    /// At which access, which vCPU, and whom to tell.
    type Park = (u64, Arc<VcpuHandle>, Sender<()>);

    /// Counts accesses, reads as their number, and at one of them parks the vCPU behind that exit.
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
                handle.park();
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

    /// Ports in and out by the byte and the word, repeated ones, and memory in and out where no
    /// memory is; what each read gives is printed. 32 bits, at 0x1000.
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
        let places = [(devices::Access::Pio, 0x80, 2), (devices::Access::Mmio, 0xd000_0000, 4096)];
        for (access, base, length) in places {
            let device = Arc::clone(&counter) as Arc<dyn Device>;
            vmm.add_device(access, base, length, device).unwrap();
        }
        counter
    }

    fn turn(vmm: &Vmm, until: Option<Instant>) -> Result<()> {
        vmm.event_manager()?.run_until(until, None).map(drop)
    }

    fn finish(vmm: &Vmm) -> Vec<u8> {
        let exit = vmm.run(Some(Duration::from_secs(60)), |until| turn(vmm, until)).unwrap();
        assert_eq!((exit.reason, exit.code), (ExitReason::Code, Some(42)));
        vmm.serial().take_output()
    }

    /// Run up to an access, snapshot right behind it, and finish.
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
            vmm.wait(Some(Duration::from_secs(60)), &|| Ok(()), |until| turn(&vmm, until)).unwrap();
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
