//! `Vmm`: a configuration becomes a machine, top to bottom, and its parts.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use event_manager::SubscriberId;

use super::instruments::Watching;
use super::parts::Parts;
use super::resets::Resets;
use super::runner::{Runner, closed};

use crate::boot;
use crate::config::{ExitPort, SerialConfig, VmmConfig};
use crate::devices::{self, Access, Device, Serial};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::exit_handler::WrappedExitHandler;
use crate::fixup::Counts;
use crate::layout;
use crate::memory::GuestMemory;
use crate::process::ProcessTag;
use crate::sync::{Condvar, Mutex, rank};
use crate::trace::Trace;
use crate::vcpu::{ExitRouter, VcpuHandle, VmRunState};
use crate::vm::{KvmVm, claim_platform};

/// A machine: its KVM side, its devices, and the event loop they share.
#[derive(Debug)]
pub struct Vmm {
    /// None once it is closed.
    pub(super) vm: Mutex<Option<Arc<KvmVm<WrappedExitHandler>>>, rank::VmmParts>,
    /// None once it is closed: then whoever else holds its parts has them.
    pub(super) in_loop: Mutex<Option<InLoop>, rank::OwnSubscribers>,
    pub(super) process_tag: ProcessTag,
    pub(super) router: Arc<ExitRouter>,
    watching: Watching,
    pub(super) serial: Arc<Serial>,
    fixups: Arc<Counts>,
    /// Where the vCPUs start.
    pub(super) entry: u64,
    pub(super) exit_port: ExitPort,
    /// Tells a thread of one of its vCPUs.
    pub(super) vm_id: usize,
    pub(super) resets: Resets,
    /// A stream of the console has failed, and what comes is dropped.
    pub(super) has_failed: AtomicBool,
    pub(super) runner: Mutex<Runner, rank::Runner>,
    pub(super) run_ended: Condvar,
}

/// What a machine has in the event loop that its runs turn.
#[derive(Debug)]
pub(super) struct InLoop {
    pub(super) event_manager: Arc<EventManager>,
    pub(super) exit_handler: WrappedExitHandler,
    /// Subscribers that are the machine's own and go with it.
    pub(super) subscribers: Vec<SubscriberId>,
}

impl TryFrom<VmmConfig> for Vmm {
    type Error = Error;

    fn try_from(config: VmmConfig) -> Result<Self> {
        Self::build(config, None, &|| Ok(()))
    }
}

impl Vmm {
    /// A machine in a loop that others use too; none for one of its own.
    ///
    /// # Errors
    /// When a value cannot be used, a file cannot be loaded, or KVM refuses a part;
    /// when `interrupted`, which is asked while a file has to be waited for, says so.
    pub fn build(
        config: VmmConfig,
        shared: Option<Arc<EventManager>>,
        interrupted: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        config.validate()?;
        let memory = GuestMemory::new(config.memory.size_mib << 20)?;
        claim_platform(memory.resources(), config.has_irqchip(), config.exit_port)?;
        let entry = boot::load(&config, &memory, interrupted)?;
        let event_manager = match shared {
            Some(shared) => shared.share().map(|()| shared)?,
            None => Arc::new(EventManager::new()?),
        };
        let exit_handler =
            WrappedExitHandler::new().map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?;
        let router = Arc::new(ExitRouter::default());
        let vm = KvmVm::new(&config, memory, Arc::clone(&router), exit_handler.clone())?;
        let irq = vm.irq(layout::COM1_IRQ);
        let serial = devices::attach(&router.buses, irq, &config.serial, config.exit_port)?;
        let parts = Parts { vm, event_manager, exit_handler, router, serial, entry };
        Self::assemble(parts, config.serial, config.exit_port)
    }

