//! A piece of guest memory without a copy.

use std::sync::Arc;

use vm_memory::MmapRegion;

use super::mapping::Mapping;

/// A piece of one mapping, which stays mapped as long as this lives.
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

    /// Where it starts in this process.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.region().as_ptr().wrapping_add(self.offset)
    }

    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether the host may write it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        is_writable(self.mapping.region())
    }
}

/// Whether the host may write a mapping.
pub(super) fn is_writable(mapping: &MmapRegion) -> bool {
    mapping.prot() & libc::PROT_WRITE != 0
}
