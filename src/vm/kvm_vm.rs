//! `KvmVm`: one KVM virtual machine with its memory slots, interrupt controller and vCPUs, and
//! queries of its state. Any thread.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;

use super::vcpus::Vcpus;
use crate::cpu::Start;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitHandler};
use crate::fixup;
use crate::memory::GuestMemory;
use crate::process::ProcessTag;
use crate::resources::Resource;
use crate::sync::{Mutex, rank};
use crate::vcpu::{self, ExitRouter, VcpuHandle, VmRunState};

/// A KVM virtual machine. Its vCPUs kick an `EH` when their guest ends.
pub struct KvmVm<EH: ExitHandler> {
    /// Before `fd` and `memory`: fields are dropped in this order, and the vCPUs must be dropped
    /// first.
    pub(super) vcpus: Vcpus,
    pub(super) fd: Arc<VmFd>,
    pub(super) memory: GuestMemory,
    pub(super) shared: Arc<vcpu::Shared<EH>>,
    pub(super) router: Arc<ExitRouter>,
    /// How its vCPUs start.
    pub(super) start: Start,
    pub(super) fixups: Arc<fixup::Counts>,
    pub(super) has_fixups: bool,
    pub(super) irqchip: bool,
    pub(super) pit: bool,
    /// A bit for each interrupt line that [`Self::set_irq_line`] holds high.
    pub(super) lines: Mutex<u32, rank::IrqLines>,
    /// Whether the vCPUs have the registers of a first start.
    pub(super) is_prepared: AtomicBool,
    pub(super) process_tag: ProcessTag,
}

impl<EH: ExitHandler> fmt::Debug for KvmVm<EH> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVm").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl<EH: ExitHandler> KvmVm<EH> {
    /// Identifies the threads of its vCPUs.
    pub(crate) fn id(&self) -> usize {
        self.shared.id()
    }

    /// Whether this is the thread of one of its vCPUs, in a callback.
    #[must_use]
    pub fn has_this_thread(&self) -> bool {
        vcpu::is_thread_of(self.shared.id())
    }

    /// The machine's run state.
    #[must_use]
    pub fn state(&self) -> VmRunState {
        self.shared.run_state.get()
    }

    /// Wait until the run state is one of these, and return it; `None` after the timeout.
    #[must_use]
    pub fn wait_for(&self, wanted: &[VmRunState], timeout: Option<Duration>) -> Option<VmRunState> {
        self.shared.run_state.wait_for(wanted, timeout)
    }

    /// [`Self::wait_for`] with a deadline; also returns if `interrupt` becomes readable or a signal
    /// arrives.
    ///
    /// # Errors
    /// If the process has no file descriptor left; on the thread of one of its vCPUs, which would
    /// wait for itself.
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

    /// The handles of its vCPUs.
    #[must_use]
    pub fn handles(&self) -> Vec<Arc<VcpuHandle>> {
        self.vcpus.handles()
    }

    /// How the guest ended; `None` if it has not.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.shared.exit.lock().clone()
    }

    /// Counts of the instructions that KVM refused and fix-ups executed.
    #[must_use]
    pub fn fixups(&self) -> &Arc<fixup::Counts> {
        &self.fixups
    }

    /// Which owner answers each address and port: memory, devices, KVM's chips and interrupt lines.
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

    /// Whether this is a forked child's copy of its parent's machine.
    #[must_use]
    pub fn is_forked_child(&self) -> bool {
        self.process_tag.is_forked_child()
    }

    /// # Errors
    /// In a forked child: a KVM machine can be used only in the process that created it.
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
