//! One iteration of a vCPU: enters the guest and handles its exit, in one match over all exits. On
//! the vCPU's thread.

use std::time::Instant;

use kvm_bindings::{KVM_EXIT_SET_TPR, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

use super::access;
use super::answer::{AnsweredBy, Noted};
use super::enter::enter;
use super::exception;
use super::exit::VcpuExit;
use super::fault;
use super::handle::VcpuHandle;
use super::kick::ImmediateExit;
use super::pending::PendingIo;
use super::report::report;
use super::router::{self, AnsweredExit, Reply};
use super::vcpu::Vcpu;
use crate::exit_handler::{Exit, ExitReason, Outcome};
use crate::hop::hop;

/// Enter the guest once and handle its exit. [`Outcome::Wait`] if the exit stays pending, because
/// this thread calls no code of the program.
pub(crate) fn step(vcpu: &mut Vcpu, handle: &VcpuHandle) -> Outcome {
    if vcpu.router.mask().is_observed() {
        return observed_step(vcpu, handle);
    }
    match enter(vcpu) {
        Ok(exit) => answer(vcpu, handle, &exit),
        Err(error) => refused(vcpu, error),
    }
}

/// The outcome if KVM_RUN fails. A signal also makes it fail.
fn refused(vcpu: &mut Vcpu, error: kvm_ioctls::Error) -> Outcome {
    vcpu.is_interrupted = error.errno() == libc::EINTR;
    with_fault_report(vcpu, on_error(error))
}

fn observed_step(vcpu: &mut Vcpu, handle: &VcpuHandle) -> Outcome {
    let entered = Instant::now();
    vcpu.router.before_entry(vcpu.id, entered);
    let result = enter(vcpu);
    let left = Instant::now();
    match result {
        Ok(exit) => {
            let recording = vcpu.router.recording(vcpu.id);
            vcpu.is_recorded = recording.is_some();
            let step = answer(vcpu, handle, &exit);
            vcpu.is_recorded = false;
            drop(recording);
            if step == Outcome::Wait {
                return step; // seen when it is answered
            }
            let answered = Instant::now();
            vcpu.router.after_exit(&AnsweredExit {
                vcpu: vcpu.id,
                exit: &exit,
                entered,
                left,
                answered,
            });
            step
        }
        Err(error) => {
            let exit = VcpuExit::Interrupted;
            vcpu.router.after_exit(&AnsweredExit {
                vcpu: vcpu.id,
                exit: &exit,
                entered,
                left,
                answered: left,
            });
            refused(vcpu, error)
        }
    }
}

/// Have the hooks and the devices answer an exit.
pub(super) fn answer(vcpu: &mut Vcpu, handle: &VcpuHandle, exit: &VcpuExit) -> Outcome {
    hop!();
    // After the exit, so that a hook sees the exit of a guest that ran while it was added.
    let mask = vcpu.router.mask();
    let kind = exit.kind();
    let is_reported = kind.is_some_and(|kind| mask.has_answer_hook(kind));
    let has_hook = is_reported || kind.is_some_and(|kind| mask.has_hook(kind));
    if vcpu.calls_nobody && has_hook {
        return leave_pending(vcpu, exit);
    }
    if is_reported {
        vcpu.noted = Some(Box::new(Noted::default()));
    }
    let is_memory = std::mem::take(&mut vcpu.has_found_memory) && vcpu.answer_from_memory(exit);
    let hooked = match kind {
        _ if is_memory => Some((AnsweredBy::Memory, Outcome::Continue)),
        Some(kind) if mask.has_hook(kind) => ask_hooks(vcpu, handle, exit),
        _ => None,
    };
    let mut by = AnsweredBy::Nothing;
    let mut step = match hooked {
        Some((hook, step)) => {
            by = hook;
            step
        }
        None => {
            let outcome = handle_exit(exit, vcpu, handle);
            with_fault_report(vcpu, outcome)
        }
    };
    if step == Outcome::Wait {
        return leave_pending(vcpu, exit);
    }
    vcpu.pending.set_answered();
    if is_reported {
        step = report(vcpu, handle, exit, by, step);
    }
    vcpu.apply_edits(|| handle.stop.is_set());
    step
}

/// Leave an exit to the vCPU's own thread, which finds it when it enters the guest.
fn leave_pending(vcpu: &mut Vcpu, exit: &VcpuExit) -> Outcome {
    vcpu.pending = PendingIo::Exit(exit.clone());
    Outcome::Wait
}

/// If the run ends with a fault, add the vCPU's state to KVM's report.
fn with_fault_report(vcpu: &Vcpu, mut outcome: Outcome) -> Outcome {
    if let Outcome::End(exit) = &mut outcome
        && let Some(what) = &mut exit.fault
    {
        *what = fault::describe(vcpu, what);
    }
    outcome
}

/// Complete an access that has been answered, and its follow-ups, at most `steps` together, without
/// running the guest further.
pub(crate) fn complete_pending_io(vcpu: &mut Vcpu, handle: &VcpuHandle, steps: usize) -> Outcome {
    for _ in 0..steps {
        if vcpu.pending.is_idle() {
            break;
        }
        vcpu.page.set(true);
        match step(vcpu, handle) {
            Outcome::Continue => {}
            Outcome::Wait => break,
            end => return end,
        }
    }
    Outcome::Continue
}

/// Complete a repeated access up to its last element: KVM interrupts it every 1,024 steps. A device
/// that stops the run or ends the guest does not interrupt this. The last such outcome is returned.
pub(crate) fn drain_string_io(vcpu: &mut Vcpu, handle: &VcpuHandle) -> Outcome {
    let mut last = Outcome::Continue;
    for _ in 0..2048 {
        if vcpu.pending.is_idle() {
            break;
        }
        match complete_pending_io(vcpu, handle, 1) {
            Outcome::Continue | Outcome::Wait => {}
            end => last = end,
        }
    }
    last
}

/// Ask the hooks; `None` if they leave the exit to the devices.
fn ask_hooks(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    exit: &VcpuExit,
) -> Option<(AnsweredBy, Outcome)> {
    // The copy is taken out, because the hooks may look at the vCPU.
    let (id, mut copy) = (vcpu.id, std::mem::take(&mut vcpu.cache.hooks));
    let hooks = vcpu.router.hooks(&mut copy);
    let answered = handle.with_host_access(vcpu, || router::ask_hooks(hooks, id, exit));
    vcpu.cache.hooks = copy;
    let (outcome, reply) = answered?;
    if !matches!(outcome, Outcome::Continue | Outcome::Wait) {
        return Some((AnsweredBy::Hook, outcome));
    }
    let mut by = AnsweredBy::Hook;
    match reply {
        Reply::Default => vcpu.page.allow_msr(),
        Reply::Data(data) => {
            vcpu.page.answer(&data);
            vcpu.page.allow_msr();
        }
        Reply::Retry => {
            let is_complete = vcpu.execute_again(exit, &handle.stop);
            by = if is_complete { AnsweredBy::Memory } else { AnsweredBy::Retry };
        }
    }
    Some((by, Outcome::Continue))
}

fn handle_exit(exit: &VcpuExit, vcpu: &mut Vcpu, handle: &VcpuHandle) -> Outcome {
    match exit {
        VcpuExit::IoIn { port, size, count } => access::port_in(vcpu, handle, *port, *size, *count),
        VcpuExit::IoOut { port, size, data } => access::port_out(vcpu, handle, *port, *size, data),
        VcpuExit::MmioRead { address, length } => {
            access::mmio_read(vcpu, handle, *address, *length)
        }
        VcpuExit::MmioWrite { address, data } => access::mmio_write(vcpu, handle, *address, data),
        // The guest gets a general protection fault, as KVM itself would have raised.
        VcpuExit::Rdmsr { .. } | VcpuExit::Wrmsr { .. } => Outcome::Continue,
        VcpuExit::Hlt if std::mem::take(&mut vcpu.has_reported_halt) => {
            end(Exit::new(ExitReason::AllHalted))
        }
        VcpuExit::Hlt => end(exception::take(vcpu).unwrap_or_else(|| Exit::new(ExitReason::Halt))),
        VcpuExit::Shutdown if fault::is_deliberate(vcpu) => end(Exit::new(ExitReason::Reset)),
        _ => end_of(exit, vcpu.page.exit_reason(), || {
            fault::internal_error(&vcpu.page.internal_error(), vcpu.fixups.is_some())
        }),
    }
}

/// The outcome of an exit that is not an access. `internal_error` returns KVM's report.
fn end_of(exit: &VcpuExit, number: u32, internal_error: impl FnOnce() -> String) -> Outcome {
    match exit {
        VcpuExit::Interrupted => Outcome::Continue,
        // The guest has lowered CR8, which tells a LAPIC in user space to look for an interrupt.
        VcpuExit::Unknown { number: KVM_EXIT_SET_TPR } => Outcome::Continue,
        VcpuExit::Shutdown => fault(Exit::new(ExitReason::Shutdown), "triple fault".into()),
        VcpuExit::SystemEvent { kind: KVM_SYSTEM_EVENT_RESET, .. } => {
            end(Exit::new(ExitReason::Reset))
        }
        VcpuExit::SystemEvent { kind: KVM_SYSTEM_EVENT_SHUTDOWN, .. } => {
            end(Exit::new(ExitReason::Poweroff))
        }
        VcpuExit::FailEntry { reason, cpu } => fault(
            Exit::with_code(ExitReason::FailEntry, *reason),
            format!(
                "the processor refused to enter the guest, reason {reason:#x}, on host CPU {cpu}"
            ),
        ),
        VcpuExit::InternalError { .. } => {
            fault(Exit::new(ExitReason::InternalError), internal_error())
        }
        VcpuExit::MemoryFault { flags, address, size } => fault(
            Exit::new(ExitReason::VcpuError),
            format!("memory fault at guest-physical {address:#x}, {size} bytes, flags {flags:#x}"),
        ),
        VcpuExit::Debug { .. } => end(Exit::new(ExitReason::Debug)),
        VcpuExit::Unknown { number } => unknown(*number),
        // Exits that pyvmm does not enable.
        _ => unknown(number),
    }
}

fn on_error(error: kvm_ioctls::Error) -> Outcome {
    match error.errno() {
        libc::EINTR => Outcome::Continue,
        // A vCPU that waited for INIT or SIPI has received one; it has to be entered again.
        libc::EAGAIN => Outcome::Continue,
        errno => fault(
            Exit::with_code(ExitReason::VcpuError, errno_code(errno)),
            format!("KVM_RUN: {error}"),
        ),
    }
}

fn end(exit: Exit) -> Outcome {
    Outcome::End(Box::new(exit))
}

/// An end of the run with a fault, whose text gets the vCPU's state.
fn fault(exit: Exit, what: String) -> Outcome {
    Outcome::End(Box::new(Exit { fault: Some(what), ..exit }))
}

fn unknown(number: u32) -> Outcome {
    let exit = Exit::with_code(ExitReason::UnknownExit, u64::from(number));
    let what = format!("KVM exit number {number}, which pyvmm does not handle");
    fault(exit, what)
}

fn errno_code(errno: i32) -> u64 {
    u64::from(errno.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exit: &VcpuExit) -> Outcome {
        end_of(exit, 77, String::new)
    }

    fn reason(outcome: Outcome) -> (ExitReason, Option<u64>) {
        match outcome {
            Outcome::End(exit) => (exit.reason, exit.code),
            other => panic!("{other:?} is no end"),
        }
    }

    #[test]
    fn every_end_has_its_reason() {
        assert_eq!(reason(outcome(&VcpuExit::Shutdown)), (ExitReason::Shutdown, None));
        let refused = VcpuExit::FailEntry { reason: 33, cpu: 0 };
        assert_eq!(reason(outcome(&refused)), (ExitReason::FailEntry, Some(33)));
        let failed = VcpuExit::InternalError {
            suberror: 1,
            instruction: vec![],
            data: vec![],
            disassembly: None,
            registers: vec![],
        };
        assert_eq!(reason(outcome(&failed)), (ExitReason::InternalError, None));
        let reset = VcpuExit::SystemEvent { kind: KVM_SYSTEM_EVENT_RESET, data: vec![] };
        assert_eq!(reason(outcome(&reset)), (ExitReason::Reset, None));
        let off = VcpuExit::SystemEvent { kind: KVM_SYSTEM_EVENT_SHUTDOWN, data: vec![] };
        assert_eq!(reason(outcome(&off)), (ExitReason::Poweroff, None));
        let debug = VcpuExit::Debug { exception: 1, pc: 0x1000, dr6: 0, dr7: 0 };
        assert_eq!(reason(outcome(&debug)), (ExitReason::Debug, None));
    }

    #[test]
    fn a_lowered_cr8_ends_nothing() {
        let lowered = VcpuExit::Unknown { number: KVM_EXIT_SET_TPR };
        assert_eq!(outcome(&lowered), Outcome::Continue);
    }

    #[test]
    fn an_exit_nobody_knows_ends_the_run_with_its_number() {
        let unknown = VcpuExit::Unknown { number: 4711 };
        assert_eq!(reason(outcome(&unknown)), (ExitReason::UnknownExit, Some(4711)));
        assert_eq!(reason(outcome(&VcpuExit::IrqWindowOpen)), (ExitReason::UnknownExit, Some(77)));
        let event = VcpuExit::SystemEvent { kind: 99, data: vec![] };
        assert_eq!(reason(outcome(&event)), (ExitReason::UnknownExit, Some(77)));
    }

    #[test]
    fn an_error_of_kvm_run_ends_the_run_but_a_signal_does_not() {
        assert_eq!(on_error(kvm_ioctls::Error::new(libc::EINTR)), Outcome::Continue);
        let (reason, code) = reason(on_error(kvm_ioctls::Error::new(libc::EFAULT)));
        assert_eq!((reason, code), (ExitReason::VcpuError, Some(14)));
    }
}
