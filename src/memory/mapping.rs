//! A mapping of guest memory in this process, and what a forked child gets in its place. Any
//! thread.
//!
//! No Rust reference to the bytes of a mapping exists: guests, other threads and Python change them
//! at any time. They are accessed through `VolatileSlice`, atomics or the kernel. So the pages
//! under a mapping may be replaced.

use std::cell::UnsafeCell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{MmapRegion, VolatileSlice};

use super::ranges::ByteRange;
use crate::error::{Error, ErrorKind, Result};

/// One mapping, shared by the slot, the map of guest memory and the views.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Dropped before the region is unmapped.
    shared: Option<Registered>,
    region: Arc<MmapRegion>,
}

impl Mapping {
    /// A mapping that a forked child keeps as it is: of a file that others map too, or a private
    /// one.
    pub(crate) fn new(region: MmapRegion) -> Arc<Self> {
        Arc::new(Self { shared: None, region: Arc::new(region) })
    }

    /// A shared mapping of a memfd that belongs to one machine. A forked child gets a private
    /// mapping in its place: otherwise its writes would show in the parent's machine, and in pages
    /// that a snapshot has frozen.
    pub(crate) fn of_own(region: MmapRegion) -> Arc<Self> {
        let shared = Registered::new(&region);
        Arc::new(Self { shared, region: Arc::new(region) })
    }

    pub(crate) fn region(&self) -> &Arc<MmapRegion> {
        &self.region
    }

    /// Its address in this process, as the kernel takes it.
    pub(crate) fn host(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    pub(crate) fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// The memfd given to [`Self::of_own`].
    pub(crate) fn own_file(&self) -> Option<Arc<File>> {
        self.shared.as_ref().and(self.region.file_offset()).map(|file| Arc::clone(file.arc()))
    }

    /// Replace the pages under it with private ones by calling `exchange`. No child can be forked
    /// meanwhile.
    pub(crate) fn make_private(&self, exchange: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut all = registry();
        exchange()?;
        if let Some(Registered { host }) = self.shared {
            all.retain(|entry| entry.host != host);
        }
        Ok(())
    }
}

/// A part of a region, with its bounds checked.
///
/// # Errors
/// If the region does not contain these bytes.
pub(crate) fn part(region: &MmapRegion, (start, end): (u64, u64)) -> Result<VolatileSlice<'_>> {
    let wrong = || {
        let detail = format!("bytes {start:#x} to {end:#x} of a mapping of {:#x}", region.size());
        Error::new(ErrorKind::Memory, "memory", detail)
    };
    let offset = usize::try_from(start).map_err(|_| wrong())?;
    let length = end.checked_sub(start).and_then(|length| usize::try_from(length).ok());
    region.get_slice(offset, length.ok_or_else(wrong)?).map_err(|_| wrong())
}

/// Whether two regions hold the same bytes in a range.
pub(crate) fn is_same(a: &MmapRegion, b: &MmapRegion, range: ByteRange) -> Result<bool> {
    let (a, b) = (part(a, range)?, part(b, range)?);
    let (from, to) = (a.ptr_guard(), b.ptr_guard());
    // SAFETY: both slices have the same length. Their bytes belong to no Rust object and are
    // compared outside of Rust: a concurrent write makes the answer stale, not undefined.
    Ok(unsafe { libc::memcmp(from.as_ptr().cast(), to.as_ptr().cast(), a.len()) == 0 })
}

/// A mapping that a forked child replaces with a private one.
#[derive(Debug)]
struct Entry {
    host: usize,
    length: usize,
    fd: i32,
    offset: i64,
}

/// Keeps an entry in the registry until it is dropped.
#[derive(Debug)]
struct Registered {
    host: usize,
}

/// Every mapping that a child must not share. The `pthread_atfork` handlers hold the lock during
/// each fork, so that the child finds the list complete and owns the lock. It is a lock of std,
/// without a rank: the child can release it without the parent's waiters. No other lock is taken
/// while it is held.
static REGISTRY: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

fn registry() -> MutexGuard<'static, Vec<Entry>> {
    // No panic can leave the list half changed.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registered {
    fn new(region: &MmapRegion) -> Option<Self> {
        static HANDLERS: Once = Once::new();
        HANDLERS.call_once(|| {
            // SAFETY: the handlers live in this module, which is never unloaded: Python keeps
            // native modules loaded.
            unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
        });
        let file = region.file_offset()?;
        let entry = Entry {
            host: region.as_ptr() as usize,
            length: region.size(),
            fd: file.file().as_raw_fd(),
            offset: i64::try_from(file.start()).ok()?,
        };
        let host = entry.host;
        registry().push(entry);
        Some(Self { host })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        registry().retain(|entry| entry.host != self.host);
    }
}

