//! A vCPU and its registers, class by class, as the bytes of the kernel's structures.

use std::fmt::Write;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, Msrs,
    kvm_cpuid_entry2, kvm_debugregs, kvm_guest_debug, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::dispatch::Dispatch;
use super::exit::{VcpuExit, owned};
use super::kick::ImmediateExit;
use super::run_page::RunPage;
use crate::cpu::cpuid;
use crate::debug::Paging;
use crate::devices::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::fixup;
use crate::kvm::open_kvm;
use crate::memory::GuestMemory;

/// One virtual processor. Its ioctls are made by its own thread, or by another while it is at rest.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) id: u64,
    pub(crate) fd: VcpuFd,
    pub(crate) page: Arc<RunPage>,
    pub(crate) dispatch: Arc<Dispatch>,
    /// After `fd`: as long as the guest can run, its memory is there.
    pub(super) memory: GuestMemory,
    /// Instructions that KVM refuses are executed here and counted; none: they end the run.
    pub(crate) fixups: Option<Arc<fixup::Counts>>,
    /// KVM_RUN has been called: what CPUID says cannot be changed any more.
    pub(crate) has_run: bool,
    /// The guest has been told of the pause that it is in, or has never run.
    pub(crate) is_told_of_pause: bool,
    /// A CPUID table, as snapshots keep it, that is known to be this one's.
    pub(crate) known_cpuid: Option<Vec<u8>>,
    /// Model-specific registers with values that they have and that KVM does not take.
    pub(crate) constant_msrs: Vec<(u32, u64)>,
    /// The last exit was a read, and `answer` may still say what was read.
    pub(crate) awaits_answer: bool,
    /// The device that its last access left without room, where it waits before it enters its
    /// guest.
    pub(super) waits_for: Option<Arc<dyn Device>>,
    /// A port or memory access has been answered and not completed: the next entry does that.
    pub(crate) is_pending: bool,
    /// The run page has the general registers: each exit puts them there (KVM_CAP_SYNC_REGS), as
    /// does `store`.
    pub(crate) has_page_registers: bool,
    /// How often it had come to rest when it did so last.
    pub(crate) rests: u64,
    /// An exit that came when an instruction was completed, for the next to enter the guest.
    pub(crate) waiting: Option<VcpuExit>,
    /// Its exit is being answered by the program's code, which looks into it.
    pub(crate) is_lent: bool,
    /// General registers as they were at the exit, and as that code wants them behind the
    /// instruction.
    pub(crate) changed: Option<Box<Changed>>,
    /// Calls of devices are recorded.
    pub(crate) is_recorded: bool,
    /// The instruction at hand reads memory that came when it had exited.
    pub(super) has_found_memory: bool,
}

/// An instruction makes at most so many accesses of eight bytes: those of XSAVE, with room.
const ABANDONED_PARTS: usize = 4096;

/// What [`Vcpu::changed`] keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Changed {
    pub(crate) from: kvm_regs,
    pub(crate) to: kvm_regs,
}

impl Changed {
    /// The registers after the instruction, with what was changed.
    pub(crate) fn over(&self, after: &kvm_regs) -> kvm_regs {
        let mut regs = *after;
        let words = bytes_mut(&mut regs).chunks_exact_mut(8);
        let pairs = bytes(&self.from).chunks_exact(8).zip(bytes(&self.to).chunks_exact(8));
        for (word, (from, to)) in words.zip(pairs) {
            if from != to {
                word.copy_from_slice(to);
            }
        }
        regs
    }
}

/// A class of registers: the structure that one pair of ioctls moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterClass {
    /// `kvm_regs`
    General,
    /// `kvm_sregs`
    Special,
    /// `kvm_debugregs`
    Debug,
    /// `kvm_vcpu_events`
    Events,
    /// `kvm_mp_state`
    MpState,
    /// `kvm_xcrs`
    Xcrs,
    /// `kvm_xsave`: x87, SSE, AVX
    Xsave,
    /// `kvm_lapic_state`
    Lapic,
}

/// The bytes of a structure of KVM's.
fn bytes<T: IntoBytes + Immutable>(value: &T) -> &[u8] {
    value.as_bytes()
}

fn bytes_mut<T: FromBytes + IntoBytes>(value: &mut T) -> &mut [u8] {
    value.as_mut_bytes()
}

fn kvm<T>(at: &str, result: std::result::Result<T, kvm_ioctls::Error>) -> Result<T> {
    result.map_err(|e| Error::kvm(at, e))
}

