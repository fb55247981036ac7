//! `KvmVm`: one KVM virtual machine with its memory slots, interrupt controller and vCPUs.
//! Any thread may call it; each vCPU's ioctls run on its own thread while that thread lives.

mod interrupts;
mod life;
mod restore;
mod shape;
mod vcpus;

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY,
    kvm_enable_cap, kvm_mp_state, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

pub use interrupts::{IRQ_LINES, IoEvent};
pub use shape::Shape;

use self::vcpus::Vcpus;
use crate::config::{ExitPort, FlatBoot, VmmConfig};
use crate::cpu::{CpuMode, cpuid, msrs, regs, tables};
use crate::devices;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitHandler};
use crate::fixup;
use crate::kvm::open_kvm;
use crate::layout;
use crate::memory::GuestMemory;
use crate::process::ProcessTag;
use crate::resources::{Kind, Resource, Resources};
use crate::sync::{Mutex, rank};
use crate::vcpu::{self, ExitRouter, RunState, Vcpu, VcpuThread, VmRunState};

/// A KVM virtual machine whose vCPUs tell `EH` when their guest ends.
pub struct KvmVm<EH: ExitHandler> {
    /// Before `fd` and `memory`: fields drop in this order, and the vCPUs must go first.
    vcpus: Vcpus,
    fd: Arc<VmFd>,
    memory: GuestMemory,
    shared: Arc<vcpu::Shared<EH>>,
    mode: CpuMode,
    /// Where a flat guest's stacks end.
    code: Option<u64>,
    fixups: Arc<fixup::Counts>,
    has_fixups: bool,
    irqchip: bool,
    pit: bool,
    /// A bit for each interrupt line that [`Self::set_irq_line`] holds high.
    lines: Mutex<u32, rank::IrqLines>,
    /// The vCPUs have the registers of a first start.
    is_prepared: AtomicBool,
    process_tag: ProcessTag,
}

impl<EH: ExitHandler> fmt::Debug for KvmVm<EH> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVm").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl<EH: ExitHandler + Send + Sync + 'static> KvmVm<EH> {
    /// Create the machine: interrupt controller, PIT, memory slots, vCPUs, in the order that costs
    /// least.
    ///
    /// # Errors
    /// When KVM refuses a part.
    pub fn new(
        config: &VmmConfig,
        memory: GuestMemory,
        router: Arc<ExitRouter>,
        exit_handler: EH,
    ) -> Result<Self> {
        let kvm = open_kvm()?;
        let fd = create_vm(&kvm)?;
        create_irqchip(&fd, config.has_irqchip(), config.has_pit())?;
        memory.kvm_slots().attach(&fd)?;
        let table = cpuid::guest_cpuid(&kvm, &config.cpu)?;
        let vcpus = create_vcpus(&kvm, &fd, config, &table, &router, &memory)?;
        let fixups = Arc::default();
        if config.cpu.fixups {
            switch_fixups_on(&fd, &vcpus, &fixups)?;
        }
        tables::write(&memory, config.mode(), || cpuid::has(&table, "pdpe1gb"))?;
        let shared =
            vcpu::Shared { exit_handler, run_state: RunState::default(), exit: Mutex::new(None) };
        let code = match &config.boot {
            crate::config::Boot::Flat(FlatBoot { address, .. }) => Some(*address),
            _ => None,
        };
        Ok(Self {
            vcpus: Vcpus::new(vcpus),
            fd,
            memory,
            shared: Arc::new(shared),
            mode: config.mode(),
            code,
            fixups,
            has_fixups: config.cpu.fixups,
            irqchip: config.has_irqchip(),
            pit: config.has_pit(),
            lines: Mutex::default(),
            is_prepared: AtomicBool::new(false),
            process_tag: ProcessTag::current(),
        })
    }

    /// A machine of nothing: no memory, no devices, no vCPUs.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn bare(exit_handler: EH) -> Result<Self> {
        let fd = create_vm(&open_kvm()?)?;
        let memory = GuestMemory::empty();
        claim_for_kvm(memory.resources(), false)?;
        memory.kvm_slots().attach(&fd)?;
        let shared =
            vcpu::Shared { exit_handler, run_state: RunState::default(), exit: Mutex::new(None) };
        Ok(Self {
            vcpus: Vcpus::default(),
            fd,
            memory,
            shared: Arc::new(shared),
            mode: CpuMode::Real16,
            code: None,
            fixups: Arc::default(),
            has_fixups: false,
            irqchip: false,
            pit: false,
            lines: Mutex::default(),
            // Whoever makes it sets its registers.
            is_prepared: AtomicBool::new(true),
            process_tag: ProcessTag::current(),
        })
    }

    /// Add a vCPU as KVM makes it: at the reset vector, with a CPUID that says nothing.
    ///
    /// # Errors
    /// When the machine has run, there is one of this number, or KVM refuses it.
    pub fn create_vcpu(&self, id: u64) -> Result<Arc<vcpu::VcpuHandle>> {
        self.check_process()?;
        self.vcpus.add(|| {
            if self.state() != VmRunState::Created {
                let detail = "the machine has run: it keeps its vCPUs";
                return Err(Error::new(ErrorKind::State, "create_vcpu", detail));
            }
            let fd = self.fd.create_vcpu(id).map_err(|e| Error::kvm("KVM_CREATE_VCPU", e))?;
            VcpuThread::new(id, fd, Arc::default(), self.memory.clone())
        })
    }

    /// Put the vCPUs where a first run would start them, so that they can be looked into and
    /// changed before.
    ///
    /// # Errors
    /// When KVM refuses the registers.
    pub fn prepare(&self, address: u64) -> Result<()> {
        self.check_process()?;
        if self.state() != VmRunState::Created || self.is_prepared.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.vcpus
            .each(|handle| handle.handle().with_vcpu(|vcpu| self.set_start_state(vcpu, address)))
    }

    /// Where a run that is to start at `address` has to put the vCPUs; none when they stand there,
    /// or further on.
    #[must_use]
    pub fn first_address(&self, address: u64) -> Option<u64> {
        let is_first =
            self.state() == VmRunState::Created && !self.is_prepared.load(Ordering::Acquire);
        is_first.then_some(address)
    }

    /// Registers of a first start.
    fn set_start_state(&self, vcpu: &mut Vcpu, address: u64) -> Result<()> {
        vcpu.has_page_registers = false;
        if self.mode == CpuMode::Linux64 && vcpu.id != 0 {
            return Ok(()); // waits for INIT and SIPI
        }
        let mut sregs = vcpu.fd.get_sregs().map_err(|e| Error::kvm("KVM_GET_SREGS", e))?;
        regs::set_start_sregs(&mut sregs, self.mode, address);
        vcpu.fd.set_sregs(&sregs).map_err(|e| Error::kvm("KVM_SET_SREGS", e))?;
        let code = self.code.unwrap_or(address);
        let start = regs::start_regs(self.mode, address, code, vcpu.id);
        vcpu.fd.set_regs(&start).map_err(|e| Error::kvm("KVM_SET_REGS", e))?;
        if self.irqchip && vcpu.id != 0 {
            let state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            vcpu.fd.set_mp_state(state).map_err(|e| Error::kvm("KVM_SET_MP_STATE", e))?;
        }
        Ok(())
    }
}

