//! A disk as a machine has it: it can be frozen for a snapshot, continued by forks, and brought
//! back to what was frozen. Requests come from one thread at a time; the rest may come from any
//! thread.

use std::io;
use std::sync::Arc;

use super::backend::{Backend, read_only};
use super::frozen::Frozen;
use super::medium::Medium;
use super::overlay::Overlay;
use super::slices::{self, Slice};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, RwLock, rank};

/// See the module.
#[derive(Debug)]
pub struct Disk {
    medium: RwLock<Arc<Medium>, rank::DiskMedium>,
    /// What is to be written back before the next request.
    pending: Mutex<Option<Arc<Frozen>>, rank::DiskPending>,
    is_read_only: bool,
}

/// Requests to a disk, until it goes back to other contents. A request that began before is void,
/// and what it still changes is undone.
#[derive(Clone, Debug)]
pub struct Session {
    medium: Arc<Medium>,
    is_read_only: bool,
}

impl Disk {
    /// A disk with these contents.
    ///
    /// # Errors
    /// If the backend cannot tell its size.
    pub fn new(backend: Arc<dyn Backend>, is_read_only: bool) -> io::Result<Self> {
        let is_read_only = is_read_only || backend.is_read_only();
        let medium = RwLock::new(Arc::new(Medium::new(backend)?));
        Ok(Self { medium, pending: Mutex::default(), is_read_only })
    }

    /// A disk of a fork, which continues from what was frozen. Its writes stay in memory.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn fork(frozen: &Arc<Frozen>, is_read_only: bool) -> io::Result<Self> {
        let base = Arc::clone(frozen) as Arc<dyn Backend>;
        let backend = if is_read_only { base } else { Arc::new(Overlay::new(base)) };
        Self::new(backend, is_read_only)
    }

    fn medium(&self) -> Arc<Medium> {
        Arc::clone(&self.medium.read())
    }

    /// Begin with requests, after what is to be written back was. No lock is held meanwhile.
    ///
    /// # Errors
    /// If it could not be written back.
    pub fn session(&self) -> io::Result<Session> {
        let pending = self.pending.lock().clone();
        if let Some(frozen) = pending {
            frozen.write_back()?;
            let mut pending = self.pending.lock();
            if pending.as_ref().is_some_and(|other| Arc::ptr_eq(other, &frozen)) {
                *pending = None;
            }
        }
        Ok(Session { medium: self.medium(), is_read_only: self.is_read_only })
    }

    /// Whether the disk has not gone back to other contents since the session began, and is not to.
    #[must_use]
    pub fn is_current(&self, session: &Session) -> bool {
        self.pending.lock().is_none() && Arc::ptr_eq(&self.medium.read(), &session.medium)
    }

    /// The size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.medium.read().size()
    }

    /// Whether it refuses writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Whether requests call the program, which may take any time.
    #[must_use]
    pub fn may_block(&self) -> bool {
        self.medium.read().backend.may_block()
    }

    /// The unit in which it works best, a power of two from 512.
    #[must_use]
    pub fn best_block(&self) -> u32 {
        self.medium.read().backend.best_block()
    }

    /// Change the size.
    ///
    /// # Errors
    /// If the backend cannot, or a snapshot needs what would be cut off.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        if self.is_read_only {
            return Err(read_only());
        }
        if self.pending.lock().is_some() {
            let text = "the disk is still going back to the contents of a snapshot";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        self.medium().resize(size)
    }

    /// Freeze the contents as they are now. This takes the same short time for any size.
    #[must_use]
    pub fn freeze(&self) -> Arc<Frozen> {
        // If it is to go back first, it has these contents as soon as it does.
        let pending = self.pending.lock().clone();
        pending.unwrap_or_else(|| Frozen::of(&self.medium()))
    }

    /// Go back to what this disk, or one that it is a fork of, has frozen. A disk that calls the
    /// program does so before the next request.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the contents of another disk would have to be written to a file, or
    /// the backend failed.
    pub fn thaw(&self, frozen: &Arc<Frozen>) -> Result<()> {
        if self.is_read_only {
            return Ok(());
        }
        let io = |error: io::Error| Error::os(ErrorKind::Io, "disk", &error);
        let medium = self.medium();
        if Arc::ptr_eq(&medium, &frozen.medium) {
            *self.pending.lock() = Some(Arc::clone(frozen));
            return if medium.backend.may_block() {
                Ok(())
            } else {
                self.session().map(drop).map_err(io)
            };
        }
        if !medium.backend.is_volatile() {
            let detail = "the snapshot has the contents of another disk";
            return Err(Error::new(ErrorKind::State, "disk", detail)
                .hint("fork the snapshot instead, or give the disk overlay=True"));
        }
        let overlay = Arc::new(Overlay::new(Arc::clone(frozen) as Arc<dyn Backend>));
        let new = Arc::new(Medium::new(overlay).map_err(io)?);
        *self.pending.lock() = None;
        let former = std::mem::replace(&mut *self.medium.write(), new);
        drop(former);
        Ok(())
    }
}

