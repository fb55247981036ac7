//! Whether a vCPU still has the whole state that it was set to, except for what its guest has
//! changed since. On the thread that has the vCPU.

use super::exit::VcpuExit;
use super::state_id::StateId;
use super::vcpu::Vcpu;

impl Vcpu {
    /// Note that everything a guest can see of it has just been set. Every other use of its
    /// descriptor ends this, because it may change the state from the host.
    pub(crate) fn note_whole_state(&self, state: StateId) {
        self.set_to.set(Some(state));
    }

    /// Note that something other than its guest may have changed it, or the tables that it uses.
    pub(crate) fn forget_whole_state(&self) {
        self.set_to.set(None);
    }

    /// Whether only its guest can have changed it since it was set to this state.
    pub(crate) fn comes_from(&self, state: StateId) -> bool {
        self.has_page_registers && self.set_to.get() == Some(state)
    }

    /// The instruction at which it is out of its guest. Only if it [`Self::comes_from`] a state.
    pub(crate) fn left_at(&self) -> u64 {
        self.page.registers().rip
    }

    /// After an exit that is not an access, the state may be another one: KVM resets a vCPU that
    /// has shut down, for example.
    pub(super) fn note_exit(&self, exit: Result<&VcpuExit, &kvm_ioctls::Error>) {
        let keeps = match exit {
            Ok(
                VcpuExit::IoIn { .. }
                | VcpuExit::IoOut { .. }
                | VcpuExit::MmioRead { .. }
                | VcpuExit::MmioWrite { .. }
                | VcpuExit::Interrupted,
            ) => true,
            Ok(_) => false,
            Err(error) => error.errno() == libc::EINTR,
        };
        if !keeps {
            self.forget_whole_state();
        }
    }
}