    /// The machine of these parts, in its loop.
    pub(super) fn assemble(
        parts: Parts,
        streams: SerialConfig,
        exit_port: ExitPort,
    ) -> Result<Self> {
        let Parts { vm, event_manager, exit_handler, router, serial, entry } = parts;
        let mut subscribers = vec![event_manager.add_subscriber(Box::new(exit_handler.clone()))];
        subscribers.extend(devices::connect(&serial, streams, &event_manager)?);
        let fixups = Arc::clone(vm.fixups());
        let vm_id = vm.id();
        let watching = Watching::new(vm.handles().len() as u64, &router, &event_manager);
        Ok(Self {
            vm: Mutex::new(Some(Arc::new(vm))),
            in_loop: Mutex::new(Some(InLoop { event_manager, exit_handler, subscribers })),
            process_tag: ProcessTag::current(),
            router,
            watching,
            serial,
            fixups,
            entry,
            exit_port,
            vm_id,
            resets: Resets::default(),
            has_failed: AtomicBool::new(false),
            runner: Mutex::default(),
            run_ended: Condvar::new(),
        })
    }
}

impl Vmm {
    /// The vCPUs, to be looked into while they are at rest. Before the first run they stand where
    /// it will start.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed.
    pub fn vcpus(&self) -> Result<Vec<Arc<VcpuHandle>>> {
        let vm = self.vm()?;
        vm.prepare(self.entry)?;
        Ok(vm.handles())
    }

    /// The KVM side of the machine.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when it is closed.
    pub fn vm(&self) -> Result<Arc<KvmVm<WrappedExitHandler>>> {
        self.vm.lock().clone().ok_or_else(closed)
    }

    /// The event manager whose loop `run` turns.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed.
    pub fn event_manager(&self) -> Result<Arc<EventManager>> {
        let in_loop = self.in_loop.lock();
        in_loop.as_ref().map(|own| Arc::clone(&own.event_manager)).ok_or_else(closed)
    }

    /// Put a device on one of the buses, at any time.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the range is no such bus's, or something else answers there.
    pub fn add_device(
        &self,
        access: Access,
        base: u64,
        length: u64,
        device: Arc<dyn Device>,
    ) -> Result<()> {
        let vm = self.vm()?;
        vm.check_process()?;
        if access == Access::Pio && base.saturating_add(length) > 0x1_0000 {
            let detail = "ports go from 0 to 0xffff";
            return Err(Error::new(ErrorKind::Config, format!("{base:#x}"), detail));
        }
        let resources = vm.memory().resources();
        devices::claim_range(resources, access, (base, length), device.name())?;
        self.router.buses.bus(access).add(base, length, device);
        Ok(())
    }

    /// Take a device away again. An access that has found it already is still answered.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when no device's range starts there.
    pub fn remove_device(&self, access: Access, base: u64) -> Result<()> {
        let vm = self.vm()?;
        drop(self.router.buses.bus(access).remove(base)?);
        vm.memory().resources().release(access.kind(), base);
        Ok(())
    }

    /// The handler that ends a run.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed.
    pub fn exit_handler(&self) -> Result<WrappedExitHandler> {
        let in_loop = self.in_loop.lock();
        in_loop.as_ref().map(|own| own.exit_handler.clone()).ok_or_else(closed)
    }

    /// Where the vCPUs' exits go: the buses, hooks and observers.
    #[must_use]
    pub fn router(&self) -> &Arc<ExitRouter> {
        &self.router
    }

    /// What it can be watched with: counters, and a trace.
    #[must_use]
    pub fn watching(&self) -> &Watching {
        &self.watching
    }

    /// See [`Watching::start_trace`].
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed, too.
    pub fn start_trace(&self, path: &Path) -> Result<Arc<Trace>> {
        self.vm()?.check_process()?;
        self.watching.start_trace(path)
    }

    /// The instructions that KVM refused and that were executed here.
    #[must_use]
    pub fn fixups(&self) -> &Counts {
        &self.fixups
    }

    /// The first serial port.
    #[must_use]
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// Guest memory.
    ///
    /// # Errors
    /// When the machine is closed, or in a forked child.
    pub fn memory(&self) -> Result<GuestMemory> {
        let vm = self.vm()?;
        vm.check_process()?;
        Ok(vm.memory().clone())
    }

    /// Where the machine stands.
    #[must_use]
    pub fn state(&self) -> VmRunState {
        self.vm().map_or(VmRunState::Closed, |vm| vm.state())
    }
}

impl Drop for Vmm {
    /// In a loop that others use too, the machine's subscribers must not outlive it.
    fn drop(&mut self) {
        self.release_last();
    }
}