impl Session {
    fn writable(&self) -> io::Result<&Medium> {
        if self.is_read_only { Err(read_only()) } else { Ok(&self.medium) }
    }

    /// Fill the buffers.
    ///
    /// # Errors
    /// If the request is beyond the end, or not every byte could be read.
    pub fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        self.medium.check(offset, slices::length(buffers))?;
        self.medium.backend.read_at(offset, buffers)
    }

    /// Write the buffers.
    ///
    /// # Errors
    /// If the disk is read-only, the request is beyond the end, or not every byte was written.
    pub fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        self.writable()?.write_at(offset, buffers)
    }

    /// Make what was written survive the host's end, if the backend can.
    ///
    /// # Errors
    /// If it may not.
    pub fn flush(&self) -> io::Result<()> {
        self.medium.backend.flush()
    }

    /// A range is no longer needed.
    ///
    /// # Errors
    /// As for [`Self::write_at`].
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.writable()?.discard(offset, length)
    }

    /// Let a range read as zeroes.
    ///
    /// # Errors
    /// As for [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        self.writable()?.write_zeroes(offset, length, may_unmap)
    }
}

#[cfg(test)]
mod tests {
    //! Against bytes in a vector: any order of requests, freezes, forks and returns.
    //! Covers src/disk/medium.rs, src/disk/frozen.rs.

    use super::super::bytes::Bytes;
    use super::super::raw::Raw;
    use super::*;
    use crate::disk::{of_bytes, of_bytes_mut};
    use proptest::prelude::*;
    use vmm_sys_util::tempfile::TempFile;

    const SIZE: usize = 50_000;

    fn contents(disk: &Disk) -> Vec<u8> {
        let session: Session = disk.session().unwrap();
        assert!(disk.is_current(&session));
        let mut bytes = vec![0x55; usize::try_from(disk.size()).unwrap()];
        session.read_at(0, &of_bytes_mut(&mut bytes)).unwrap();
        bytes
    }

    fn first() -> Vec<u8> {
        (0..SIZE).map(|at| (at / 7).to_le_bytes()[0]).collect()
    }

    fn on_file() -> (TempFile, Disk) {
        let file = TempFile::new().unwrap();
        std::fs::write(file.as_path(), first()).unwrap();
        let raw = Raw::open(file.as_path(), true).unwrap();
        (file, Disk::new(Arc::new(raw), false).unwrap())
    }

    #[test]
    fn the_original_writes_to_its_file_and_a_fork_keeps_the_frozen_contents() {
        let (file, disk) = on_file();
        let frozen = disk.freeze();
        disk.session().unwrap().write_at(100, &of_bytes(&[0xaa; 9000])).unwrap();
        assert!(std::fs::read(file.as_path()).unwrap()[100..9100].iter().all(|b| *b == 0xaa));
        let fork = Disk::fork(&frozen, false).unwrap();
        assert_eq!(contents(&fork), first());
        fork.session().unwrap().write_at(5, &of_bytes(&[1])).unwrap();
        fork.thaw(&frozen).unwrap();
        assert_eq!(contents(&fork), first());
        disk.thaw(&frozen).unwrap();
        assert_eq!(std::fs::read(file.as_path()).unwrap(), first());
        let reader = Disk::fork(&frozen, true).unwrap();
        assert!(
            reader.is_read_only()
                && reader.session().unwrap().write_at(0, &of_bytes(&[1])).is_err()
        );
        reader.thaw(&frozen).unwrap();
        let foreign = fork.freeze();
        assert_eq!(disk.thaw(&foreign).unwrap_err().kind, ErrorKind::State);
    }

