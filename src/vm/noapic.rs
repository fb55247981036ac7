//! One vCPU without a LAPIC that stays until the process ends. KVM changes its own code when the
//! host's first such vCPU appears and when the last one goes (`kvm_has_noapic_vcpu`), and stops
//! every processor for that. Machines that are made and closed one after another would each pay it.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Result;
use crate::kvm::{checked, create_vm, open_kvm};
use crate::vcpu;

/// Called for each machine without an interrupt controller. The second one of a process keeps a
/// vCPU: most programs make one machine, or many. For a forked child, that of its parent does.
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

/// Create a vCPU that no descriptor keeps, but a mapping of its page.
fn keep() -> Result<()> {
    let vm = create_vm(&open_kvm()?)?;
    let vcpu = checked("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
    let (access, flags) = (libc::PROT_READ, libc::MAP_SHARED);
    let (size, fd) = (4096, vcpu.as_raw_fd());
    // SAFETY: a new mapping, which nothing uses.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), size, access, flags, fd, 0);
        if page != libc::MAP_FAILED {
            // A forked child has no use for it.
            libc::madvise(page, size, libc::MADV_DONTFORK);
        }
    }
    Ok(())
}
