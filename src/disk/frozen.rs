//! The contents of a disk at the instant of a snapshot. They stay readable while the disk is
//! written, and as long as a snapshot or a fork needs them. Any thread.

use std::io;
use std::sync::Arc;

use super::backend::{Backend, read_only};
use super::medium::Medium;
use super::slices::Slice;

/// See the module. To the overlay of a fork, it is the base.
#[derive(Debug)]
pub struct Frozen {
    pub(super) medium: Arc<Medium>,
    pub(super) state: u64,
    size: u64,
}

impl Frozen {
    pub(super) fn of(medium: &Arc<Medium>) -> Arc<Self> {
        let (medium, size) = (Arc::clone(medium), medium.size());
        Arc::new(Self { state: medium.freeze(), medium, size })
    }

    /// Bring the disk back to these contents.
    pub(super) fn write_back(&self) -> io::Result<()> {
        self.medium.return_to(self.state, self.size)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.medium.forget(self.state);
    }
}

impl Backend for Frozen {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        self.medium.read_frozen(self.state, offset, buffers)
    }

    fn write_at(&self, _offset: u64, _buffers: &[Slice<'_>]) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn best_block(&self) -> u32 {
        self.medium.backend.best_block()
    }

    fn may_block(&self) -> bool {
        self.medium.backend.may_block()
    }

    fn is_volatile(&self) -> bool {
        true
    }
}
