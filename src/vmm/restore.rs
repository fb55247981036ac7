//! From a snapshot to a machine: `fork` creates one, `reset` changes one in place. Any thread but a
//! vCPU's.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::life::Entering;
use super::machine::Vmm;
use super::parts::{Parts, Vm, event_loop};
use super::virtio;
use crate::config::{SerialConfig, VirtioConfig};
use crate::cpu::cpuid::host_shadows_page_tables;
use crate::devices::{self, Buses, Device, MachineFacts, Streams};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::hop::hop;
use crate::layout;
use crate::limit::Limit;
use crate::memory::{GuestMemory, MemoryRange, ranges};
use crate::snapshot::{
    DeviceState, Snapshot, VcpuStateFormat, chips, confined, cpuid, translations, vcpu,
};
use crate::vcpu::{ExitRouter, Vcpu, VmRunState};
use crate::vm::{KvmVm, claim_platform};

/// What a fork does not take from the snapshot.
#[derive(Debug, Default)]
pub struct ForkConfig {
    /// The streams of its serial port.
    pub serial: SerialConfig,
    /// A shared event loop; `None` for a new one of its own.
    pub event_manager: Option<Arc<EventManager>>,
    /// Configurations of virtio devices by name, in place of what the snapshot has for them.
    pub virtio: Vec<(String, VirtioConfig)>,
}

impl Vmm {
    /// Reset the machine to a snapshot in place: memory, vCPUs, devices and clock. A guest that has
    /// ended can run again; a running guest continues from the snapshot. Returns how many pages of
    /// memory were changed. Outside a run, a pending stop is dropped, because it was for a run of
    /// the replaced guest; `forget_stop` is called then.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine is closed, a run is ending, or the snapshot's machine
    /// has other parts, another CPUID or a device that this machine lacks. Nothing is changed
    /// then. If KVM or a device refuses, or the process is out of memory: the machine may be reset
    /// in part then. Reset it again, or close it.
    pub fn reset(
        &self,
        snapshot: &Snapshot,
        limit: &Limit<'_>,
        forget_stop: impl FnOnce(),
    ) -> Result<u64> {
        let vm = self.vm()?;
        vm.check_process()?;
        vm.check_device_calls("reset")?;
        self.spec(&vm).check_same(&snapshot.spec)?;
        vm.memory().kvm_slots().check(&snapshot.ranges)?;
        snapshot.ranges.iter().try_for_each(|range| range.image.check())?;
        let devices = devices_of(&self.router().buses, snapshot);
        let devices = devices.map_err(|error| self.closed_or(error))?;
        // Outside a run, prevent one from starting. In a run, hold its vCPUs at rest.
        let in_run = self.is_in_run();
        let _running = if in_run { None } else { Some(self.enter_run("reset", Entering::New)?) };
        let _quiesced = vm.quiesce("reset", limit)?;
        vm.handles().iter().try_for_each(|handle| handle.wait_while_leaving(limit))?;
        // Checked only now: a callback that was waited for may have ended the guest.
        if in_run && vm.state() == VmRunState::Exiting {
            let detail = "the guest has ended, and its run is not over yet";
            return Err(Error::new(ErrorKind::State, "reset", detail));
        }
        self.resets.reset(|| {
            let changed = vm.at_rest(limit, |fd, vcpus| bring_back(&vm, fd, vcpus, snapshot))?;
            vm.revive();
            if !in_run {
                // A pending stop was for a run of the replaced guest.
                self.exit_handler()?.take_stop();
                forget_stop();
            }
            virtio::thaw_all(&self.virtio()?, &snapshot.virtio)?;
            restore_devices(&vm, &devices)?;
            Ok(changed / layout::PAGE)
        })
    }

