//! Direct access to a piece of guest memory. Any thread.

use std::sync::Arc;

use vm_memory::MmapRegion;

use super::mapping::Mapping;

/// A piece of one mapping, which stays mapped until the view is dropped.
#[derive(Debug)]
pub struct View {
    mapping: Arc<Mapping>,
    offset: usize,
    length: usize,
}

impl View {
    pub(super) fn of(mapping: Arc<Mapping>, offset: usize, length: usize) -> Self {
        Self { mapping, offset, length }
    }

    /// Its address in this process.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.region().as_ptr().wrapping_add(self.offset)
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether its length is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether the host can write it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        is_writable(self.mapping.region())
    }
}

/// Whether the host can write a mapping.
pub(super) fn is_writable(mapping: &MmapRegion) -> bool {
    mapping.prot() & libc::PROT_WRITE != 0
}
