//! `Vmm`: builds a machine from a configuration, and gives access to its parts.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use event_manager::SubscriberId;

use super::instruments::Instruments;
use super::parts::{Parts, Vm, event_loop};
use super::resets::Resets;
use super::runner::{Runner, closed};
use super::virtio;

use crate::boot;
use crate::config::{PcPart, Platform, VmmConfig};
use crate::cpu::Start;
use crate::debug::Symbols;
use crate::devices::{self, MachineFacts, Serial, Streams, Vga};
use crate::error::{Error, Result};
use crate::event::EventManager;
use crate::exit_handler::{Exit, WrappedExitHandler};
use crate::fixup::Counts;
use crate::layout;
use crate::memory::GuestMemory;
use crate::process::ProcessTag;
use crate::sync::{Condvar, Mutex, rank};
use crate::trace::Trace;
use crate::vcpu::{ExitRouter, Stats, VcpuHandle, VmRunState};
use crate::virtio::{Attached, Place};
use crate::vm::{KvmVm, claim_platform};

/// A machine: its KVM side, its devices, and the event loop they share.
#[derive(Debug)]
pub struct Vmm {
    /// `None` once it is closed.
    pub(super) vm: Mutex<Option<Arc<Vm>>, rank::VmmParts>,
    /// `None` once it is closed. Other holders may keep them alive.
    pub(super) loop_parts: Mutex<Option<LoopParts>, rank::OwnSubscribers>,
    pub(super) process_tag: ProcessTag,
    pub(super) router: Arc<ExitRouter>,
    instruments: Instruments,
    pub(super) serial: Arc<Serial>,
    /// The other ports that print, in the order of [`PcPart::PRINTING`].
    others: [Option<Arc<Serial>>; 4],
    vga: Option<Arc<Vga>>,
    fixups: Arc<Counts>,
    /// The address at which the vCPUs start.
    pub(super) entry: u64,
    /// The parts that a device of the program has replaced are taken out.
    pub(super) platform: Mutex<Platform, rank::Platform>,
    /// Identifies the threads of its vCPUs.
    pub(super) vm_id: usize,
    pub(super) resets: Resets,
    /// A stream of the console has failed; further output is dropped.
    pub(super) has_failed: AtomicBool,
    /// `stop` or `close` was called since the last run.
    pub(super) is_stop_requested: AtomicBool,
    pub(super) runner: Mutex<Runner, rank::Runner>,
    pub(super) run_ended: Condvar,
}

/// A machine's event loop and what it has registered there.
#[derive(Debug)]
pub(super) struct LoopParts {
    pub(super) event_manager: Arc<EventManager>,
    pub(super) exit_handler: WrappedExitHandler,
    /// The machine's own subscribers, which are removed with it.
    pub(super) subscribers: Vec<SubscriberId>,
    /// The virtio devices, in the order of their addresses.
    pub(super) virtio: Vec<Attached>,
}

impl TryFrom<VmmConfig> for Vmm {
    type Error = Error;

    fn try_from(config: VmmConfig) -> Result<Self> {
        Self::build(config, None, &|| Ok(()))
    }
}

/// The memory of a machine with what it boots, how that starts, and where its virtio devices are.
fn load(
    config: &VmmConfig,
    interrupted: &dyn Fn() -> Result<()>,
) -> Result<(GuestMemory, Start, Vec<Place>)> {
    config.validate()?;
    let memory = GuestMemory::new(config.memory.size_mib << 20)?;
    claim_platform(memory.resources(), &config.platform())?;
    let places = virtio::places(config, memory.resources())?;
    let start = boot::load(config, &memory, &places, interrupted)?;
    Ok((memory, start, places))
}

impl Vmm {
    /// Check a configuration as far as this is possible without KVM: its values, and that its files
    /// can be loaded.
    ///
    /// # Errors
    /// As for [`Self::build`].
    pub fn check(config: &VmmConfig, interrupted: &dyn Fn() -> Result<()>) -> Result<()> {
        load(config, interrupted)?;
        boot::fw_cfg_files(config, interrupted).map(drop)
    }