    #[test]
    fn a_disk_grows_and_does_not_shrink_under_a_snapshot() {
        let (_file, disk) = on_file();
        let frozen = disk.freeze();
        disk.resize(60_000).unwrap();
        disk.session().unwrap().write_at(59_000, &of_bytes(&[3; 1000])).unwrap();
        assert_eq!(disk.resize(100).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        disk.thaw(&frozen).unwrap();
        assert_eq!(contents(&disk), first());
        drop(frozen);
        disk.resize(100).unwrap();
        assert_eq!(contents(&disk), first()[..100]);
        assert!(disk.session().unwrap().read_at(90, &of_bytes_mut(&mut [0; 20])).is_err());
        assert!(disk.session().unwrap().write_at(u64::MAX, &of_bytes(&[1])).is_err());
    }

    #[test]
    fn frozen_contents_are_read_while_the_disk_is_written() {
        let (_file, disk) = on_file();
        let frozen = disk.freeze();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..200u8 {
                    for start in (0..40_000).step_by(4001) {
                        disk.session().unwrap().write_at(start, &of_bytes(&[round; 9000])).unwrap();
                    }
                }
            });
            for _ in 0..50 {
                assert_eq!(contents(&Disk::fork(&frozen, false).unwrap()), first());
            }
        });
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(usize, usize, u8),
        Zero(usize, usize),
        Freeze,
        Fork(usize),
        Thaw(usize),
        Forget(usize),
        Switch(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range = || (0..SIZE, 1usize..9000);
        let step = prop_oneof![
            4 => (range(), any::<u8>()).prop_map(|((at, length), b)| Step::Write(at, length, b)),
            1 => range().prop_map(|(at, length)| Step::Zero(at, length)),
            2 => Just(Step::Freeze),
            1 => any::<usize>().prop_map(Step::Fork),
            1 => any::<usize>().prop_map(Step::Thaw),
            1 => any::<usize>().prop_map(Step::Forget),
            2 => any::<usize>().prop_map(Step::Switch),
        ];
        prop::collection::vec(step, 0..60)
    }

    type Known = Vec<(Disk, Vec<u8>)>;
    type Kept = Vec<(Arc<Frozen>, Vec<u8>)>;

    fn take(step: Step, disks: &mut Known, kept: &mut Kept, now: &mut usize) {
        let count = kept.len();
        let (disk, model) = &mut disks[*now];
        match step {
            Step::Write(at, length, byte) => {
                let end = (at + length).min(SIZE);
                disk.session()
                    .unwrap()
                    .write_at(at as u64, &of_bytes(&vec![byte; end - at]))
                    .unwrap();
                model[at..end].fill(byte);
            }
            Step::Zero(at, length) => {
                let end = (at + length).min(SIZE);
                disk.session()
                    .unwrap()
                    .write_zeroes(at as u64, (end - at) as u64, at.is_multiple_of(2))
                    .unwrap();
                model[at..end].fill(0);
            }
            Step::Freeze => kept.push((disk.freeze(), model.clone())),
            Step::Thaw(which) if count > 0 => {
                let (frozen, then) = &kept[which % count];
                // A disk on a file goes back to its own states only.
                if disk.thaw(frozen).is_ok() {
                    *model = then.clone();
                }
            }
            Step::Fork(which) if count > 0 => {
                let (frozen, then) = &kept[which % count];
                disks.push((Disk::fork(frozen, false).unwrap(), then.clone()));
            }
            Step::Forget(which) if count > 0 => drop(kept.remove(which % count)),
            Step::Switch(which) => *now = which % disks.len(),
            _ => {}
        }
    }

    proptest! {
        #[test]
        fn every_disk_and_every_frozen_state_reads_as_a_vector_would(
            steps in steps(), is_file in any::<bool>(),
        ) {
            let (_file, on_file) = on_file();
            let overlay = Arc::new(Overlay::new(Arc::new(Bytes::new(first()))));
            let in_memory = Disk::new(overlay, false).unwrap();
            let disk = if is_file { on_file } else { in_memory };
            let (mut disks, mut kept, mut now) = (vec![(disk, first())], Vec::new(), 0);
            for step in steps {
                take(step, &mut disks, &mut kept, &mut now);
            }
            for (disk, model) in &disks {
                prop_assert_eq!(&contents(disk), model);
            }
            for (frozen, model) in &kept {
                prop_assert_eq!(&contents(&Disk::fork(frozen, false).unwrap()), model);
            }
        }
    }
}
