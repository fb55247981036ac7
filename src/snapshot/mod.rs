//! Snapshots: everything a guest can see of its machine, taken without a copy of its memory, to be
//! forked, reset to, saved and loaded. Nothing here runs a guest.

pub(crate) mod chips;
mod file;
mod host;
mod msrs;
mod new_file;
mod save;
mod state;
pub(crate) mod vcpu;

use std::io;

pub use file::{Header, Load, described, inspect, load};
pub use host::Host;
pub use state::{Device, Kind, Record, Records};
pub(crate) use vcpu::Classes;

use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Image, Layer, MemoryRange, copy_to, memfd};
use crate::vm::Shape;

/// A machine as it was. Nothing changes it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Tells it from every other; a file keeps it.
    pub id: [u8; 16],
    /// What has to be created.
    pub shape: Shape,
    /// Clock and chips.
    pub chips: Records,
    /// Each vCPU's state.
    pub vcpus: Vec<Records>,
    /// Each device's state, by bus and address.
    pub devices: Vec<Device>,
    /// Memory, by address.
    pub ranges: Vec<MemoryRange>,
    /// Where it was taken; none for here.
    pub host: Option<Host>,
}

/// An id that no other snapshot has.
pub(crate) fn new_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    // SAFETY: the buffer's address and length.
    let filled = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if usize::try_from(filled) == Ok(id.len()) {
        return Ok(id);
    }
    Err(Error::os(ErrorKind::Io, "getrandom", &io::Error::last_os_error()))
}

impl Snapshot {
    /// Bytes of guest memory.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        self.ranges.iter().map(|range| range.image.size()).sum()
    }

    /// Bytes of host memory and of files that its pages take. Other snapshots may share them.
    #[must_use]
    pub fn allocated(&self) -> (u64, u64) {
        let mut layers: Vec<_> =
            self.ranges.iter().flat_map(|range| range.image.layers()).collect();
        layers.sort_by_key(|layer| std::sync::Arc::as_ptr(layer));
        layers.dedup_by_key(|layer| std::sync::Arc::as_ptr(layer));
        let bytes = |in_memory: bool| {
            let those = layers.iter().filter(|layer| layer.is_memory() == in_memory);
            those.map(|layer| layer.allocated()).sum()
        };
        (bytes(true), bytes(false))
    }

    /// How many mappings each fork needs for its memory.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.ranges.iter().map(|range| range.image.runs().len()).sum()
    }

    /// The same machine with its memory in one layer, which shares nothing with other snapshots:
    /// forks need fewer mappings, and the snapshots under it may go.
    ///
    /// # Errors
    /// When there is no memory left.
    pub fn flatten(&self) -> Result<Self> {
        let mut flat = Self { id: new_id()?, ..self.clone() };
        for range in &mut flat.ranges {
            let (from, to) = (range.image.mapping()?, memfd(range.image.size())?);
            range.image.data().iter().try_for_each(|data| copy_to(&to, from, *data))?;
            range.image = Image::whole(range.image.size(), Layer::sealed(to)?);
        }
        Ok(flat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_ids_are_the_same() {
        assert_ne!(new_id().unwrap(), new_id().unwrap());
    }
}
