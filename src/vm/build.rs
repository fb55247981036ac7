//! Creates a `KvmVm`: from a configuration, with the topology of a snapshot, or bare. On the
//! caller's thread.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X2APIC_API, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
    kvm_pit_config,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::KvmVm;
use super::noapic;
use super::spec::MachineSpec;
use super::vcpus::Vcpus;
use crate::config::{Platform, VmmConfig};
use crate::cpu::cpuid::{self, GuestCpuid};
use crate::cpu::{CpuMode, Start, msrs, tables};
use crate::devices;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::ExitHandler;
use crate::fixup;
use crate::hop::hop;
use crate::kvm::{self, max_vcpus, open_kvm};
use crate::layout;
use crate::memory::GuestMemory;
use crate::process::ProcessTag;
use crate::resources::{ResourceKind, Resources};
use crate::sync::Mutex;
use crate::vcpu::{self, ExitRouter, RunState, VcpuHandle};

/// The in-kernel parts of a machine besides vCPUs and memory.
#[derive(Clone, Copy, Debug, Default)]
struct Chips {
    irqchip: bool,
    pit: bool,
    fixups: bool,
    /// Ids of LAPICs that need x2APIC mode.
    x2apic: bool,
}

/// Whether the LAPICs of a machine have to be in x2APIC mode.
fn needs_x2apic(irqchip: bool, vcpus: u64) -> bool {
    irqchip && vcpus > layout::MAX_XAPIC_VCPUS
}

impl<EH: ExitHandler + Send + Sync + 'static> KvmVm<EH> {
    /// Create the machine: interrupt controller, PIT, memory slots, vCPUs. This order is the
    /// fastest.
    ///
    /// # Errors
    /// If KVM refuses any of them.
    pub fn new(
        config: &VmmConfig,
        memory: GuestMemory,
        start: Start,
        router: Arc<ExitRouter>,
        exit_handler: EH,
    ) -> Result<Self> {
        let kvm = open_kvm()?;
        let (irqchip, pit) = (config.has_irqchip(), config.has_pit());
        let x2apic = needs_x2apic(irqchip, config.cpu.vcpus);
        let chips = Chips { irqchip, pit, fixups: config.cpu.fixups, x2apic };
        check_vcpus(&kvm, config)?;
        let table = cpuid::guest_cpuid(&kvm, &config.cpu)?;
        check_no_execute(start.mode, &table)?;
        check_x2apic(chips, &table)?;
        let mut vm = Self::assemble(&kvm, chips, memory, router, exit_handler)?;
        vm.create_vcpus(0..config.cpu.vcpus, |fd, id| set_up(fd, config, start.mode, &table, id))?;
        tables::write(&vm.memory, start.mode, || table.has("pdpe1gb"))?;
        vm.start = start;
        vm.is_prepared = AtomicBool::new(false);
        Ok(vm)
    }

    /// A machine of this spec. Its vCPUs have no CPUID and no registers yet.
    ///
    /// # Errors
    /// If KVM refuses any of them.
    pub(crate) fn from_spec(
        spec: &MachineSpec,
        memory: GuestMemory,
        router: &Arc<ExitRouter>,
        exit_handler: EH,
    ) -> Result<Self> {
        hop!();
        let kvm = open_kvm()?;
        let most = max_vcpus(&kvm);
        if usize::from(spec.vcpus) > most {
            let detail = format!("{} is more than this KVM's {most}", spec.vcpus);
            return Err(Error::new(ErrorKind::Snapshot, "vcpus", detail));
        }
        let MachineSpec { irqchip, pit, fixups, .. } = *spec;
        let x2apic = needs_x2apic(irqchip, spec.vcpus.into());
        let chips = Chips { irqchip, pit, fixups, x2apic };
        let vm = Self::assemble(&kvm, chips, memory, Arc::clone(router), exit_handler)?;
        vm.create_vcpus(0..u64::from(spec.vcpus), |_, _| Ok(()))?;
        Ok(vm)
    }

    /// A machine without memory, devices and vCPUs.
    ///
    /// # Errors
    /// If KVM refuses it.
    pub fn bare(exit_handler: EH) -> Result<Self> {
        let memory = GuestMemory::empty();
        claim_for_kvm(memory.resources(), false)?;
        Self::assemble(&open_kvm()?, Chips::default(), memory, Arc::default(), exit_handler)
    }

    /// A machine without vCPUs. The caller creates them and sets their registers.
    fn assemble(
        kvm: &Kvm,
        chips: Chips,
        memory: GuestMemory,
        router: Arc<ExitRouter>,
        exit_handler: EH,
    ) -> Result<Self> {
        if !chips.irqchip {
            noapic::keep_one();
        }
        let fd = create_vm(kvm)?;
        if chips.x2apic {
            allow_x2apic_ids(&fd)?;
        }
        create_irqchip(&fd, chips.irqchip, chips.pit)?;
        memory.kvm_slots().attach(&fd)?;
        let (run_state, exit) = (RunState::default(), Mutex::new(None));
        Ok(Self {
            vcpus: Vcpus::default(),
            fd,
            memory,
            shared: Arc::new(vcpu::Shared { exit_handler, run_state, exit }),
            router,
            start: Start::new(CpuMode::Real16, 0),
            fixups: Arc::default(),
            has_fixups: chips.fixups,
            irqchip: chips.irqchip,
            pit: chips.pit,
            lines: Mutex::default(),
            is_prepared: AtomicBool::new(true),
            process_tag: ProcessTag::current(),
        })
    }

    /// Add the vCPUs with these numbers. `set_up` gets each one's descriptor first.
    fn create_vcpus(
        &self,
        ids: impl Iterator<Item = u64>,
        set_up: impl Fn(&VcpuFd, u64) -> Result<()>,
    ) -> Result<()> {
        for id in ids {
            self.vcpus.add(|| {
                let fd = self.create_vcpu_fd(id)?;
                set_up(&fd, id)?;
                vcpu::create(id, fd, Arc::clone(&self.router), self.memory.clone())
            })?;
        }
        if self.has_fixups {
            switch_fixups_on(&self.fd, &self.handles(), &self.fixups)
        } else {
            Ok(())
        }
    }

    pub(super) fn create_vcpu_fd(&self, id: u64) -> Result<VcpuFd> {
        self.fd.create_vcpu(id).map_err(|e| {
            let error = Error::kvm("KVM_CREATE_VCPU", e);
            match e.errno() {
                libc::EMFILE => error.hint("each vCPU needs a file descriptor: ulimit -n"),
                _ => error,
            }
        })
    }
}

