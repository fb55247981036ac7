//! One turn of a vCPU: enter the guest, and the one match over every KVM exit. On the vCPU's
//! thread.

use std::time::Instant;

use kvm_bindings::{KVM_EXIT_DEBUG, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

use super::access;
use super::cell::Cell;
use super::dispatch::{Reply, Seen, Watched};
use super::exit::{VcpuExit, enter};
use super::fault;
use super::kick::ImmediateExit;
use super::registers::Vcpu;
use crate::exit_handler::{Exit, ExitReason, Outcome};

/// Enter the guest once and answer its exit.
pub(crate) fn step(vcpu: &mut Vcpu, cell: &Cell) -> Outcome {
    let watched = vcpu.dispatch.watched();
    if watched.is_observed() {
        return observed_step(vcpu, cell, watched);
    }
    match enter(vcpu) {
        Ok(exit) => answer(vcpu, cell, &exit, watched),
        Err(error) => with_fault_report(vcpu, on_error(error)),
    }
}

fn observed_step(vcpu: &mut Vcpu, cell: &Cell, watched: Watched) -> Outcome {
    let entered = Instant::now();
    vcpu.dispatch.enters(vcpu.id, entered);
    let result = enter(vcpu);
    let left = Instant::now();
    match result {
        Ok(exit) => {
            let recording = vcpu.dispatch.recording(vcpu.id);
            vcpu.is_recorded = recording.is_some();
            let step = answer(vcpu, cell, &exit, watched);
            vcpu.is_recorded = false;
            drop(recording);
            let answered = Instant::now();
            vcpu.dispatch.saw(&Seen { vcpu: vcpu.id, exit: &exit, entered, left, answered });
            step
        }
        Err(error) => {
            let exit = VcpuExit::Interrupted;
            vcpu.dispatch.saw(&Seen { vcpu: vcpu.id, exit: &exit, entered, left, answered: left });
            with_fault_report(vcpu, on_error(error))
        }
    }
}

fn answer(vcpu: &mut Vcpu, cell: &Cell, exit: &VcpuExit, watched: Watched) -> Outcome {
    let is_memory = std::mem::take(&mut vcpu.has_found_memory) && vcpu.answer_from_memory(exit);
    let hooked = match exit.kind() {
        _ if is_memory => Some(Outcome::Continue),
        Some(kind) if watched.has_hook(kind) => ask_hook(vcpu, cell, exit),
        _ => None,
    };
    let step = match hooked {
        Some(step) => step,
        None => {
            let outcome = on_exit(exit, vcpu, cell);
            with_fault_report(vcpu, outcome)
        }
    };
    vcpu.awaits_answer = false;
    if vcpu.changed.is_some() {
        vcpu.apply_changes(|| cell.stop.is_set());
    }
    step
}

/// An end for a fault says what KVM said; add the vCPU's state to it.
fn with_fault_report(vcpu: &Vcpu, outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::End(Exit { fault: Some(what), reason, code, vcpu: number }) => {
            let fault = Some(fault::describe(vcpu, &what));
            Outcome::End(Exit { fault, reason, code, vcpu: number })
        }
        other => other,
    }
}

/// Complete an access that has been answered, and at most so many that follow from it, without
/// running the guest on.
pub(crate) fn settle(vcpu: &mut Vcpu, cell: &Cell, steps: usize) -> Outcome {
    for _ in 0..steps {
        if !vcpu.is_pending && vcpu.waiting.is_none() {
            break;
        }
        vcpu.page.set(true);
        match step(vcpu, cell) {
            Outcome::Continue | Outcome::Wait => {}
            end => return end,
        }
    }
    Outcome::Continue
}

/// The same until it can be left. KVM leaves a repeated access at every 1,024th step; what ends a
/// guest there does not end this. What it came to last, but for nothing.
pub(crate) fn settle_for_good(vcpu: &mut Vcpu, cell: &Cell) -> Outcome {
    let mut last = Outcome::Continue;
    for _ in 0..2048 {
        if !vcpu.is_pending && vcpu.waiting.is_none() {
            break;
        }
        match settle(vcpu, cell, 1) {
            Outcome::Continue | Outcome::Wait => {}
            end => last = end,
        }
    }
    last
}

