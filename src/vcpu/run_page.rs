//! A second mapping of a vCPU's `kvm_run` page: to set `immediate_exit` from another thread while
//! `VcpuFd::run` borrows its own, and to access fields that kvm-ioctls does not expose.
//!
//! KVM_RUN reads these fields on entry, so none may keep a value of a guest that has been replaced:
//!
//! - `cr8`, without an in-kernel LAPIC, replaces the register; `apic_base` is documented as an
//!   input too. Whatever sets the special registers sets both (`Vcpu::set_special`).
//! - `immediate_exit` belongs to the kick (`kick.rs`), and is cleared before the next run.
//! - `kvm_valid_regs` never changes. `kvm_dirty_regs` and the registers that it refers to are set
//!   together (`entry.rs`), and KVM clears the bits.
//! - `request_interrupt_window` is never set.
//! - The answer to the last exit is read only if KVM has an access to complete, which a reset
//!   abandons first.
//!
//! `flags`, `if_flag` and `ready_for_interrupt_injection` are only outputs.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_SREGS, kvm_regs, kvm_run, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;

use super::exit::Data;
use super::kick::ImmediateExit;
use crate::error::{Error, ErrorKind, Result};

/// The mapping: `kvm_run`, followed by the data of port accesses.
const PAGES: usize = 2 * 4096;
const _: () = assert!(size_of::<kvm_run>() <= PAGES);

/// What KVM takes at an entry besides the general registers, if it is asked to.
const ENTRY_STATE: u64 = (KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as u64;

/// The page, mapped while this lives.
#[derive(Debug)]
pub(crate) struct RunPage(NonNull<kvm_run>);

// SAFETY: the mapping belongs to the process, not to a thread. The one field that another thread
// touches, immediate_exit, is only ever reached as an atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above; the other fields are read by copy, on the vCPU's thread, between two runs.
unsafe impl Sync for RunPage {}

/// `kvm_run.io` of the last exit: the width distinguishes `OUTW` from two `OUTSB`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IoExit {
    pub(crate) size: usize,
}

/// `kvm_run.internal` of the last exit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InternalError {
    pub(crate) suberror: u32,
    /// At most 15 bytes of the instruction that KVM could not emulate.
    pub(crate) instruction: [u8; 15],
    pub(crate) instruction_len: usize,
    pub(crate) data: [u64; 16],
    pub(crate) ndata: usize,
}