/// Claim the addresses of KVM and of the built-in devices, before boot data that names them is
/// written.
///
/// # Errors
/// [`ErrorKind::Memory`] if something else occupies one of them.
pub(crate) fn claim_platform(resources: &Resources, platform: &Platform) -> Result<()> {
    claim_for_kvm(resources, platform.irqchip)?;
    devices::claim(resources, platform)
}

/// Claim the addresses that KVM answers itself: its own pages and, with an interrupt controller,
/// those of the chips.
///
/// # Errors
/// [`ErrorKind::Memory`] if something else occupies one of them.
fn claim_for_kvm(resources: &Resources, irqchip: bool) -> Result<()> {
    let claim = |kind, (start, length), name: &str| {
        resources.claim(kind, (start, length), name).map_err(|other| {
            let detail = format!("{name} overlaps {other}");
            Error::new(ErrorKind::Memory, format!("{start:#x}"), detail)
                .hint("leave that range out: add memory below and above it")
        })
    };
    for (range, name) in layout::kernel_addresses(irqchip) {
        claim(ResourceKind::Mmio, range, name)?;
    }
    let ports = layout::KERNEL_PORTS.into_iter().filter(|_| irqchip);
    ports.into_iter().try_for_each(|(range, name)| claim(ResourceKind::Pio, range, name))
}

/// Create a VM, with the pages that KVM needs for itself on some processors.
fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>> {
    let fd = kvm::create_vm(kvm)?;
    fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(|e| Error::kvm("KVM_SET_IDENTITY_MAP_ADDR", e))?;
    fd.set_tss_address(layout::KVM_TSS).map_err(|e| Error::kvm("KVM_SET_TSS_ADDR", e))?;
    Ok(Arc::new(fd))
}

