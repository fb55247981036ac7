//! `struct Vcpu`: the descriptor of one virtual processor and its state between two entries.
//! `enter.rs` enters its guest, and `registers.rs` has its registers.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::answer::Noted;
use super::guest_debug::GuestDebug;
use super::pending::PendingIo;
use super::router::{ExitRouter, RouterCache};
use super::run_page::RunPage;
use super::state_id::StateId;
use crate::debug::Paging;
use crate::devices::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::fixup;
use crate::kvm::checked as kvm;
use crate::memory::GuestMemory;

/// The name of a vCPU, in errors and as the name of its thread.
pub(crate) struct VcpuName(pub(crate) u64);

impl fmt::Display for VcpuName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vcpu_{}", self.0)
    }
}

/// One virtual processor. Its own thread calls its ioctls, or another thread while it is at rest.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) id: u64,
    /// Only for KVM_RUN: everything else uses [`Self::fd`].
    pub(super) raw_fd: VcpuFd,
    pub(crate) page: Arc<RunPage>,
    pub(crate) router: Arc<ExitRouter>,
    /// After `fd`, so that memory exists as long as the guest can run.
    pub(super) memory: GuestMemory,
    /// Counts of executed fix-ups; `None` if fix-ups are off.
    pub(crate) fixups: Option<Arc<fixup::Counts>>,
    /// What fix-ups have run on the host.
    pub(super) native: fixup::NativeCode,
    /// Whether KVM_RUN has been called. CPUID cannot be changed afterwards.
    pub(crate) has_run: bool,
    /// Whether the guest has been notified of its current pause, or has never run.
    pub(crate) knows_of_pause: bool,
    /// The CPUID record of a snapshot that was found to agree with this vCPU's.
    pub(crate) accepted_cpuid: Option<Vec<u8>>,
    /// Model-specific registers whose values KVM returns but refuses to set.
    pub(crate) constant_msrs: Vec<(u32, u64)>,
    /// The TSC frequency that it was set to; `None` for the host's.
    pub(crate) tsc_khz: Option<u32>,
    /// Special registers and events that KVM has accepted, and accepts again.
    pub(crate) accepted_state: Option<Box<(kvm_sregs, kvm_vcpu_events)>>,
    /// The whole state that it was set to, if only its guest has changed it since, and no exit says
    /// more than that the guest has accessed a port or an address.
    pub(super) set_to: Cell<Option<StateId>>,
    /// Work that the last exit has left for the next entry.
    pub(super) pending: PendingIo,
    /// Whether the pending HLT is that of a machine with an interrupt controller.
    pub(super) has_reported_halt: bool,
    /// The device that had no room for the last access. The vCPU waits for it before the next
    /// entry.
    pub(super) waits_for: Option<Arc<dyn Device>>,
    /// Whether the run page has the general registers. Each exit stores them there
    /// (KVM_CAP_SYNC_REGS), and so does `store`.
    pub(crate) has_page_registers: bool,
    /// The handle's count of rests when it last came to rest.
    pub(crate) rests: u64,
    /// Whether a callback that answers its exit has access to it.
    pub(super) has_host_access: bool,
    /// Whether KVM_RUN has returned because of a signal or a kick.
    pub(super) is_interrupted: bool,
    /// Whether the thread that runs it calls no code of the program: an exit that needs such code
    /// stays pending, for the vCPU's own thread.
    pub(super) calls_nobody: bool,
    /// Whether calls of devices are recorded in a trace.
    pub(super) is_recorded: bool,
    /// Whether the current instruction reads memory that was added after its exit.
    pub(super) has_found_memory: bool,
    /// What is noted of the current exit's answer, if a hook wants to see it.
    pub(super) noted: Option<Box<Noted>>,
    /// The requests for single steps and breakpoints.
    pub(super) guest_debug: GuestDebug,
    /// Its copies of the devices and hooks of its machine, while it is not at rest.
    pub(super) cache: RouterCache,
}

