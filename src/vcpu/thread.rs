//! The thread that runs a vCPU, `vcpu_{id}`. Whatever happens on that thread, a run there ends by
//! kicking the exit handler and setting `VmRunState::Exiting`, unless the host stops it.

use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use super::current::set_current;
use super::handle::VcpuHandle;
use super::own_thread::Task;
use super::router::ExitRouter;
use super::run::{complete_pending_io, drain_string_io, step};
use super::run_page::RunPage;
use super::signal::{SignalMask, kick_signal};
use super::stack;
use super::state::{RunState, VmRunState};
use super::vcpu::{Vcpu, VcpuName};
use crate::error::Result;
use crate::exit_handler::{Exit, ExitHandler, ExitReason, Outcome};
use crate::hop::hop;
use crate::memory::GuestMemory;
use crate::sync::{Mutex, rank};

/// How many accesses of a repeated instruction a stop completes at most.
pub(super) const MAX_STEPS_AT_STOP: usize = 1024;

/// State that the vCPUs of one machine share.
#[derive(Debug)]
pub(crate) struct Shared<EH> {
    pub(crate) exit_handler: EH,
    pub(crate) run_state: RunState,
    /// How the guest ended, set by the first vCPU that ended.
    pub(crate) exit: Mutex<Option<Exit>, rank::GuestExit>,
}

impl<EH> Shared<EH> {
    /// Identifies its machine for as long as one of its threads lives.
    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

impl<EH: ExitHandler> Shared<EH> {
    /// Report that a vCPU's guest has ended or the vCPU has failed.
    pub(crate) fn vcpu_ended(&self, exit: Exit) {
        self.exit.lock().get_or_insert(exit);
        // An error can be ignored: the loop also checks the state set below.
        let _ = self.exit_handler.kick();
        let _ = self.run_state.set_and_notify(VmRunState::Exiting);
    }

    /// [`Self::vcpu_ended`] on the thread that runs the loop, which needs no kick.
    pub(super) fn note_end(&self, exit: Exit) {
        self.exit.lock().get_or_insert(exit);
        let _ = self.run_state.set_and_notify(VmRunState::Exiting);
    }
}

/// Create a vCPU, at rest and without a thread.
///
/// # Errors
/// If its run page cannot be mapped.
pub(crate) fn create(
    id: u64,
    fd: VcpuFd,
    router: Arc<ExitRouter>,
    memory: GuestMemory,
) -> Result<Arc<VcpuHandle>> {
    let page = Arc::new(RunPage::new(&fd)?);
    let vcpu = Vcpu::new(id, fd, Arc::clone(&page), router, memory);
    Ok(Arc::new(VcpuHandle::new(id, page, vcpu)))
}

/// Begin a run of the vCPU: `prepare` it and have its own thread enter the guest. The thread of the
/// last run is reused if it still exists. If this fails, or if the vCPU `is_held`, it stays at
/// rest.
///
/// # Errors
/// If no thread can be started; the error of `prepare`.
pub(crate) fn start<EH>(
    handle: &Arc<VcpuHandle>,
    shared: &Arc<Shared<EH>>,
    is_held: bool,
    prepare: Option<impl FnOnce(&mut Vcpu) -> Result<()>>,
) -> Result<()>
where
    EH: ExitHandler + Send + Sync + 'static,
{
    kick_signal()?; // without it, nothing could bring the vCPU out of its guest
    handle.begin_run(|number| spawn(handle, shared, number))?;
    prepare.map_or(Ok(()), |prepare| handle.with_vcpu(prepare))?;
    if is_held {
        handle.run_on_resume();
    } else {
        handle.run();
    }
    Ok(())
}

/// Have the vCPU's own thread continue a run that began on the caller's thread.
///
/// # Errors
/// If no thread can be started.
pub(crate) fn hand_over<EH>(handle: &Arc<VcpuHandle>, shared: &Arc<Shared<EH>>) -> Result<()>
where
    EH: ExitHandler + Send + Sync + 'static,
{
    handle.hand_over(|number| spawn(handle, shared, number))
}

fn spawn<EH>(
    handle: &Arc<VcpuHandle>,
    shared: &Arc<Shared<EH>>,
    number: u64,
) -> Result<JoinHandle<()>>
where
    EH: ExitHandler + Send + Sync + 'static,
{
    let (handle, shared) = (Arc::clone(handle), Arc::clone(shared));
    let name = VcpuName(handle.id()).to_string();
    let run = move || {
        set_current(&handle, shared.id());
        serve(&handle, &shared, number);
    };
    stack::spawn(name, run)
}

/// The vCPU's own thread: follows the commands of its handle until it has to end.
fn serve<EH: ExitHandler>(handle: &VcpuHandle, shared: &Shared<EH>, number: u64) {
    hop!();
    while let Some(Task { mut vcpu, completes, mask }) = handle.next(number) {
        mask.iter().for_each(SignalMask::adopt);
        let guard = PanicGuard { handle, shared };
        let end = if completes {
            drain_string_io(&mut vcpu, handle)
        } else {
            vcpu.notify_of_pause();
            turn_until_end(&mut vcpu, handle)
        };
        std::mem::forget(guard);
        handle.put_back(vcpu, matches!(end, Outcome::Stop | Outcome::End(_)));
        match end {
            Outcome::End(exit) => shared.vcpu_ended(Exit { vcpu: Some(handle.id()), ..*exit }),
            // An error can be ignored: the loop finds the reason in its next iteration.
            Outcome::Stop => drop(shared.exit_handler.kick()),
            Outcome::Continue | Outcome::Wait => {}
        }
        handle.reported();
    }
}

/// Run the guest until it ends, a device or a hook ends the run, or the stop word is set.
fn turn_until_end(vcpu: &mut Vcpu, handle: &VcpuHandle) -> Outcome {
    let mut last = Outcome::Continue;
    while !handle.stop.is_set() {
        if !handle.wait_for_room(vcpu) {
            continue; // called out: the stop word is set
        }
        last = step(vcpu, handle);
        match last {
            Outcome::Continue | Outcome::Wait => {}
            Outcome::Stop => break,
            Outcome::End(_) => {
                // Here, not later on a thread that resets the machine: that would move the vCPU to
                // another thread.
                vcpu.complete();
                return last;
            }
        }
    }
    // So that the host sees the registers after the instruction.
    match complete_pending_io(vcpu, handle, MAX_STEPS_AT_STOP) {
        Outcome::Continue | Outcome::Wait => last,
        end => end,
    }
}

/// Ends the run if the vCPU's thread panics, which is a bug of pyvmm.
pub(super) struct PanicGuard<'a, EH: ExitHandler> {
    pub(super) handle: &'a VcpuHandle,
    pub(super) shared: &'a Shared<EH>,
}

impl<EH: ExitHandler> Drop for PanicGuard<'_, EH> {
    fn drop(&mut self) {
        let fault = Some("a panic on the vCPU's thread: please report it".to_owned());
        self.handle.mark_lost();
        self.shared.vcpu_ended(Exit {
            vcpu: Some(self.handle.id()),
            fault,
            ..Exit::new(ExitReason::VcpuError)
        });
    }
}