    /// A machine in a shared event loop, or with `None` in a new one of its own.
    ///
    /// # Errors
    /// If a value is invalid, a file cannot be loaded, or KVM refuses any part. The error of
    /// `interrupted`, which is called while loading waits for a file.
    pub fn build(
        config: VmmConfig,
        shared: Option<Arc<EventManager>>,
        interrupted: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let platform = config.platform();
        let (memory, start, places) = load(&config, interrupted)?;
        let (event_manager, exit_handler) = event_loop(shared)?;
        let router = Arc::new(ExitRouter::default());
        let vm = KvmVm::new(&config, memory, start, Arc::clone(&router), exit_handler.clone())?;
        let files = boot::fw_cfg_files(&config, interrupted)?;
        let facts = MachineFacts::of(&config, vm.memory(), files);
        let streams = Streams { serial: config.serial, others: config.others };
        let attached =
            devices::attach(&router.buses, |line| vm.irq(line), &streams, &platform, &facts)?;
        let entry = start.entry;
        let virtio = virtio::attach_all(config.virtio, &places, &vm, &router)?;
        let parts = Parts { vm, event_manager, exit_handler, router, attached, virtio, entry };
        Self::assemble(parts, streams, platform)
    }

    /// Assemble the machine from these parts, in its event loop.
    pub(super) fn assemble(parts: Parts, streams: Streams, platform: Platform) -> Result<Self> {
        let Parts { vm, event_manager, exit_handler, router, attached, virtio, entry } = parts;
        let mut subscribers = vec![event_manager.add_subscriber(Box::new(exit_handler.clone()))];
        subscribers.extend(attached.connect(streams, &event_manager)?);
        subscribers.extend(virtio.iter().filter_map(|device| device.connect(&event_manager)));
        let fixups = Arc::clone(vm.fixups());
        let vm_id = vm.id();
        let stats = Stats::new(vm.handles().len() as u64, virtio::stats_of(&virtio));
        let instruments = Instruments::new(stats, &router, &event_manager);
        Ok(Self {
            vm: Mutex::new(Some(Arc::new(vm))),
            loop_parts: Mutex::new(Some(LoopParts {
                event_manager,
                exit_handler,
                subscribers,
                virtio,
            })),
            process_tag: ProcessTag::current(),
            router,
            instruments,
            serial: attached.serial,
            others: attached.others,
            vga: attached.vga,
            fixups,
            entry,
            platform: Mutex::new(platform),
            vm_id,
            resets: Resets::default(),
            has_failed: AtomicBool::new(false),
            is_stop_requested: AtomicBool::new(false),
            runner: Mutex::default(),
            run_ended: Condvar::new(),
        })
    }
}

impl Vmm {
    /// The handles of the vCPUs. Before the first run, their registers are those with which it
    /// starts.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the machine is closed.
    pub fn vcpus(&self) -> Result<Vec<Arc<VcpuHandle>>> {
        let vm = self.vm()?;
        vm.prepare(self.entry)?;
        Ok(vm.handles())
    }

    /// The KVM side of the machine.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if it is closed.
    pub fn vm(&self) -> Result<Arc<KvmVm<WrappedExitHandler>>> {
        self.vm.lock().clone().ok_or_else(closed)
    }

    /// The event manager whose loop `run` runs.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the machine is closed.
    pub fn event_manager(&self) -> Result<Arc<EventManager>> {
        let loop_parts = self.loop_parts.lock();
        loop_parts.as_ref().map(|own| Arc::clone(&own.event_manager)).ok_or_else(closed)
    }

    /// The virtio devices, in the order of their addresses.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the machine is closed.
    pub fn virtio(&self) -> Result<Vec<Attached>> {
        let loop_parts = self.loop_parts.lock();
        loop_parts.as_ref().map(|own| own.virtio.clone()).ok_or_else(closed)
    }

