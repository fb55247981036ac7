//! A backend whose former contents can be frozen: before a block is overwritten, its bytes are
//! saved for the newest frozen state that is still in use. One thread writes at a time; any thread
//! may read a frozen state meanwhile. The backend is called with no lock held.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::backend::Backend;
use super::blocks::{BLOCK, BLOCK_BYTES, Block};
use super::history::History;
use super::slices::{self, Slice};
use crate::sync::{Mutex, rank};

/// How many blocks are saved at once.
const MOST_SAVED: u64 = 256;

/// See the module.
#[derive(Debug)]
pub(super) struct Medium {
    pub(super) backend: Arc<dyn Backend>,
    /// The size that the guest sees.
    size: AtomicU64,
    history: Mutex<History, rank::DiskHistory>,
}

impl Medium {
    /// # Errors
    /// If the backend cannot tell its size.
    pub(super) fn new(backend: Arc<dyn Backend>) -> io::Result<Self> {
        let size = AtomicU64::new(backend.size()?);
        Ok(Self { backend, size, history: Mutex::default() })
    }

    pub(super) fn size(&self) -> u64 {
        // Acquire: pairs with the release of `resize`.
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn freeze(&self) -> u64 {
        self.history.lock().freeze()
    }

    pub(super) fn forget(&self, state: u64) {
        self.history.lock().forget(state);
    }

    /// Check that a request is within the disk.
    pub(super) fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length);
        if end.is_some_and(|end| end <= self.size()) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "a request beyond the end of the disk"))
    }

    /// Save the blocks of a range that is about to change.
    fn save(&self, offset: u64, length: u64) -> io::Result<()> {
        let blocks = (offset / BLOCK, (offset + length).div_ceil(BLOCK));
        loop {
            let missing = self.history.lock().missing(blocks, MOST_SAVED);
            let Some((state, (first, end))) = missing else { return Ok(()) };
            // The last block of a disk may be a part of one.
            let start = first * BLOCK;
            let length = (end * BLOCK).min(self.size()).saturating_sub(start);
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            self.backend.read_at(start, &slices::of_bytes_mut(&mut bytes))?;
            let chunks = bytes.chunks(BLOCK_BYTES);
            let saved = (first..end).zip(chunks).map(|(block, bytes)| (block, Block::new(bytes)));
            let saved: Vec<_> = saved.collect();
            let mut history = self.history.lock();
            saved.into_iter().for_each(|(block, bytes)| history.save(state, block, bytes));
        }
    }

    pub(super) fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        let length = slices::length(buffers);
        self.check(offset, length)?;
        self.save(offset, length)?;
        self.backend.write_at(offset, buffers)
    }

    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        self.save(offset, length)?;
        self.backend.discard(offset, length)
    }

    pub(super) fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        self.check(offset, length)?;
        self.save(offset, length)?;
        self.backend.write_zeroes(offset, length, may_unmap)
    }

    /// Change the size. What a frozen state needs is not cut off.
    pub(super) fn resize(&self, size: u64) -> io::Result<()> {
        if size < self.size() && !self.history.lock().is_empty() {
            let text = "a disk cannot shrink while a snapshot needs what it had";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        self.backend.resize(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Read a frozen state.
    pub(super) fn read_frozen(
        &self,
        state: u64,
        offset: u64,
        buffers: &[Slice<'_>],
    ) -> io::Result<()> {
        if self.history.lock().read(state, offset, buffers) {
            return Ok(());
        }
        self.backend.read_at(offset, buffers)?;
        // A block is saved before it is overwritten: what was read of one that is not saved even
        // now is the frozen contents.
        self.history.lock().read(state, offset, buffers);
        Ok(())
    }

    /// Write back what has changed since a state was frozen. Newer states keep what they had.
    pub(super) fn return_to(&self, state: u64, size: u64) -> io::Result<()> {
        let changed = self.history.lock().changed_since(state);
        let mut bytes = vec![0; BLOCK_BYTES];
        for block in changed {
            let start = block * BLOCK;
            let length = size.saturating_sub(start).min(BLOCK);
            let Some(bytes) = bytes.get_mut(..usize::try_from(length).unwrap_or(0)) else {
                continue;
            };
            self.read_frozen(state, start, &slices::of_bytes_mut(bytes))?;
            self.write_at(start, &slices::of_bytes(bytes))?;
        }
        self.history.lock().returned_to(state);
        if self.size() == size {
            return Ok(());
        }
        self.backend.resize(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