impl Vcpu {
    pub(crate) fn new(
        id: u64,
        mut fd: VcpuFd,
        page: Arc<RunPage>,
        dispatch: Arc<Dispatch>,
        memory: GuestMemory,
    ) -> Self {
        fd.set_sync_valid_reg(SyncReg::Register);
        Self {
            id,
            fd,
            page,
            dispatch,
            memory,
            fixups: None,
            has_run: false,
            is_told_of_pause: true,
            known_cpuid: None,
            constant_msrs: Vec::new(),
            awaits_answer: false,
            waits_for: None,
            is_pending: false,
            has_page_registers: false,
            rests: 0,
            waiting: None,
            is_lent: false,
            changed: None,
            is_recorded: false,
            has_found_memory: false,
        }
    }

    /// The memory that its guest sees.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Say what the guest reads, after an exit of [`Self`]'s that waits for it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when none does; [`ErrorKind::Config`] when it is another number of
    /// bytes.
    pub fn answer(&mut self, data: &[u8]) -> Result<()> {
        let at = format!("vcpu_{}", self.id);
        if !self.awaits_answer {
            let detail = "its last exit was no read, or the instruction has been completed since";
            return Err(Error::new(ErrorKind::State, at, detail));
        }
        let wanted = self.page.answer(data);
        if wanted != data.len() {
            let detail = format!("the guest reads {wanted} bytes, not {}", data.len());
            return Err(Error::new(ErrorKind::Config, at, detail));
        }
        self.awaits_answer = false;
        Ok(())
    }

    /// How many bytes the guest waits for; none when it does not.
    #[must_use]
    pub fn wanted(&self) -> Option<usize> {
        self.awaits_answer.then(|| self.page.answer(&[]))
    }

    /// Complete an access that has been answered, so that the registers are those after the
    /// instruction. One that waits for its answer shows those before, as does one whose answer is
    /// being found.
    fn complete(&mut self) {
        if !self.is_pending || self.awaits_answer || self.is_lent || self.waiting.is_some() {
            return;
        }
        self.page.set(true);
        let result = self.fd.run().map(|exit| owned(exit, &self.page));
        self.has_page_registers = true;
        self.is_pending = false;
        // Another access of the instruction, or an end, is left to the next entry.
        self.waiting = result.ok();
    }

