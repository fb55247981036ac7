//! Measures a hop: answers one exit again and again without entering the guest in between, so that
//! the way to the program's code and back is timed apart from KVM. For benchmarks. On the caller's
//! thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::current::CurrentVcpuGuard;
use super::enter::enter;
use super::handle::VcpuHandle;
use super::pending::PendingIo;
use super::run::answer;
use super::signal::unblock_kicks_once;
use super::vcpu::VcpuName;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::Outcome;

impl VcpuHandle {
    /// Enter the guest until its next exit, and answer this exit `count` times. Returns how long
    /// the answers took. `machine` is the number of the vCPU's machine.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while the guest runs, and if an answer ends the run; the error of
    /// KVM_RUN.
    pub(crate) fn time_answers(self: &Arc<Self>, machine: usize, count: u32) -> Result<Duration> {
        self.check_process()?;
        unblock_kicks_once()?;
        let mut vcpu = self.take_for_run_once(&mut self.state.lock())?;
        let current = CurrentVcpuGuard::enter(self, machine);
        let timed = enter(&mut vcpu).map_err(|e| Error::kvm("KVM_RUN", e)).and_then(|exit| {
            let began = Instant::now();
            for _ in 0..count {
                vcpu.pending = PendingIo::after(&exit);
                if answer(&mut vcpu, self, &exit) != Outcome::Continue {
                    let at = VcpuName(self.id()).to_string();
                    return Err(Error::new(ErrorKind::State, at, "an answer has ended the run"));
                }
            }
            Ok(began.elapsed())
        });
        drop(current);
        drop(std::mem::take(&mut vcpu.cache));
        let mut state = self.state.lock();
        state.is_in_run_once = false;
        self.rest(state, vcpu);
        timed
    }
}
