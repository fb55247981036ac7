//! Work that the last exit of a vCPU has left for its next entry.

use kvm_bindings::kvm_regs;
use zerocopy::IntoBytes;

use super::exit::VcpuExit;

/// The work that the last exit has left.
#[derive(Debug, Default)]
pub(crate) enum PendingIo {
    /// None.
    #[default]
    Idle,
    /// An access whose instruction KVM completes at the next entry.
    Access {
        /// Whether it is a read whose data can still be given. Until then the guest reads all one
        /// bits.
        awaits_answer: bool,
        /// Changes to apply once the instruction is complete.
        edits: Option<Box<RegisterEdits>>,
    },
    /// An exit that completing an instruction has produced. The next entry returns it.
    Exit(VcpuExit),
}

impl PendingIo {
    /// The work that this exit leaves.
    pub(super) fn after(exit: &VcpuExit) -> Self {
        match exit.is_access() {
            true => Self::Access { awaits_answer: exit.is_read(), edits: None },
            false => Self::Idle,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self, Self::Idle)
    }

    /// Whether KVM would complete an access, now or after the pending exit.
    pub(super) fn is_access(&self) -> bool {
        match self {
            Self::Idle => false,
            Self::Access { .. } => true,
            Self::Exit(exit) => exit.is_access(),
        }
    }

    pub(super) fn is_answered(&self) -> bool {
        matches!(self, Self::Access { awaits_answer: false, .. })
    }

    pub(super) fn awaits_answer(&self) -> bool {
        matches!(self, Self::Access { awaits_answer: true, .. })
    }

    /// Note that the read has its data.
    pub(super) fn set_answered(&mut self) {
        if let Self::Access { awaits_answer, .. } = self {
            *awaits_answer = false;
        }
    }

    pub(super) fn edits(&self) -> Option<&RegisterEdits> {
        match self {
            Self::Access { edits, .. } => edits.as_deref(),
            _ => None,
        }
    }

    pub(super) fn take_edits(&mut self) -> Option<Box<RegisterEdits>> {
        match self {
            Self::Access { edits, .. } => edits.take(),
            _ => None,
        }
    }
}

/// Changes of general registers to apply at the end of an instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegisterEdits {
    /// The registers at the exit.
    pub(super) from: kvm_regs,
    /// The registers as a hook has set them.
    pub(super) to: kvm_regs,
}

impl RegisterEdits {
    pub(super) fn is_change(&self) -> bool {
        self.from != self.to
    }

    /// Apply the changes to the registers after the instruction.
    pub(super) fn over(&self, after: &kvm_regs) -> kvm_regs {
        let mut regs = *after;
        let words = regs.as_mut_bytes().chunks_exact_mut(8);
        let pairs = self.from.as_bytes().chunks_exact(8).zip(self.to.as_bytes().chunks_exact(8));
        for (word, (from, to)) in words.zip(pairs) {
            if from != to {
                word.copy_from_slice(to);
            }
        }
        regs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_complete_once_it_has_its_data() {
        let mut pending = PendingIo::after(&VcpuExit::MmioRead { address: 0, length: 4 });
        assert!(pending.awaits_answer() && pending.is_access() && !pending.is_answered());
        pending.set_answered();
        assert!(!pending.awaits_answer() && pending.is_answered());
        let write = PendingIo::after(&VcpuExit::MmioWrite { address: 0, data: [0; 4][..].into() });
        assert!(write.is_answered() && !write.is_idle());
        assert!(PendingIo::after(&VcpuExit::Hlt).is_idle());
    }

    #[test]
    fn an_exit_that_waits_is_an_access_if_it_is_one() {
        assert!(!PendingIo::Exit(VcpuExit::Hlt).is_access());
        let exit = PendingIo::Exit(VcpuExit::IoIn { port: 1, size: 1, count: 1 });
        assert!(exit.is_access() && !exit.awaits_answer() && !exit.is_idle());
    }

    #[test]
    fn edits_change_what_they_changed_and_nothing_else() {
        let from = kvm_regs { rax: 1, rip: 10, ..Default::default() };
        let edits = RegisterEdits { from, to: kvm_regs { rax: 2, ..from } };
        let after = edits.over(&kvm_regs { rax: 7, rip: 12, rcx: 3, ..Default::default() });
        assert_eq!((after.rax, after.rip, after.rcx), (2, 12, 3));
        assert!(edits.is_change() && !RegisterEdits { from, to: from }.is_change());
        let mut pending = PendingIo::Access { awaits_answer: false, edits: Some(Box::new(edits)) };
        assert!(pending.edits().is_some() && pending.take_edits().is_some());
        assert!(pending.edits().is_none() && pending.is_answered());
    }
}