/// Have KVM use ids of 32 bits for LAPICs, and 255 as one of them.
fn allow_x2apic_ids(fd: &VmFd) -> Result<()> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
    cap.args[0] = u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
    fd.enable_cap(&cap).map_err(|e| {
        let error = Error::kvm("KVM_CAP_X2APIC_API", e);
        Error { at: "cpu.vcpus".into(), ..error }
            .hint("more than 255 vCPUs with an interrupt controller need Linux 4.8 on the host")
    })
}

fn create_irqchip(fd: &VmFd, has_irqchip: bool, has_pit: bool) -> Result<()> {
    // Before the memory slots: otherwise KVM waits for its readers once for each slot.
    if has_irqchip {
        fd.create_irq_chip().map_err(|e| Error::kvm("KVM_CREATE_IRQCHIP", e))?;
    }
    if has_pit {
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(|e| Error::kvm("KVM_CREATE_PIT2", e))?;
    }
    Ok(())
}

/// Have KVM exit for every instruction that it cannot emulate, also in ring 3, instead of raising
/// #UD.
fn switch_fixups_on(
    fd: &VmFd,
    vcpus: &[Arc<VcpuHandle>],
    counts: &Arc<fixup::Counts>,
) -> Result<()> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..Default::default() };
    cap.args[0] = 1;
    fd.enable_cap(&cap).map_err(|e| {
        let error = Error::kvm("KVM_CAP_EXIT_ON_EMULATION_FAILURE", e);
        Error { at: "cpu.fixups".into(), ..error }.hint("Linux has it since 5.14")
    })?;
    vcpus.iter().try_for_each(|handle| {
        handle.with_vcpu(|vcpu| {
            vcpu.fixups = Some(Arc::clone(counts));
            Ok(())
        })
    })
}

/// The page tables of an ELF program say what cannot be executed.
fn check_no_execute(mode: CpuMode, table: &GuestCpuid) -> Result<()> {
    if mode != CpuMode::Program64 || table.has("nx") {
        return Ok(());
    }
    let detail = "an ELF program needs the feature nx, which this vCPU has not";
    Err(Error::new(ErrorKind::Config, "cpu.hide", detail))
}

/// An id of more than 8 bits exists only in x2APIC mode.
fn check_x2apic(chips: Chips, table: &GuestCpuid) -> Result<()> {
    if !chips.x2apic || table.has("x2apic") {
        return Ok(());
    }
    let most = layout::MAX_XAPIC_VCPUS;
    let detail = format!("more than {most} vCPUs with an interrupt controller need x2apic");
    Err(Error::new(ErrorKind::Config, "cpu.hide", detail))
}

fn check_vcpus(kvm: &Kvm, config: &VmmConfig) -> Result<()> {
    let most = u64::try_from(max_vcpus(kvm)).unwrap_or(1);
    if config.cpu.vcpus > most {
        let detail = format!("{} is more than this KVM's {most}", config.cpu.vcpus);
        return Err(Error::new(ErrorKind::Config, "cpu.vcpus", detail));
    }
    Ok(())
}

/// Set a vCPU's CPUID from the configuration, and what a kernel expects firmware to have set.
fn set_up(
    vcpu: &VcpuFd,
    config: &VmmConfig,
    mode: CpuMode,
    table: &GuestCpuid,
    id: u64,
) -> Result<()> {
    let (irqchip, machine) = (config.has_irqchip(), config.cpu.topology());
    table.with_vcpu(u32::try_from(id).unwrap_or(u32::MAX), machine, |cpuid| {
        vcpu.set_cpuid2(cpuid).map_err(|e| Error::kvm("KVM_SET_CPUID2", e))
    })?;
    if mode.starts_one() && mode != CpuMode::Reset {
        msrs::set_boot_msrs(vcpu)?;
    }
    if needs_x2apic(irqchip, config.cpu.vcpus) {
        msrs::set_x2apic_mode(vcpu)?;
    }
    if irqchip && mode != CpuMode::Reset {
        msrs::set_lapic_lines(vcpu)?;
    }
    Ok(())
}