impl<EH: ExitHandler> KvmVm<EH> {
    /// Tells its vCPUs' threads from all others.
    pub(crate) fn id(&self) -> usize {
        self.shared.id()
    }

    /// Whether this is the thread of one of its vCPUs, in a callback.
    #[must_use]
    pub fn has_this_thread(&self) -> bool {
        vcpu::is_thread_of(self.shared.id())
    }

    /// Where the machine stands.
    #[must_use]
    pub fn state(&self) -> VmRunState {
        self.shared.run_state.get()
    }

    /// Wait until the machine stands at one of these; none when the time passed first.
    #[must_use]
    pub fn wait_for(&self, wanted: &[VmRunState], timeout: Option<Duration>) -> Option<VmRunState> {
        self.shared.run_state.wait_for(wanted, timeout)
    }

    /// [`Self::wait_for`] until a time, or until `interrupt` turns readable or a signal comes.
    ///
    /// # Errors
    /// When the process has no file descriptor left, and on the thread of one of its vCPUs, which
    /// would wait for itself.
    pub fn wait_for_or(
        &self,
        wanted: &[VmRunState],
        deadline: Option<Instant>,
        interrupt: Option<RawFd>,
    ) -> Result<Option<VmRunState>> {
        if self.has_this_thread() {
            let detail = "a callback on a vCPU's thread cannot wait for the machine it belongs to";
            return Err(Error::new(ErrorKind::State, "wait", detail));
        }
        let found = self.shared.run_state.wait_for_or(wanted, deadline, interrupt);
        found.map_err(|e| Error::os(ErrorKind::Kvm, "eventfd", &e))
    }

    /// The vCPUs, to be looked into while they are at rest.
    #[must_use]
    pub fn handles(&self) -> Vec<Arc<vcpu::VcpuHandle>> {
        self.vcpus.handles()
    }

    /// How the guest ended, once it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.shared.exit.lock().clone()
    }

    /// The instructions that KVM refused and that were executed here.
    #[must_use]
    pub fn fixups(&self) -> &Arc<fixup::Counts> {
        &self.fixups
    }

    /// What answers where: memory, devices, KVM's chips and interrupt lines.
    ///
    /// # Errors
    /// In a forked child.
    pub fn resources(&self) -> Result<Vec<Resource>> {
        self.check_process()?;
        Ok(self.memory.resources().all())
    }

    /// The machine's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether this is a forked child's copy of a machine that its parent runs.
    #[must_use]
    pub fn is_forked_child(&self) -> bool {
        self.process_tag.is_forked_child()
    }

    /// # Errors
    /// In a forked child: KVM ties a machine to the process that made it.
    pub fn check_process(&self) -> Result<()> {
        self.process_tag.check("machine")
    }
}

