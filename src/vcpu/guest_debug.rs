//! Single steps and hardware breakpoints (KVM_SET_GUEST_DEBUG), which `Vcpu::debug` sets. The
//! program and a debugger of pyvmm's own each have requests of their own; KVM gets their union.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};

use crate::error::{Error, ErrorKind, Result};

/// The processor's breakpoint registers, DR0 to DR3.
const MAX_BREAKPOINTS: usize = 4;
pub(super) const AT: &str = "KVM_SET_GUEST_DEBUG";

/// The origin of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugOwner {
    /// The program, through `Vcpu.debug`.
    Program,
    /// A debugger of pyvmm's own.
    Host,
}

/// The requests of one owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugRequest {
    /// An exit after each instruction.
    pub single_step: bool,
    /// An exit before the instruction at each of these linear addresses.
    pub breakpoints: Vec<u64>,
}

/// The requests of both owners.
#[derive(Clone, Debug, Default)]
pub(super) struct GuestDebug {
    program: DebugRequest,
    host: DebugRequest,
}

impl GuestDebug {
    pub(super) fn with(&self, owner: DebugOwner, request: DebugRequest) -> Self {
        match owner {
            DebugOwner::Program => Self { program: request, host: self.host.clone() },
            DebugOwner::Host => Self { program: self.program.clone(), host: request },
        }
    }

    /// Whether anything has been requested.
    pub(super) fn is_on(&self) -> bool {
        let none = DebugRequest::default();
        self.program != none || self.host != none
    }

    /// Whether an exit after each instruction has been requested.
    pub(super) fn is_stepping(&self) -> bool {
        self.program.single_step || self.host.single_step
    }

    /// The union of both requests, in KVM's format.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if there are more breakpoints than breakpoint registers.
    pub(super) fn merged(&self) -> Result<kvm_guest_debug> {
        // The program's breakpoints come first, so that the bits of DR6 follow the order of its
        // list.
        let mut breakpoints = self.program.breakpoints.clone();
        let others = self.host.breakpoints.iter();
        breakpoints.extend(others.filter(|other| !self.program.breakpoints.contains(other)));
        if breakpoints.len() > MAX_BREAKPOINTS {
            let detail = format!("{} breakpoints: the processor has four", breakpoints.len());
            return Err(Error::new(ErrorKind::Config, AT, detail));
        }
        let mut debug = kvm_guest_debug::default();
        let registers = debug.arch.debugreg.iter_mut().zip(&breakpoints);
        registers.for_each(|(register, address)| *register = *address);
        if self.program.single_step || self.host.single_step {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        if !breakpoints.is_empty() {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            // DR7: the bit that is always one, and the global enable bit of each breakpoint. Intel
            // SDM volume 3, 18.2.4.
            let enabled = (0..breakpoints.len()).fold(0x400, |dr7, number| dr7 | 2 << (2 * number));
            if let Some(dr7) = debug.arch.debugreg.get_mut(7) {
                *dr7 = enabled;
            }
        }
        Ok(debug)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaks(addresses: &[u64]) -> DebugRequest {
        DebugRequest { single_step: false, breakpoints: addresses.to_vec() }
    }

    fn steps() -> DebugRequest {
        DebugRequest { single_step: true, breakpoints: Vec::new() }
    }

    #[test]
    fn kvm_gets_what_both_owners_ask_for() {
        let debug = GuestDebug::default().with(DebugOwner::Program, breaks(&[0x30, 0x10]));
        let both =
            debug.with(DebugOwner::Host, DebugRequest { single_step: true, ..breaks(&[0x10]) });
        let merged = both.merged().unwrap();
        assert_eq!(merged.arch.debugreg[..4], [0x30, 0x10, 0, 0], "one register for both");
        assert_eq!(merged.arch.debugreg[7], 0x40a);
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP;
        assert_eq!(merged.control, control);
    }

    #[test]
    fn an_owner_that_asks_for_nothing_leaves_the_other_as_it_was() {
        let debug = GuestDebug::default().with(DebugOwner::Host, steps());
        let debug = debug.with(DebugOwner::Program, breaks(&[1]));
        let left = debug.with(DebugOwner::Program, DebugRequest::default()).merged().unwrap();
        assert_eq!(left.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
        let none = GuestDebug::default().merged().unwrap();
        assert_eq!((none.control, none.arch.debugreg), (0, [0; 8]));
    }

    #[test]
    fn the_owners_share_four_breakpoints() {
        let debug = GuestDebug::default().with(DebugOwner::Program, breaks(&[1, 2, 3]));
        assert!(debug.with(DebugOwner::Host, breaks(&[3, 4])).merged().is_ok());
        let error = debug.with(DebugOwner::Host, breaks(&[4, 5])).merged().unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Config, AT));
    }
}
