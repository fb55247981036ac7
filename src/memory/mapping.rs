//! A mapping of guest memory in this process, and what a forked child gets of it. Any thread.
//!
//! Nobody holds a Rust reference to the bytes of a mapping: guests, other threads and Python change
//! them at any time. They are reached by `VolatileSlice`, by an atomic, or by the kernel. So the
//! pages under a mapping may be exchanged.

use std::cell::UnsafeCell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{MmapRegion, VolatileSlice};

use crate::error::{Error, ErrorKind, Result};

/// One mapping, shared by the slot, the map of guest memory and the views.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Before the region, which is unmapped behind it.
    shared: Option<Registered>,
    region: Arc<MmapRegion>,
}

impl Mapping {
    /// A mapping that a forked child shares with its parent: of a file that others map too, or a
    /// private one.
    pub(crate) fn new(region: MmapRegion) -> Arc<Self> {
        Arc::new(Self { shared: None, region: Arc::new(region) })
    }

    /// A shared mapping of a memfd that is one machine's alone. A forked child gets a private one
    /// in its place: what the child writes would otherwise show in the machine, and in the pages
    /// that a snapshot freezes.
    pub(crate) fn of_own(region: MmapRegion) -> Arc<Self> {
        let shared = Registered::new(&region);
        Arc::new(Self { shared, region: Arc::new(region) })
    }

    pub(crate) fn region(&self) -> &Arc<MmapRegion> {
        &self.region
    }

    /// Where it starts in this process, as the kernel wants it.
    pub(crate) fn host(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    pub(crate) fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// The memfd of [`Self::of_own`].
    pub(crate) fn own_file(&self) -> Option<Arc<File>> {
        self.shared.as_ref().and(self.region.file_offset()).map(|file| Arc::clone(file.arc()))
    }

    /// Exchange the pages under it for private ones by `exchange`; no child is forked meanwhile.
    pub(crate) fn make_private(&self, exchange: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut all = registry();
        exchange()?;
        if let Some(Registered { host }) = self.shared {
            all.retain(|entry| entry.host != host);
        }
        Ok(())
    }
}

/// A part of a region: its bounds are checked here, and it lives no longer than the region.
///
/// # Errors
/// When the region does not have these bytes.
pub(crate) fn part(region: &MmapRegion, (start, end): (u64, u64)) -> Result<VolatileSlice<'_>> {
    let wrong = || {
        let detail = format!("bytes {start:#x} to {end:#x} of a mapping of {:#x}", region.size());
        Error::new(ErrorKind::Memory, "memory", detail)
    };
    let offset = usize::try_from(start).map_err(|_| wrong())?;
    let length = end.checked_sub(start).and_then(|length| usize::try_from(length).ok());
    region.get_slice(offset, length.ok_or_else(wrong)?).map_err(|_| wrong())
}

/// What the child of a fork does with one mapping.
#[derive(Debug)]
struct Entry {
    host: usize,
    length: usize,
    fd: i32,
    offset: i64,
}

/// An entry, for as long as this lives.
#[derive(Debug)]
struct Registered {
    host: usize,
}

/// Every mapping that a child must not share. `pthread_atfork` holds the lock over each fork, so
/// that the child finds the list whole and the lock its own. A lock of std, without a rank: the
/// child gives it back without looking at the waiters of its parent. No other lock is taken under
/// it.
static REGISTRY: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

fn registry() -> MutexGuard<'static, Vec<Entry>> {
    // Nothing panics between two states of the list.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registered {
    fn new(region: &MmapRegion) -> Option<Self> {
        static HANDLERS: Once = Once::new();
        HANDLERS.call_once(|| {
            // SAFETY: three functions of this module, which is never unloaded: Python keeps its
            // native modules.
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

/// The lock between the handlers of one fork.
struct Held(UnsafeCell<Option<MutexGuard<'static, Vec<Entry>>>>);

// SAFETY: only the thread that holds `REGISTRY` touches the handle: `before` fills it once it has the
// lock, and the handler that takes it out, in the same thread of the parent or in its copy in the
// child, gives the lock back with it.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));

extern "C" fn before() {
    let lock = registry();
    // SAFETY: this thread holds the lock.
    unsafe { *HELD.0.get() = Some(lock) };
}

extern "C" fn in_parent() {
    // SAFETY: this thread holds the lock since `before`.
    let lock = unsafe { (*HELD.0.get()).take() };
    drop(lock);
}

extern "C" fn in_child() {
    // SAFETY: this is the one thread of the child, and its copy of the lock is held since `before`.
    let mut lock = unsafe { (*HELD.0.get()).take() };
    for entry in lock.iter_mut().flat_map(|all| all.drain(..)) {
        let at = std::ptr::with_exposed_provenance_mut::<libc::c_void>(entry.host);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the entry names a whole mapping that the parent had at the fork, and so has the
        // child. mmap is a bare system call: it may be made in the child of a process of many
        // threads. The same bytes show at once.
        let mapped = unsafe { libc::mmap(at, entry.length, access, flags, entry.fd, entry.offset) };
        if mapped == libc::MAP_FAILED {
            // SAFETY: as above; without memory for a mapping of its own the child may only read.
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

    /// Fork; what the child's `act` returns.
    fn in_a_child(act: impl FnOnce() -> u8) -> i32 {
        // SAFETY: the child reads and writes a mapping and leaves.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(act())) };
        }
        let mut status = 0;
        // SAFETY: our own child, and a status that lives through the call.
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