impl RunPage {
    pub(crate) fn new(vcpu: &VcpuFd) -> Result<Self> {
        // SAFETY: a fresh shared mapping of the vCPU fd's first page, at an address the kernel
        // chooses.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(Error::os(ErrorKind::Kvm, "mmap of kvm_run", &io::Error::last_os_error()));
        }
        match NonNull::new(page.cast()) {
            Some(page) => Ok(Self(page)),
            None => Err(Error::new(ErrorKind::Kvm, "mmap of kvm_run", "mapped at address zero")),
        }
    }

    /// A page of zeros without a vCPU.
    #[cfg(test)]
    pub(crate) fn blank() -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (access, size) = (libc::PROT_READ | libc::PROT_WRITE, PAGES);
        // SAFETY: a fresh anonymous mapping.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        Self(NonNull::new(page.cast()).unwrap())
    }

    #[cfg(test)]
    pub(crate) fn is_set(&self) -> bool {
        // SAFETY: the page is mapped for as long as this lives.
        unsafe { &*self.flag() }.load(Ordering::SeqCst) != 0
    }

    /// `immediate_exit`, which other threads and signal handlers set.
    pub(super) fn flag(&self) -> *const AtomicU8 {
        // SAFETY: kvm-ioctls has &mut to *its* mapping of this page while `run` is in progress.
        // This is another mapping, at other addresses, so the two never alias as Rust objects. The
        // byte is one that the kernel documents as written by user space from other threads; it is
        // in bounds and an AtomicU8 needs no alignment.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        std::ptr::from_ref(flag)
    }

    /// `kvm_run.exit_reason` of the last exit. On the vCPU's thread, between two runs.
    pub(crate) fn exit_reason(&self) -> u32 {
        // SAFETY: in bounds of the mapping; volatile because the kernel writes it.
        unsafe { (&raw const (*self.0.as_ptr()).exit_reason).read_volatile() }
    }

    /// The general registers as the last exit left them, if KVM was asked for them. While the vCPU
    /// is at rest.
    pub(crate) fn registers(&self) -> kvm_regs {
        // SAFETY: in bounds; plain integers.
        unsafe { (&raw const (*self.0.as_ptr()).s.regs.regs).read_volatile() }
    }

    /// Eight bytes of [`Self::registers`]; none if they are no register.
    pub(crate) fn register(&self, offset: usize) -> Option<u64> {
        let is_one = offset.is_multiple_of(8) && offset < size_of::<kvm_regs>();
        // SAFETY: in bounds, because the structure consists of words; an integer.
        is_one.then(|| unsafe {
            let registers = (&raw const (*self.0.as_ptr()).s.regs.regs).cast::<u64>();
            registers.add(offset / 8).read_volatile()
        })
    }

    /// Store general registers that have been set in KVM. While the vCPU is at rest.
    pub(crate) fn set_registers(&self, registers: &kvm_regs) {
        // SAFETY: as above; no other thread writes there while the vCPU is at rest.
        unsafe { (&raw mut (*self.0.as_ptr()).s.regs.regs).write_volatile(*registers) };
    }

    /// Give KVM what it takes from the page instead of from KVM_SET_SREGS, if the vCPU has no
    /// in-kernel LAPIC. While the vCPU is at rest.
    pub(crate) fn set_special(&self, cr8: u64, apic_base: u64) {
        // SAFETY: in bounds; no other thread writes there while the vCPU is at rest.
        unsafe {
            (&raw mut (*self.0.as_ptr()).cr8).write_volatile(cr8);
            (&raw mut (*self.0.as_ptr()).apic_base).write_volatile(apic_base);
        }
    }

    /// Have KVM take these special registers and events at the next entry. While the vCPU is at
    /// rest.
    pub(crate) fn set_entry_state(&self, sregs: &kvm_sregs, events: &kvm_vcpu_events) {
        let page = self.0.as_ptr();
        // SAFETY: in bounds; no other thread writes there while the vCPU is at rest.
        unsafe {
            (&raw mut (*page).s.regs.sregs).write_volatile(*sregs);
            (&raw mut (*page).s.regs.events).write_volatile(*events);
            let dirty = &raw mut (*page).kvm_dirty_regs;
            dirty.write_volatile(dirty.read_volatile() | ENTRY_STATE);
        }
    }

    /// What `set_entry_state` has stored since the last entry: KVM no longer takes it at the next.
    /// While the vCPU is at rest.
    pub(crate) fn take_entry_state(&self) -> Option<(kvm_sregs, kvm_vcpu_events)> {
        let page = self.0.as_ptr();
        // SAFETY: as above; plain integers, which are valid with any bits.
        unsafe {
            let dirty = &raw mut (*page).kvm_dirty_regs;
            let now = dirty.read_volatile();
            if now & ENTRY_STATE == 0 {
                return None;
            }
            dirty.write_volatile(now & !ENTRY_STATE);
            let (sregs, events) =
                (&raw const (*page).s.regs.sregs, &raw const (*page).s.regs.events);
            Some((sregs.read_volatile(), events.read_volatile()))
        }
    }

    /// The width of the last port access. Only after `KVM_EXIT_IO`, on the vCPU's thread.
    pub(crate) fn io_exit(&self) -> IoExit {
        // SAFETY: in bounds; every bit pattern is a valid kvm_run__bindgen_ty_1__bindgen_ty_4.
        let io = unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.io).read_volatile() };
        IoExit { size: usize::from(io.size).clamp(1, 8) }
    }

    /// Give KVM the data that the guest reads, if it has the right length; returns that length.
    /// Only after a read's exit, while the vCPU is at rest or on its thread.
    pub(crate) fn answer(&self, data: &[u8]) -> usize {
        let Some((to, wanted)) = self.answer_place() else { return 0 };
        if data.len() == wanted {
            self.allow_msr();
            // SAFETY: `wanted` bytes at `to` lie in the mapping; no other thread writes there while
            // the vCPU is at rest.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, wanted) };
        }
        wanted
    }

    /// The data that KVM will give the guest; `None` if the last exit was not a read, or the read
    /// faults. Only as for [`Self::answer`].
    pub(super) fn answered(&self) -> Option<Data> {
        let (from, length) = self.answer_place()?;
        // SAFETY: in bounds; the view of this exit.
        let has_failed = self.exit_reason() == KVM_EXIT_X86_RDMSR
            && unsafe {
                (&raw const (*self.0.as_ptr()).__bindgen_anon_1.msr.error).read_volatile()
            } != 0;
        let mut data = Data::from_elem(0, length);
        // SAFETY: `length` bytes at `from` lie in the mapping, and as many at the data; no other
        // thread writes there while the vCPU is at rest.
        unsafe { std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), length) };
        Some(data).filter(|_| !has_failed)
    }

    /// Where KVM reads the data of a read, and how many bytes; `None` if the last exit was not a
    /// read. They lie in the mapping.
    fn answer_place(&self) -> Option<(*mut u8, usize)> {
        // SAFETY: in bounds; every bit pattern is valid for both views.
        let (io, mmio) = unsafe {
            let exit = &raw mut (*self.0.as_ptr()).__bindgen_anon_1;
            ((&raw const (*exit).io).read_volatile(), &raw mut (*exit).mmio)
        };
        match self.exit_reason() {
            KVM_EXIT_IO => {
                let length = usize::from(io.size) * usize::try_from(io.count).unwrap_or(0);
                let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
                // KVM's buffer for port data is a page of its own, after this one in the same
                // mapping.
                let is_inside = offset.saturating_add(length) <= PAGES;
                is_inside.then(|| (self.0.as_ptr().cast::<u8>().wrapping_add(offset), length))
            }
            KVM_EXIT_MMIO => {
                // SAFETY: as above.
                let length = unsafe { (&raw const (*mmio).len).read_volatile() };
                // SAFETY: as above; the address of a field of the mapping.
                let data = unsafe { &raw mut (*mmio).data };
                Some((data.cast(), usize::try_from(length).unwrap_or(0).min(8)))
            }
            KVM_EXIT_X86_RDMSR => {
                // SAFETY: in bounds of the mapping.
                let register = unsafe { &raw mut (*self.0.as_ptr()).__bindgen_anon_1.msr.data };
                Some((register.cast(), 8))
            }
            _ => None,
        }
    }

    /// Have the access to a model-specific register succeed. Only after its exit, before the next
    /// entry.
    pub(crate) fn allow_msr(&self) {
        if matches!(self.exit_reason(), KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) {
            // SAFETY: in bounds; no other thread writes there while the vCPU is out of its guest.
            unsafe { (&raw mut (*self.0.as_ptr()).__bindgen_anon_1.msr.error).write_volatile(0) };
        }
    }

    /// KVM's report of its last internal error. Only after `KVM_EXIT_INTERNAL_ERROR`, on the
    /// vCPU's thread.
    pub(crate) fn internal_error(&self) -> InternalError {
        // SAFETY: in bounds; both views are plain integers, valid for every bit pattern.
        let (internal, emulation) = unsafe {
            let exit = &raw const (*self.0.as_ptr()).__bindgen_anon_1;
            (
                (&raw const (*exit).internal).read_volatile(),
                (&raw const (*exit).emulation_failure).read_volatile(),
            )
        };
        let ndata = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
        let mut error = InternalError {
            suberror: internal.suberror,
            instruction: [0; 15],
            instruction_len: 0,
            data: internal.data,
            ndata,
        };
        let has_bytes =
            u64::from(kvm_bindings::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        if error.suberror == kvm_bindings::KVM_INTERNAL_ERROR_EMULATION
            && ndata > 0
            && emulation.flags & has_bytes != 0
        {
            // SAFETY: the flag says that KVM filled this view; plain bytes all the same.
            let bytes = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
            error.instruction = bytes.insn_bytes;
            error.instruction_len = usize::from(bytes.insn_size).min(15);
        }
        error
    }
}

impl ImmediateExit for RunPage {
    fn set(&self, value: bool) {
        // SAFETY: the page is mapped for as long as this lives.
        let flag = unsafe { &*self.flag() };
        // SeqCst: ordered against the stop word, which the vCPU's thread reads after it was
        // returned by this flag.
        flag.store(u8::from(value), Ordering::SeqCst);
    }
}

/// Map the run page of a vCPU until the process ends. A forked child does not inherit it.
///
/// # Errors
/// If it cannot be mapped.
pub(crate) fn keep_run_page(vcpu: &VcpuFd) -> Result<()> {
    let page = RunPage::new(vcpu)?;
    // SAFETY: the mapping of this page, of this size. It is not used.
    unsafe { libc::madvise(page.0.as_ptr().cast(), PAGES, libc::MADV_DONTFORK) };
    std::mem::forget(page);
    Ok(())
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this size, and it can no longer be reached.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGES) };
    }
}
