//! `struct Vcpu`: the descriptor of one virtual processor and what is known of it between two
//! entries. What drives it is in `enter.rs`, its registers are in `registers.rs`.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::kvm_regs;
use kvm_ioctls::{SyncReg, VcpuFd};

use super::guest_debug::GuestDebug;
use super::pending::PendingIo;
use super::router::ExitRouter;
use super::run_page::RunPage;
use crate::debug::Paging;
use crate::devices::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::fixup;
use crate::kvm::checked as kvm;
use crate::memory::GuestMemory;

/// The place of a vCPU in an error, and the name of its thread.
pub(crate) struct Place(pub(crate) u64);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vcpu_{}", self.0)
    }
}

/// One virtual processor. Its ioctls are made by its own thread, or by another while it is at rest.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) id: u64,
    pub(crate) fd: VcpuFd,
    pub(crate) page: Arc<RunPage>,
    pub(crate) router: Arc<ExitRouter>,
    /// After `fd`: as long as the guest can run, its memory is there.
    pub(super) memory: GuestMemory,
    /// Instructions that KVM refuses are executed here and counted; none: they end the run.
    pub(crate) fixups: Option<Arc<fixup::Counts>>,
    /// KVM_RUN has been called: what CPUID says cannot be changed any more.
    pub(crate) has_run: bool,
    /// The guest has been notified of the pause that it is in, or has never run.
    pub(crate) knows_of_pause: bool,
    /// A CPUID table, as snapshots keep it, that is known to be this one's.
    pub(crate) known_cpuid: Option<Vec<u8>>,
    /// Model-specific registers with values that they have and that KVM does not take.
    pub(crate) constant_msrs: Vec<(u32, u64)>,
    /// What the last exit has left for the next entry.
    pub(super) pending: PendingIo,
    /// The device whose last access found no room: the vCPU waits for it before the next entry.
    pub(super) waits_for: Option<Arc<dyn Device>>,
    /// The run page has the general registers: each exit puts them there (KVM_CAP_SYNC_REGS), as
    /// does `store`.
    pub(crate) has_page_registers: bool,
    /// How often it had come to rest when it did so last.
    pub(crate) rests: u64,
    /// The program's code answers its exit, and has access to it.
    pub(super) has_host_access: bool,
    /// KVM_RUN has returned because of a signal or a kick.
    pub(super) is_interrupted: bool,
    /// Calls of devices are recorded.
    pub(super) is_recorded: bool,
    /// The current instruction reads memory that was added after its exit.
    pub(super) has_found_memory: bool,
    /// What KVM has been asked to report of the guest's execution.
    pub(super) guest_debug: GuestDebug,
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
            fd,
            page,
            router,
            memory,
            fixups: None,
            has_run: false,
            knows_of_pause: true,
            known_cpuid: None,
            constant_msrs: Vec::new(),
            pending: PendingIo::Idle,
            waits_for: None,
            has_page_registers: false,
            rests: 0,
            has_host_access: false,
            is_interrupted: false,
            is_recorded: false,
            has_found_memory: false,
            guest_debug: GuestDebug::default(),
        }
    }

    /// The memory that its guest sees.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Give the guest what it reads, after an exit that waits for it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if none does; [`ErrorKind::Config`] if it is another number of
    /// bytes.
    pub fn answer(&mut self, data: &[u8]) -> Result<()> {
        let at = Place(self.id).to_string();
        if !self.pending.awaits_answer() {
            let detail = "its last exit was no read, or the instruction has been completed since";
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

    /// How many bytes the guest waits for; `None` if it does not.
    #[must_use]
    pub fn wanted(&self) -> Option<usize> {
        self.pending.awaits_answer().then(|| self.page.answer(&[]))
    }

    /// Whether the device that its last access found full has room now.
    pub(super) fn has_room(&mut self) -> bool {
        self.waits_for.take_if(|device| device.wait_for_room(&|| true));
        self.waits_for.is_none()
    }

    /// Notify the guest's watchdogs of a pause, which they would take for a hang. A guest that does
    /// not use KVM's clock is not notified.
    pub(super) fn notify_of_pause(&mut self) {
        if !std::mem::replace(&mut self.knows_of_pause, false) {
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

    /// # Errors
    /// [`ErrorKind::State`] if its guest waits for an answer to a read.
    pub(super) fn check_answered(&self) -> Result<()> {
        if self.pending.awaits_answer() {
            let detail = "its guest waits for an answer to a read";
            return Err(Error::new(ErrorKind::State, Place(self.id).to_string(), detail));
        }
        Ok(())
    }

    /// Its registers are replaced: nothing is left of the last access.
    pub(crate) fn forget_access(&mut self) {
        self.pending = PendingIo::Idle;
        self.has_found_memory = false;
    }

    pub(crate) fn general(&self) -> Result<kvm_regs> {
        if let Some(edits) = self.pending.edits() {
            return Ok(edits.to);
        }
        if self.has_page_registers {
            return Ok(self.page.registers());
        }
        kvm("KVM_GET_REGS", self.fd.get_regs())
    }

    /// The guest-physical address of a guest-virtual one; `None` if nothing is mapped there.
    #[must_use]
    pub fn translate(&self, paging: &Paging, address: u64) -> Option<u64> {
        paging.translate(address, |at, length| match length {
            4 => self.memory.load::<u32>(at).ok().map(u64::from),
            _ => self.memory.load(at).ok(),
        })
    }
}