    /// A new machine that continues from a snapshot. The snapshot does not change. The machine
    /// shares every page that it does not write.
    ///
    /// # Errors
    /// If KVM refuses any part, the process is out of memory or descriptors, or a device of the
    /// snapshot is missing.
    pub fn fork(snapshot: &Snapshot, config: ForkConfig) -> Result<Self> {
        hop!();
        let ForkConfig { serial, event_manager, virtio: given } = config;
        let streams = Streams { serial, ..Streams::default() };
        let spec = &snapshot.spec;
        given.iter().try_for_each(|(name, _)| snapshot.virtio_device(name).map(drop))?;
        snapshot.request_xstate()?;
        let memory = GuestMemory::empty();
        for MemoryRange { start, read_only, image } in &snapshot.ranges {
            memory.add_image(*start, image, *read_only)?;
        }
        claim_platform(memory.resources(), &spec.platform())?;
        let (event_manager, exit_handler) = event_loop(event_manager)?;
        let router = Arc::new(ExitRouter::default());
        let vm = KvmVm::from_spec(spec, memory, &router, exit_handler.clone())?;
        vm.at_rest(&Limit::NONE, |fd, vcpus| set_state(&vm, fd, vcpus, snapshot, false))?;
        let (platform, memory) = (spec.platform(), vm.memory().clone());
        let (vcpus, files) = (u64::from(spec.vcpus), Vec::new());
        let facts = MachineFacts { size: 0, vcpus, memory, files };
        let attached =
            devices::attach(&router.buses, |line| vm.irq(line), &streams, &platform, &facts)?;
        let virtio = virtio::attach_saved(&snapshot.virtio, given, &vm, &router)?;
        let entry = 0;
        let parts = Parts { vm, event_manager, exit_handler, router, attached, virtio, entry };
        Self::assemble(parts, streams, platform)
    }

    /// Restore the devices from the snapshot. This is the last step of a fork, once all are
    /// attached.
    ///
    /// # Errors
    /// If a device is missing or refuses its state.
    pub fn restore_devices(&self, snapshot: &Snapshot) -> Result<()> {
        restore_devices(&*self.vm()?, &devices_of(&self.router().buses, snapshot)?)
    }
}

/// A device and the state to restore.
type Restored<'a> = (Arc<dyn Device>, &'a [u8]);

/// Find the device of each state in the snapshot.
///
/// # Errors
/// [`ErrorKind::State`] if a device is missing or cannot restore a state.
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

fn restore_devices(vm: &Vm, devices: &[Restored<'_>]) -> Result<()> {
    let _calls = vm.device_calls();
    devices.iter().try_for_each(|(device, state)| device.restore(state))
}

/// Set everything but memory and devices. docs/snapshots.md gives the order and its reasons.
fn set_state(
    vm: &Vm,
    fd: &VmFd,
    vcpus: &mut [impl std::ops::DerefMut<Target = Vcpu>],
    snapshot: &Snapshot,
    has_stayed: bool,
) -> Result<()> {
    let Snapshot { spec, chips, .. } = snapshot;
    let format = VcpuStateFormat::of(fd, spec.irqchip);
    chips::apply_controllers(fd, spec, chips, &mut vm.lines())?;
    for ((number, vcpu), state) in (0..).zip(vcpus.iter_mut()).zip(&snapshot.vcpus) {
        if vcpu.constant_msrs.is_empty() {
            vcpu.constant_msrs = snapshot.cache.constant_msrs.get().cloned().unwrap_or_default();
        }
        vcpu::apply(vcpu, number, state, format, has_stayed)?;
        vcpu.note_whole_state(snapshot.cache.state);
    }
    snapshot
        .cache
        .constant_msrs
        .get_or_init(|| vcpus.iter().flat_map(|vcpu| vcpu.constant_msrs.clone()).collect());
    chips::apply_timers(fd, spec, chips)
}

fn bring_back(
    vm: &Vm,
    fd: &VmFd,
    vcpus: &mut [impl std::ops::DerefMut<Target = Vcpu>],
    snapshot: &Snapshot,
) -> Result<u64> {
    for ((number, vcpu), state) in (0..).zip(vcpus.iter_mut()).zip(&snapshot.vcpus) {
        cpuid::check(vcpu, number, state)?;
    }
    if vm.memory().kvm_slots().take_touched() {
        vcpus.iter().for_each(|vcpu| vcpu.forget_whole_state());
    }
    let changed = vm.memory().kvm_slots().reset(&snapshot.ranges, || {
        // KVM would complete the replaced guest's last instruction at the next entry, which may
        // write memory.
        vcpus.iter_mut().for_each(|vcpu| vcpu.abandon());
    })?;
    let has_stayed = match vcpus {
        [vcpu] => confined::has_stayed(snapshot, vcpu, &changed),
        _ => false,
    };
    if translations::may_be_stale(snapshot, vm.memory(), &changed) {
        if host_shadows_page_tables() {
            vm.memory().kvm_slots().drop_shadows()?;
        }
        vcpus.iter_mut().try_for_each(|vcpu| vcpu.forget_translations())?;
    }
    set_state(vm, fd, vcpus, snapshot, has_stayed)?;
    Ok(ranges::size(&changed))
}
