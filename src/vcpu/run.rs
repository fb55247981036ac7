//! One turn of a vCPU: enter the guest, and the one match over every KVM exit. On the vCPU's thread.

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;

use super::fault;
use super::fixup::fix_up;
use super::kick::ImmediateExit;
use super::registers::Vcpu;
use super::run_page::RunPage;
use crate::devices::{Buses, Flow};
use crate::exit_handler::{Exit, ExitReason};

/// What a turn came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The exit has been answered: enter the guest again.
    Continue,
    /// A signal came, perhaps a kick: look at the stop word.
    Interrupted,
    /// The guest has ended.
    End(Exit),
}

/// What an exit means, before registers are read for it.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done(Step),
    /// An end whose text shows the vCPU's state.
    Fault(Exit, String),
}

/// Enter the guest once and answer its exit.
pub(crate) fn step(vcpu: &mut Vcpu) -> Step {
    vcpu.has_run = true;
    let (outcome, is_pending) = match vcpu.fd.run() {
        Ok(exit) => {
            let is_access = is_access(&exit);
            (on_exit(exit, &vcpu.page, &vcpu.buses), is_access)
        }
        Err(error) => (on_error(error), false),
    };
    (vcpu.is_pending, vcpu.awaits_answer) = (is_pending, false);
    vcpu.has_page_registers = true;
    match outcome {
        Outcome::Done(step) => step,
        Outcome::Fault(exit, _) if exit.reason == ExitReason::InternalError && fix_up(vcpu) => {
            Step::Continue
        }
        Outcome::Fault(exit, what) => {
            let fault = fault::describe(vcpu, &what);
            Step::End(Exit { fault: Some(fault), ..exit })
        }
    }
}

/// Complete an access that has been answered, and at most so many that follow from it, without running the guest on.
pub(crate) fn settle(vcpu: &mut Vcpu, steps: usize) -> Option<Exit> {
    for _ in 0..steps {
        if !vcpu.is_pending {
            break;
        }
        vcpu.page.set(true);
        if let Step::End(exit) = step(vcpu) {
            return Some(exit);
        }
    }
    None
}

/// Whether KVM completes this exit's instruction at the next entry.
fn is_access(exit: &VcpuExit<'_>) -> bool {
    matches!(
        exit,
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) | VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)
    )
}

fn on_exit(exit: VcpuExit<'_>, page: &RunPage, buses: &Buses) -> Outcome {
    match exit {
        VcpuExit::IoIn(port, data) => flow(buses.port_in(port, data, page.io_exit().size)),
        VcpuExit::IoOut(port, data) => flow(buses.port_out(port, data, page.io_exit().size)),
        VcpuExit::MmioRead(address, data) => flow(buses.mmio_read(address, data)),
        VcpuExit::MmioWrite(address, data) => flow(buses.mmio_write(address, data)),
        VcpuExit::Hlt => end(Exit::new(ExitReason::Halt)),
        VcpuExit::Intr => Outcome::Done(Step::Interrupted),
        VcpuExit::Shutdown => fault(Exit::new(ExitReason::Shutdown), "triple fault".into()),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => end(Exit::new(ExitReason::Reset)),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => end(Exit::new(ExitReason::Shutdown)),
        VcpuExit::FailEntry(reason, cpu) => fault(
            Exit::with_code(ExitReason::FailEntry, reason),
            format!(
                "the processor refused to enter the guest, reason {reason:#x}, on host CPU {cpu}"
            ),
        ),
        VcpuExit::InternalError => fault(
            Exit::new(ExitReason::InternalError),
            fault::internal_error(&page.internal_error()),
        ),
        VcpuExit::MemoryFault { flags, gpa, size } => fault(
            Exit::new(ExitReason::VcpuError),
            format!("memory fault at guest-physical {gpa:#x}, {size} bytes, flags {flags:#x}"),
        ),
        VcpuExit::Unsupported(number) => unknown(number),
        // Exits of other architectures, and those that nothing here has asked KVM for.
        _ => unknown(page.exit_reason()),
    }
}

fn on_error(error: kvm_ioctls::Error) -> Outcome {
    match error.errno() {
        libc::EINTR => Outcome::Done(Step::Interrupted),
        // A vCPU that waited for INIT and SIPI has got one: KVM asks to be entered again.
        libc::EAGAIN => Outcome::Done(Step::Interrupted),
        errno => fault(
            Exit::with_code(ExitReason::VcpuError, errno_code(errno)),
            format!("KVM_RUN: {error}"),
        ),
    }
}

fn flow(flow: Flow) -> Outcome {
    match flow {
        Flow::Continue => Outcome::Done(Step::Continue),
        Flow::End(exit) => end(exit),
    }
}

fn end(exit: Exit) -> Outcome {
    Outcome::Done(Step::End(exit))
}

fn fault(exit: Exit, what: String) -> Outcome {
    Outcome::Fault(exit, what)
}

fn unknown(number: u32) -> Outcome {
    let exit = Exit::with_code(ExitReason::UnknownExit, u64::from(number));
    fault(exit, format!("KVM exit number {number}, which pyvmm does not handle"))
}

fn errno_code(errno: i32) -> u64 {
    u64::from(errno.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exit: VcpuExit<'_>) -> Outcome {
        on_exit(exit, &RunPage::blank(), &Buses::default())
    }

    fn reason(outcome: Outcome) -> (ExitReason, Option<u64>) {
        match outcome {
            Outcome::Done(Step::End(exit)) | Outcome::Fault(exit, _) => (exit.reason, exit.code),
            Outcome::Done(step) => panic!("{step:?} is no end"),
        }
    }

    #[test]
    fn every_end_has_its_reason() {
        assert_eq!(reason(outcome(VcpuExit::Hlt)), (ExitReason::Halt, None));
        assert_eq!(reason(outcome(VcpuExit::Shutdown)), (ExitReason::Shutdown, None));
        assert_eq!(reason(outcome(VcpuExit::FailEntry(33, 0))), (ExitReason::FailEntry, Some(33)));
        assert_eq!(reason(outcome(VcpuExit::InternalError)), (ExitReason::InternalError, None));
        let reset = VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, &[]);
        assert_eq!(reason(outcome(reset)), (ExitReason::Reset, None));
    }

    #[test]
    fn an_exit_nobody_knows_ends_the_run_with_its_number() {
        assert_eq!(
            reason(outcome(VcpuExit::Unsupported(4711))),
            (ExitReason::UnknownExit, Some(4711))
        );
        assert_eq!(reason(outcome(VcpuExit::Hyperv)), (ExitReason::UnknownExit, Some(0)));
        assert_eq!(
            reason(outcome(VcpuExit::SystemEvent(99, &[]))),
            (ExitReason::UnknownExit, Some(0))
        );
    }

    #[test]
    fn an_error_of_kvm_run_ends_the_run_but_a_signal_does_not() {
        assert_eq!(on_error(kvm_ioctls::Error::new(libc::EINTR)), Outcome::Done(Step::Interrupted));
        let (reason, code) = reason(on_error(kvm_ioctls::Error::new(libc::EFAULT)));
        assert_eq!((reason, code), (ExitReason::VcpuError, Some(14)));
    }
}
