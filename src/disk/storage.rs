//! A backend as imago's storage: what an image's metadata and data are read from, or the base of an
//! overlay in a file. Any thread.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use super::backend::Backend;
use super::slices::{self, Slice, Slices};

/// See the module.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) backend: Arc<dyn Backend>,
    helper: CommonStorageHelper,
}

impl Store {
    pub(super) fn new(backend: Arc<dyn Backend>) -> Self {
        Self { backend, helper: CommonStorageHelper::default() }
    }

    /// Fill the buffers. What lies beyond the end reads as zeroes.
    pub(super) fn read(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        match self.backend.read_at(offset, buffers) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            other => return other,
        }
        let there = self.backend.size()?.saturating_sub(offset);
        let length = slices::length(buffers);
        if there < length {
            slices::clear(buffers, there, length - there);
        }
        self.backend.read_at(offset, &slices::part(buffers, 0, there.min(length)))
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("image")
    }
}

impl Storage for Store {
    fn size(&self) -> io::Result<u64> {
        self.backend.size()
    }

    fn get_filename(&self) -> Option<PathBuf> {
        None
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut buffers = bufv.into_inner();
        let buffers: Slices<'_> =
            buffers.iter_mut().map(|buffer| Slice::from(&mut **buffer)).collect();
        self.read(offset, &buffers)
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let buffers = bufv.into_inner();
        let buffers: Slices<'_> =
            buffers.iter().map(|buffer| slices::of_bytes(buffer)[0]).collect();
        self.backend.write_at(offset, &buffers)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.backend.write_zeroes(offset, length, true)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.backend.write_zeroes(offset, length, false)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.backend.discard(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.backend.flush()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, _preallocate: PreallocateMode) -> io::Result<()> {
        self.backend.resize(size)
    }
}
