//! One vCPU without a LAPIC that stays until the process ends. KVM changes its own code when the
//! host's first such vCPU appears and when the last one goes (`kvm_has_noapic_vcpu`), and stops
//! every processor for that. Machines that are made and closed one after another would each pay it.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Result;
use crate::kvm::{checked, create_vm, open_kvm};
use crate::vcpu;

/// Called for each machine without an interrupt controller. The second call of a process keeps a
/// vCPU, because most programs create either one machine or many. A forked child benefits from the
/// vCPU of its parent.
pub(super) fn keep_one() {
    static MADE: AtomicU32 = AtomicU32::new(0);
    // Relaxed: a counter. It may wrap: one more vCPU does no harm.
    if MADE.fetch_add(1, Ordering::Relaxed) != 1 {
        return;
    }
    // KVM's debugfs names a VM by its thread and descriptor. The number of a thread that has ended
    // is not taken again soon, so that no later machine has the same name.
    let keeper = vcpu::spawn("pyvmm-noapic".to_owned(), || drop(keep()));
    // Without this vCPU, machines only cost more.
    let _ = keeper.map(std::thread::JoinHandle::join);
}

/// Create a vCPU that no descriptor keeps, but a mapping of its run page.
fn keep() -> Result<()> {
    let vm = create_vm(&open_kvm()?)?;
    vcpu::keep_run_page(&checked("KVM_CREATE_VCPU", vm.create_vcpu(0))?)
}