    /// It goes on from a pause: tell its watchdogs, which would take the time for a hang. A guest
    /// that does not use KVM's clock is told nothing.
    pub(super) fn tell_of_pause(&mut self) {
        if !std::mem::replace(&mut self.is_told_of_pause, false) {
            // KVM refuses it for such a guest.
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    /// Have these general registers from the next entry on.
    pub(crate) fn enter_with(&mut self, registers: &kvm_regs) {
        self.page.set_registers(registers);
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        self.has_page_registers = true;
    }

    /// Whether an access of its guest is still to be completed.
    pub(super) fn has_pending_access(&self) -> bool {
        self.is_pending || self.waiting.is_some()
    }

    /// # Errors
    /// [`ErrorKind::State`] when its guest reads and nobody has answered.
    pub(super) fn check_answered(&self) -> Result<()> {
        if self.awaits_answer {
            let detail = "its guest reads, and nobody has answered";
            return Err(Error::new(ErrorKind::State, format!("vcpu_{}", self.id), detail));
        }
        Ok(())
    }

    /// Have KVM forget the access that it would complete at the next entry: reads give ones, what
    /// is written goes nowhere, and a repeated instruction ends with the element that it is at.
    pub(crate) fn abandon(&mut self) {
        let mut is_pending = self.is_pending || self.waiting.take().is_some_and(|e| e.is_access());
        let mut left = ABANDONED_PARTS;
        while is_pending && left > 0 {
            if let Ok(regs) = self.fd.get_regs() {
                // Else KVM would come out for each of its elements. Zero would leave the one at
                // hand behind.
                let _ = self.fd.set_regs(&kvm_regs { rcx: 1, ..regs });
            }
            self.page.set(true);
            let exit = self.fd.run().map(|exit| owned(exit, &self.page));
            is_pending = exit.is_ok_and(|exit| exit.is_access());
            left -= 1;
        }
        self.has_page_registers = false;
        self.forget_access();
    }

    /// Its registers are others: what an access was to complete is no more.
    pub(crate) fn forget_access(&mut self) {
        (self.is_pending, self.awaits_answer) = (false, false);
        (self.waiting, self.changed) = (None, None);
        self.has_found_memory = false;
    }

    /// Complete the instruction whose exit has been answered, and change the registers behind it as
    /// the program's code wanted. `is_stopped` looks at the stop word.
    pub(super) fn apply_changes(&mut self, is_stopped: impl Fn() -> bool) {
        let Some(changed) = self.changed.take() else { return };
        self.complete();
        // Kick, point 8: one that came meanwhile has set the word first, and that is looked at
        // before the next entry.
        self.page.set(is_stopped());
        let after = changed.over(&self.page.registers());
        // KVM takes any general registers.
        if self.fd.set_regs(&after).is_ok() {
            self.page.set_registers(&after);
        }
    }

    /// Look at a class of registers.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn load<T>(&mut self, class: RegisterClass, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
        self.complete();
        let fd = &self.fd;
        Ok(match class {
            RegisterClass::General => look(bytes(&self.general()?)),
            RegisterClass::Special => look(bytes(&kvm("KVM_GET_SREGS", fd.get_sregs())?)),
            RegisterClass::Debug => look(bytes(&kvm("KVM_GET_DEBUGREGS", fd.get_debug_regs())?)),
            RegisterClass::Events => {
                look(bytes(&kvm("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?))
            }
            RegisterClass::MpState => look(bytes(&kvm("KVM_GET_MP_STATE", fd.get_mp_state())?)),
            RegisterClass::Xcrs => look(bytes(&kvm("KVM_GET_XCRS", fd.get_xcrs())?)),
            RegisterClass::Xsave => look(bytes(&kvm("KVM_GET_XSAVE", fd.get_xsave())?)),
            RegisterClass::Lapic => look(bytes(&kvm("KVM_GET_LAPIC", fd.get_lapic())?)),
        })
    }

    /// Change a class of registers.
    ///
    /// # Errors
    /// When KVM refuses the new values; they are as before then.
    pub fn store(&mut self, class: RegisterClass, change: impl FnOnce(&mut [u8])) -> Result<()> {
        // Whoever answers the exit still does: its answer is not given up.
        self.awaits_answer &= self.is_lent;
        self.complete();
        match class {
            RegisterClass::General => {
                let mut regs: kvm_regs = self.general()?;
                let from = regs;
                change(bytes_mut(&mut regs));
                if self.is_lent && self.is_pending {
                    // KVM has the instruction half done: it would overwrite them.
                    let from = self.changed.as_ref().map_or(from, |changed| changed.from);
                    self.changed = Some(Box::new(Changed { from, to: regs }));
                    return Ok(());
                }
                kvm("KVM_SET_REGS", self.fd.set_regs(&regs))?;
                self.page.set_registers(&regs);
                self.has_page_registers = true;
                Ok(())
            }
            RegisterClass::Special => {
                let mut sregs: kvm_sregs = kvm("KVM_GET_SREGS", self.fd.get_sregs())?;
                change(bytes_mut(&mut sregs));
                kvm("KVM_SET_SREGS", self.fd.set_sregs(&sregs))
            }
            RegisterClass::Debug => {
                let mut regs: kvm_debugregs = kvm("KVM_GET_DEBUGREGS", self.fd.get_debug_regs())?;
                change(bytes_mut(&mut regs));
                kvm("KVM_SET_DEBUGREGS", self.fd.set_debug_regs(&regs))
            }
            RegisterClass::Events => {
                let mut events: kvm_vcpu_events =
                    kvm("KVM_GET_VCPU_EVENTS", self.fd.get_vcpu_events())?;
                change(bytes_mut(&mut events));
                kvm("KVM_SET_VCPU_EVENTS", self.fd.set_vcpu_events(&events))
            }
            RegisterClass::MpState => {
                let mut state: kvm_mp_state = kvm("KVM_GET_MP_STATE", self.fd.get_mp_state())?;
                change(bytes_mut(&mut state));
                kvm("KVM_SET_MP_STATE", self.fd.set_mp_state(state))
            }
            RegisterClass::Xcrs => {
                let mut xcrs: kvm_xcrs = kvm("KVM_GET_XCRS", self.fd.get_xcrs())?;
                change(bytes_mut(&mut xcrs));
                self.fd.set_xcrs(&xcrs).map_err(|e| xcrs_refused(&xcrs, e))
            }
            RegisterClass::Xsave => {
                let mut xsave: kvm_xsave = kvm("KVM_GET_XSAVE", self.fd.get_xsave())?;
                change(bytes_mut(&mut xsave));
                // SAFETY: KVM_SET_XSAVE reads 4 KiB, the size of kvm_xsave, unless a permission for
                // dynamic features has been asked for, which nothing here does.
                kvm("KVM_SET_XSAVE", unsafe { self.fd.set_xsave(&xsave) })
            }
            RegisterClass::Lapic => {
                let mut lapic: kvm_lapic_state = kvm("KVM_GET_LAPIC", self.fd.get_lapic())?;
                change(bytes_mut(&mut lapic));
                kvm("KVM_SET_LAPIC", self.fd.set_lapic(&lapic))
            }
        }
    }

    pub(crate) fn general(&self) -> Result<kvm_regs> {
        if let Some(changed) = &self.changed {
            return Ok(changed.to);
        }
        if self.has_page_registers {
            return Ok(self.page.registers());
        }
        kvm("KVM_GET_REGS", self.fd.get_regs())
    }

    /// A model-specific register.
    ///
    /// # Errors
    /// When KVM does not know it.
    pub fn msr(&self, index: u32) -> Result<u64> {
        msr_of(&self.fd, index)
    }

    /// Set a model-specific register.
    ///
    /// # Errors
    /// When KVM does not know it or refuses the value.
    pub fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        match kvm("KVM_SET_MSRS", self.fd.set_msrs(&one_msr(index, value)?))? {
            1 => Ok(()),
            _ => {
                let detail = format!("KVM does not know it, or refuses {value:#x}");
                Err(Error::new(ErrorKind::Kvm, format!("MSR {index:#x}"), detail))
            }
        }
    }

    /// What CPUID says to the guest.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        cpuid::of_vcpu(&self.fd)
    }

    /// Change what CPUID says to the guest.
    ///
    /// # Errors
    /// [`ErrorKind::State`] once the vCPU has run: its processor stays what it was.
    pub fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        let at = "KVM_SET_CPUID2";
        if self.has_run {
            return Err(Error::new(ErrorKind::State, at, "the vCPU has run already"));
        }
        let table = CpuId::from_entries(entries)
            .map_err(|e| Error::new(ErrorKind::Config, at, format!("{e:?}")))?;
        self.constant_msrs.clear();
        kvm(at, self.fd.set_cpuid2(&table))
    }

    /// Have single steps and accesses to linear addresses come out as exits: KVM_SET_GUEST_DEBUG.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for more breakpoints than the processor's four; when KVM refuses.
    pub fn debug(&mut self, single_step: bool, breakpoints: &[u64]) -> Result<()> {
        let at = "KVM_SET_GUEST_DEBUG";
        let mut debug = kvm_guest_debug::default();
        let registers = debug.arch.debugreg.iter_mut().take(4);
        if breakpoints.len() > 4 {
            let detail = format!("{} breakpoints: the processor has four", breakpoints.len());
            return Err(Error::new(ErrorKind::Config, at, detail));
        }
        registers.zip(breakpoints).for_each(|(register, address)| *register = *address);
        if single_step {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        if !breakpoints.is_empty() {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            // DR7: the bit that is always one, and for each the bit that enables it globally: Intel
            // SDM volume 3, 18.2.4.
            let enabled = (0..breakpoints.len()).fold(0x400, |dr7, number| dr7 | 2 << (2 * number));
            if let Some(dr7) = debug.arch.debugreg.get_mut(7) {
                *dr7 = enabled;
            }
        }
        self.complete();
        kvm(at, self.fd.set_guest_debug(&debug))
    }

    /// How the vCPU translates addresses now.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn paging(&mut self) -> Result<Paging> {
        self.complete();
        Ok(Paging::of(&kvm("KVM_GET_SREGS", self.fd.get_sregs())?))
    }

    /// The guest-physical address behind a guest-virtual one, none where nothing is mapped.
    #[must_use]
    pub fn translate(&self, paging: &Paging, address: u64) -> Option<u64> {
        paging.translate(address, |at, length| match length {
            4 => self.memory.load::<u32>(at).ok().map(u64::from),
            _ => self.memory.load(at).ok(),
        })
    }
}

/// Says which bits KVM would have taken: of what the processor has it may offer a guest less.
fn xcrs_refused(xcrs: &kvm_xcrs, error: kvm_ioctls::Error) -> Error {
    let mut refused = Error::kvm("KVM_SET_XCRS", error);
    let supported = open_kvm()
        .ok()
        .and_then(|kvm| kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).ok());
    if let (Some(table), [xcr0, ..]) = (supported, &xcrs.xcrs) {
        let mask = cpuid::xcr0_mask(table.as_slice());
        let _ = write!(refused.detail, ": XCR0 {:#x}, of which KVM offers {mask:#x}", xcr0.value);
    }
    refused
}

/// A model-specific register of a vCPU.
pub(super) fn msr_of(fd: &VcpuFd, index: u32) -> Result<u64> {
    let mut msrs = one_msr(index, 0)?;
    let found = kvm("KVM_GET_MSRS", fd.get_msrs(&mut msrs))?;
    match msrs.as_slice() {
        [entry] if found == 1 => Ok(entry.data),
        _ => Err(Error::new(ErrorKind::Kvm, format!("MSR {index:#x}"), "KVM does not know it")),
    }
}

fn one_msr(index: u32, data: u64) -> Result<Msrs> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .map_err(|e| Error::new(ErrorKind::Kvm, "msrs", format!("{e:?}")))
}