/// Let a hook look first; none when the exit is answered as if it had not.
fn ask_hook(vcpu: &mut Vcpu, cell: &Cell, exit: &VcpuExit) -> Option<Outcome> {
    let hook = vcpu.dispatch.hook()?;
    let (id, mut reply) = (vcpu.id, Reply::Default);
    let outcome = cell.lend(vcpu, || hook.on_exit(id, exit, &mut reply))?;
    if !matches!(outcome, Outcome::Continue | Outcome::Wait) {
        return Some(outcome);
    }
    match reply {
        Reply::Default => vcpu.page.allow_msr(),
        Reply::Data(data) => {
            vcpu.page.answer(&data);
            vcpu.page.allow_msr();
        }
        Reply::Retry => vcpu.execute_again(exit, &cell.stop),
    }
    Some(Outcome::Continue)
}

fn on_exit(exit: &VcpuExit, vcpu: &mut Vcpu, cell: &Cell) -> Outcome {
    match exit {
        VcpuExit::IoIn { port, size, count } => access::port_in(vcpu, cell, *port, *size, *count),
        VcpuExit::IoOut { port, size, data } => access::port_out(vcpu, cell, *port, *size, data),
        VcpuExit::MmioRead { address, length } => access::mmio_read(vcpu, cell, *address, *length),
        VcpuExit::MmioWrite { address, data } => access::mmio_write(vcpu, cell, *address, data),
        // The guest finds a general protection fault, as KVM itself would have given it.
        VcpuExit::Rdmsr { .. } | VcpuExit::Wrmsr { .. } => Outcome::Continue,
        _ => end_of(exit, vcpu.page.exit_reason(), || {
            fault::internal_error(&vcpu.page.internal_error())
        }),
    }
}

/// What an exit that is no access comes to. `internal_error` says what KVM says of one.
fn end_of(exit: &VcpuExit, number: u32, internal_error: impl FnOnce() -> String) -> Outcome {
    match exit {
        VcpuExit::Hlt => end(Exit::new(ExitReason::Halt)),
        VcpuExit::Interrupted => Outcome::Continue,
        VcpuExit::Shutdown => fault(Exit::new(ExitReason::Shutdown), "triple fault".into()),
        VcpuExit::SystemEvent { kind: KVM_SYSTEM_EVENT_RESET, .. } => {
            end(Exit::new(ExitReason::Reset))
        }
        VcpuExit::SystemEvent { kind: KVM_SYSTEM_EVENT_SHUTDOWN, .. } => {
            end(Exit::new(ExitReason::Shutdown))
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
        VcpuExit::Unknown { number } => unknown(*number),
        // Exits that nothing here has asked KVM for.
        _ => unknown(number),
    }
}

fn on_error(error: kvm_ioctls::Error) -> Outcome {
    match error.errno() {
        libc::EINTR => Outcome::Continue,
        // A vCPU that waited for INIT and SIPI has got one: KVM asks to be entered again.
        libc::EAGAIN => Outcome::Continue,
        errno => fault(
            Exit::with_code(ExitReason::VcpuError, errno_code(errno)),
            format!("KVM_RUN: {error}"),
        ),
    }
}

fn end(exit: Exit) -> Outcome {
    Outcome::End(exit)
}

/// An end whose text gets the vCPU's state.
fn fault(exit: Exit, what: String) -> Outcome {
    Outcome::End(Exit { fault: Some(what), ..exit })
}

fn unknown(number: u32) -> Outcome {
    let exit = Exit::with_code(ExitReason::UnknownExit, u64::from(number));
    let what = match number {
        KVM_EXIT_DEBUG => {
            "a breakpoint or a single step, which only a hook of the kind \"debug\" answers".into()
        }
        _ => format!("KVM exit number {number}, which pyvmm does not handle"),
    };
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
        assert_eq!(reason(outcome(&VcpuExit::Hlt)), (ExitReason::Halt, None));
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