    /// The error of a call that has not found a device. If another thread has closed the machine
    /// meanwhile, that is the reason.
    pub(super) fn closed_or(&self, error: Error) -> Error {
        self.vm().err().unwrap_or(error)
    }

    /// How the guest ended; `None` if it has not.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the machine is closed.
    pub fn exit(&self) -> Result<Option<Exit>> {
        Ok(self.vm()?.exit())
    }

    /// The handler that ends a run.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the machine is closed.
    pub fn exit_handler(&self) -> Result<WrappedExitHandler> {
        let loop_parts = self.loop_parts.lock();
        loop_parts.as_ref().map(|own| own.exit_handler.clone()).ok_or_else(closed)
    }

    /// The router of the vCPUs' exits: the buses, hooks and observers.
    #[must_use]
    pub fn router(&self) -> &Arc<ExitRouter> {
        &self.router
    }

    /// Its counters and its trace.
    #[must_use]
    pub fn instruments(&self) -> &Instruments {
        &self.instruments
    }

    /// See [`Instruments::start_trace`].
    ///
    /// # Errors
    /// Also [`crate::error::ErrorKind::State`] if the machine is closed.
    pub fn start_trace(&self, path: &Path) -> Result<Arc<Trace>> {
        self.vm()?.check_process()?;
        self.instruments.start_trace(path)
    }

    /// Counts of the instructions that KVM refused and fix-ups executed.
    #[must_use]
    pub fn fixups(&self) -> &Counts {
        &self.fixups
    }

    /// The first serial port.
    #[must_use]
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// Every port that prints, with its key in the configuration.
    pub fn serials(&self) -> impl Iterator<Item = (&'static str, &Arc<Serial>)> {
        let others = PcPart::PRINTING.into_iter().zip(&self.others);
        let others = others.filter_map(|(part, port)| Some((part.name(), port.as_ref()?)));
        std::iter::once(("com1", &self.serial)).chain(others)
    }

    /// The registers of the VGA text screen, if the machine has them.
    #[must_use]
    pub fn vga(&self) -> Option<&Arc<Vga>> {
        self.vga.as_ref()
    }

    /// Bytes of output that consumers have not written yet.
    pub(super) fn backlog(&self) -> usize {
        self.serials().map(|(_, port)| port.backlog()).sum()
    }

    /// The failure of a stream.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.serials().find_map(|(_, port)| port.take_failure())
    }

    /// Take the text that ended a run.
    #[must_use]
    pub fn take_match(&self) -> Option<Vec<u8>> {
        self.serials().find_map(|(_, port)| port.take_match())
    }

    /// Make every wait for output look again.
    pub(super) fn tell_watches(&self) {
        self.serials().for_each(|(_, port)| port.tell_watches());
    }

    /// Guest memory.
    ///
    /// # Errors
    /// If the machine is closed, or in a forked child.
    pub fn memory(&self) -> Result<GuestMemory> {
        let vm = self.vm()?;
        vm.check_process()?;
        Ok(vm.memory().clone())
    }

    /// The addresses of what an ELF program has names for; none for other guests.
    ///
    /// # Errors
    /// When the machine is closed, or in a forked child.
    pub fn symbols(&self) -> Result<BTreeMap<String, u64>> {
        let memory = self.memory()?;
        let read = |at| memory.load::<u64>(at).ok();
        Ok(Symbols::at(layout::SYMBOLS, &read).map(|symbols| symbols.all()).unwrap_or_default())
    }

    /// The machine's run state.
    #[must_use]
    pub fn state(&self) -> VmRunState {
        self.vm().map_or(VmRunState::Closed, |vm| vm.state())
    }
}

impl Drop for Vmm {
    /// The loop may be shared: the machine's subscribers must not outlive it there.
    fn drop(&mut self) {
        self.release_last();
    }
}