/// Carries the registry's lock from `before` to the handler that follows it.
struct ForkGuard(UnsafeCell<Option<MutexGuard<'static, Vec<Entry>>>>);

// SAFETY: only the thread that holds `REGISTRY` touches the guard: `before` stores it after taking
// the lock, and the next handler, in the same thread or in its copy in the child, takes it out and
// releases the lock.
unsafe impl Sync for ForkGuard {}

static FORK_GUARD: ForkGuard = ForkGuard(UnsafeCell::new(None));

extern "C" fn before() {
    let lock = registry();
    // SAFETY: this thread holds the lock.
    unsafe { *FORK_GUARD.0.get() = Some(lock) };
}

extern "C" fn in_parent() {
    // SAFETY: this thread has held the lock since `before`.
    let lock = unsafe { (*FORK_GUARD.0.get()).take() };
    drop(lock);
}

extern "C" fn in_child() {
    // SAFETY: this is the child's only thread, and its copy of the lock has been held since
    // `before`.
    let mut lock = unsafe { (*FORK_GUARD.0.get()).take() };
    for entry in lock.iter_mut().flat_map(|all| all.drain(..)) {
        let at = std::ptr::with_exposed_provenance_mut::<libc::c_void>(entry.host);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the entry names a whole mapping that the parent had at the fork, so the child has
        // it too. mmap is a plain system call, which is allowed in the child
        // of a multi-threaded process. The new mapping shows the same bytes.
        let mapped = unsafe { libc::mmap(at, entry.length, access, flags, entry.fd, entry.offset) };
        if mapped == libc::MAP_FAILED {
            // SAFETY: as above. Without memory for a private mapping the child may only read.
            unsafe { libc::mprotect(at, entry.length, libc::PROT_READ) };
        }
    }
    drop(lock);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;

    fn byte(region: &MmapRegion) -> VolatileSlice<'_> {
        part(region, (0, 1)).unwrap()
    }

    /// What `act` returns in a forked child.
    fn in_a_child(act: impl FnOnce() -> u8) -> i32 {
        // SAFETY: the child only reads and writes a mapping, then exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(act())) };
        }
        let mut status = 0;
        // SAFETY: the status outlives the call.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        libc::WEXITSTATUS(status)
    }

    fn get(region: &MmapRegion) -> u8 {
        let mut value = [0];
        byte(region).copy_to(&mut value);
        value[0]
    }

    #[test]
    fn a_forked_child_reads_what_was_there_and_writes_its_own() {
        let mapping = Mapping::of_own(anonymous(4096).unwrap());
        let region = mapping.region();
        byte(region).copy_from(&[7u8]);
        let told = in_a_child(|| {
            let found = get(region);
            byte(region).copy_from(&[9u8]);
            10 * found + get(region)
        });
        assert_eq!((told, get(region)), (79, 7));
    }

    #[test]
    fn what_is_private_or_gone_is_left_alone_in_a_child() {
        let is_registered = |host: u64| registry().iter().any(|entry| entry.host as u64 == host);
        let mapping = Mapping::of_own(anonymous(4096).unwrap());
        let host = mapping.host();
        assert!(is_registered(host));
        let failed = || Err(Error::new(ErrorKind::Memory, "test", "no memory"));
        mapping.make_private(failed).unwrap_err();
        assert!(is_registered(host), "it is shared as before");
        mapping.make_private(|| Ok(())).unwrap();
        assert!(!is_registered(host));
        let mapping = Mapping::of_own(anonymous(4096).unwrap());
        let host = mapping.host();
        drop(mapping);
        assert!(!is_registered(host));
    }

    #[test]
    fn a_part_outside_is_refused() {
        let region = anonymous(8192).unwrap();
        assert_eq!(part(&region, (4096, 8192)).unwrap().len(), 4096);
        for wrong in [(0, 8193), (8193, 8193), (4096, 0), (u64::MAX, u64::MAX)] {
            assert!(part(&region, wrong).is_err(), "{wrong:?}");
        }
    }
}