impl Vcpu {
    pub(crate) fn new(
        id: u64,
        mut fd: VcpuFd,
        page: Arc<RunPage>,
        router: Arc<ExitRouter>,
        memory: GuestMemory,
    ) -> Self {
        fd.set_sync_valid_reg(SyncReg::Register);
        Self {
            id,
            raw_fd: fd,
            page,
            router,
            memory,
            fixups: None,
            native: fixup::NativeCode::default(),
            has_run: false,
            knows_of_pause: true,
            accepted_cpuid: None,
            constant_msrs: Vec::new(),
            tsc_khz: None,
            accepted_state: None,
            set_to: Cell::new(None),
            has_reported_halt: false,
            pending: PendingIo::Idle,
            waits_for: None,
            has_page_registers: false,
            rests: 0,
            has_host_access: false,
            is_interrupted: false,
            calls_nobody: false,
            is_recorded: false,
            has_found_memory: false,
            noted: None,
            guest_debug: GuestDebug::default(),
            cache: RouterCache::default(),
        }
    }

    /// The memory of its guest.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Give the guest the data of a read, after an exit that waits for it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if no read waits for data; [`ErrorKind::Config`] if the size is wrong.
    pub fn answer(&mut self, data: &[u8]) -> Result<()> {
        let at = VcpuName(self.id).to_string();
        if !self.pending.awaits_answer() {
            let detail = "its last exit was not a read, or the read has been answered";
            return Err(Error::new(ErrorKind::State, at, detail));
        }
        let wanted = self.page.answer(data);
        if wanted != data.len() {
            let detail = format!("the guest reads {wanted} bytes, not {}", data.len());
            return Err(Error::new(ErrorKind::Config, at, detail));
        }
        self.pending.set_answered();
        Ok(())
    }

    /// The size of the read that waits for data, in bytes; `None` if none does.
    #[must_use]
    pub fn wanted(&self) -> Option<usize> {
        self.pending.awaits_answer().then(|| self.page.answer(&[]))
    }

    /// Whether the device that was full at its last access has room now.
    pub(super) fn has_room(&mut self) -> bool {
        self.waits_for.take_if(|device| device.wait_for_room(&|| true));
        self.waits_for.is_none()
    }

    /// Notify the guest of a pause, which its watchdogs would otherwise report as a hang. A guest
    /// that does not use KVM's clock is not notified.
    pub(super) fn notify_of_pause(&mut self) {
        if !std::mem::replace(&mut self.knows_of_pause, false) {
            // KVM refuses this for such a guest.
            let _ = self.fd().kvmclock_ctrl();
        }
    }

    /// # Errors
    /// [`ErrorKind::State`] if its guest waits for the data of a read.
    pub(super) fn check_answered(&self) -> Result<()> {
        if self.pending.awaits_answer() {
            let detail = "its guest waits for the data of a read";
            return Err(Error::new(ErrorKind::State, VcpuName(self.id).to_string(), detail));
        }
        Ok(())
    }

    /// Forget the last access, because the registers are replaced.
    pub(crate) fn forget_access(&mut self) {
        self.pending = PendingIo::Idle;
        self.has_reported_halt = false;
        self.has_found_memory = false;
    }

    pub(crate) fn general(&self) -> Result<kvm_regs> {
        if let Some(edits) = self.pending.edits() {
            return Ok(edits.to);
        }
        if self.has_page_registers {
            return Ok(self.page.registers());
        }
        kvm("KVM_GET_REGS", self.fd().get_regs())
    }

    /// The guest-physical address of a guest-virtual address; `None` if nothing is mapped there.
    #[must_use]
    pub fn translate(&self, paging: &Paging, address: u64) -> Option<u64> {
        paging.translate(address, |at, length| match length {
            4 => self.memory.load::<u32>(at).ok().map(u64::from),
            _ => self.memory.load(at).ok(),
        })
    }
}