impl<EH: ExitHandler> Drop for KvmVm<EH> {
    fn drop(&mut self) {
        if self.is_forked_child() {
            self.vcpus.forget();
            return;
        }
        self.close();
        self.vcpus.leave();
    }
}

/// Claim what KVM and the built-in devices answer, before anything that names it is written.
///
/// # Errors
/// When there is something else already.
pub(crate) fn claim_platform(
    resources: &Resources,
    irqchip: bool,
    exit_port: ExitPort,
) -> Result<()> {
    claim_for_kvm(resources, irqchip)?;
    devices::claim(resources, irqchip, exit_port)
}

/// Claim what KVM answers itself: pages of its own and, with an interrupt controller, the chips.
///
/// # Errors
/// [`ErrorKind::Memory`] when there is something else already.
fn claim_for_kvm(resources: &Resources, irqchip: bool) -> Result<()> {
    let claim = |kind, (start, length), name: &str| {
        resources.claim(kind, (start, length), name).map_err(|other| {
            let detail = format!("{name} overlaps {other}");
            Error::new(ErrorKind::Memory, format!("{start:#x}"), detail)
                .hint("leave that range out: add memory below and above it")
        })
    };
    for (range, name) in layout::kernel_addresses(irqchip) {
        claim(Kind::Mmio, range, name)?;
    }
    let ports = layout::KERNEL_PORTS.into_iter().filter(|_| irqchip);
    ports.into_iter().try_for_each(|(range, name)| claim(Kind::Pio, range, name))
}

/// A VM with the pages that KVM itself needs on some processors.
fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>> {
    let fd = kvm.create_vm().map_err(|e| Error::kvm("KVM_CREATE_VM", e))?;
    fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(|e| Error::kvm("KVM_SET_IDENTITY_MAP_ADDR", e))?;
    fd.set_tss_address(layout::KVM_TSS).map_err(|e| Error::kvm("KVM_SET_TSS_ADDR", e))?;
    Ok(Arc::new(fd))
}

fn create_irqchip(fd: &VmFd, has_irqchip: bool, has_pit: bool) -> Result<()> {
    // Before the memory slots: KVM waits for its readers at each slot that comes before a
    // controller.
    if has_irqchip {
        fd.create_irq_chip().map_err(|e| Error::kvm("KVM_CREATE_IRQCHIP", e))?;
    }
    if has_pit {
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(|e| Error::kvm("KVM_CREATE_PIT2", e))?;
    }
    Ok(())
}

/// Have KVM hand over every instruction it cannot emulate, also those of ring 3, before it raises
/// #UD.
fn switch_fixups_on(fd: &VmFd, vcpus: &[VcpuThread], counts: &Arc<fixup::Counts>) -> Result<()> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..Default::default() };
    cap.args[0] = 1;
    fd.enable_cap(&cap).map_err(|e| {
        let error = Error::kvm("KVM_CAP_EXIT_ON_EMULATION_FAILURE", e);
        Error { at: "cpu.fixups".into(), ..error }.hint("Linux has it since 5.14")
    })?;
    vcpus.iter().try_for_each(|handle| {
        handle.handle().with_vcpu(|vcpu| {
            vcpu.fixups = Some(Arc::clone(counts));
            Ok(())
        })
    })
}

fn create_vcpus(
    kvm: &Kvm,
    fd: &VmFd,
    config: &VmmConfig,
    table: &[kvm_bindings::kvm_cpuid_entry2],
    router: &Arc<ExitRouter>,
    memory: &GuestMemory,
) -> Result<Vec<VcpuThread>> {
    let most = u64::try_from(kvm.get_max_vcpus()).unwrap_or(1);
    if config.cpu.vcpus > most {
        let detail = format!("{} is more than this KVM's {most}", config.cpu.vcpus);
        return Err(Error::new(ErrorKind::Config, "cpu.vcpus", detail));
    }
    let count = u8::try_from(config.cpu.vcpus).unwrap_or(u8::MAX);
    (0..count)
        .map(|id| {
            let vcpu = create_vcpu(fd, config, table, id, count)?;
            VcpuThread::new(u64::from(id), vcpu, Arc::clone(router), memory.clone())
        })
        .collect()
}

fn create_vcpu(
    fd: &VmFd,
    config: &VmmConfig,
    table: &[kvm_bindings::kvm_cpuid_entry2],
    id: u8,
    count: u8,
) -> Result<VcpuFd> {
    let vcpu = fd.create_vcpu(u64::from(id)).map_err(|e| Error::kvm("KVM_CREATE_VCPU", e))?;
    let cpuid = cpuid::for_vcpu(table, id, count)?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| Error::kvm("KVM_SET_CPUID2", e))?;
    if config.mode() == CpuMode::Linux64 {
        msrs::set_boot_msrs(&vcpu)?;
    }
    if config.has_irqchip() {
        msrs::set_lapic_lines(&vcpu)?;
    }
    Ok(vcpu)
}
