//! Access to a vCPU's registers and other state: from any thread while the vCPU is at rest or its
//! thread is in a callback.

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::commands::Commands;
use super::current::CallbackGuard;
use super::handle::{HandleState, HostAccess, VcpuHandle, closed};
use super::thread_id::ThreadId;
use super::vcpu::Vcpu;
use crate::error::Result;
use crate::sync::{MappedMutexGuard, MutexGuard, rank};

/// Ends the host's access, also if the callback panics.
struct HostAccessGuard<'a>(&'a VcpuHandle, NonNull<Vcpu>);

impl Drop for HostAccessGuard<'_> {
    fn drop(&mut self) {
        self.0.state.lock().host_access = None;
        // SAFETY: the caller's vCPU, which no other thread can reach any more.
        unsafe { self.1.as_mut() }.has_host_access = false;
    }
}

impl VcpuHandle {
    /// Call `look` with the vCPU, which stays at rest during the call. The vCPU's own thread can
    /// call this in a callback.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] while its guest runs, and in a forked child; the error of
    /// `look`.
    pub fn with_vcpu<T>(&self, look: impl FnOnce(&mut Vcpu) -> Result<T>) -> Result<T> {
        self.check_process()?;
        self.with_state_vcpu(&mut self.state.lock(), look)
    }

    /// [`Self::with_vcpu`] with a limit on the time to wait for the lock, and for a vCPU that comes
    /// to rest: its callback has returned while the machine is paused.
    ///
    /// # Errors
    /// Returns `look` if another thread uses the vCPU for that long.
    pub fn try_with_vcpu<T, F>(&self, limit: Duration, look: F) -> std::result::Result<Result<T>, F>
    where
        F: FnOnce(&mut Vcpu) -> Result<T>,
    {
        // In a forked child, a thread that does not exist there may hold the lock.
        if let Err(error) = self.check_process() {
            return Ok(Err(error));
        }
        let state =
            if limit.is_zero() { self.state.try_lock() } else { self.state.try_lock_for(limit) };
        let Some(mut state) = state else { return Err(look) };
        let mut until = None;
        while state.comes_to_rest() {
            let until = *until.get_or_insert_with(|| Instant::now() + limit);
            if limit.is_zero() || self.changed.wait_until(&mut state, until) {
                return Err(look);
            }
        }
        Ok(self.with_state_vcpu(&mut state, look))
    }

    fn with_state_vcpu<T>(
        &self,
        state: &mut HandleState,
        look: impl FnOnce(&mut Vcpu) -> Result<T>,
    ) -> Result<T> {
        let is_held = state.commands.is_held();
        let is_own = state.runner == Some(ThreadId::current());
        if state.commands.is_closed {
            return Err(closed());
        }
        match state {
            HandleState { commands: Commands { vcpu: Some(vcpu), .. }, .. } if is_held => {
                look(vcpu)
            }
            HandleState { host_access: Some(HostAccess(vcpu)), .. } if is_held || is_own => {
                // SAFETY: its thread is inside `with_host_access`, which ends the access only under
                // the lock that this holds.
                look(unsafe { vcpu.as_mut() })
            }
            _ => Err(self.running()),
        }
    }

    /// The vCPU, which stays at rest while the result lives.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] while its guest runs or its exit is answered, and in a
    /// forked child; [`crate::error::ErrorKind::Closed`] when its machine is closed.
    pub(crate) fn at_rest(&self) -> Result<MappedMutexGuard<'_, Vcpu, rank::Vcpu>> {
        self.check_process()?;
        let state = self.state.lock();
        if state.commands.is_closed {
            return Err(closed());
        }
        let is_held = state.commands.is_held();
        MutexGuard::try_map(state, |state| state.commands.vcpu.as_mut().filter(|_| is_held))
            .ok_or_else(|| self.running())
    }

    /// Call Python code from the thread that runs the vCPU. During the call that code may access
    /// the vCPU, and for a thread that pauses the machine the vCPU counts as at rest. After a
    /// pause, it enters its guest again only when the machine is resumed.
    pub(super) fn with_host_access<T>(&self, vcpu: &mut Vcpu, call: impl FnOnce() -> T) -> T {
        vcpu.has_host_access = true;
        let vcpu = NonNull::from(vcpu);
        let _guard = HostAccessGuard(self, vcpu);
        let _called = CallbackGuard::enter(self);
        {
            let mut state = self.state.lock();
            state.host_access = Some(HostAccess(vcpu));
            self.changed.notify_all();
        }
        call()
    }
}
