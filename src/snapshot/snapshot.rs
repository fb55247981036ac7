//! A snapshot in memory: what it holds, and what it costs.

use std::io;
use std::sync::Arc;

use super::host::Host;
use super::state::{DeviceState, RecordKind, Records, get};
use super::virtio::VirtioDeviceState;
use crate::cpu::xstate;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Image, Layer, MemoryRange, copy_to, memfd};
use crate::process::OnceBox;
use crate::vcpu::StateId;
use crate::vm::MachineSpec;

/// The state of a machine. It never changes.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Identifies it; a file keeps it.
    pub id: [u8; 16],
    /// What a fork has to create.
    pub spec: MachineSpec,
    /// The clock and the interrupt controllers.
    pub chips: Records,
    /// Each vCPU's state.
    pub vcpus: Vec<Records>,
    /// Each device's state, by bus and address.
    pub devices: Vec<DeviceState>,
    /// What its virtio devices are, by address.
    pub virtio: Vec<VirtioDeviceState>,
    /// Memory, by address.
    pub ranges: Vec<MemoryRange>,
    /// Where it was taken; None for this host.
    pub host: Option<Host>,
    /// Values that its forks and resets compute once.
    pub(crate) cache: Arc<SnapshotCache>,
}

/// Values that are computed once for a snapshot, and are the same for all machines that use it.
#[derive(Debug)]
pub(crate) struct SnapshotCache {
    /// Model-specific registers that KVM returns but refuses to set, with their values. Their CPUID
    /// is the same.
    pub(crate) constant_msrs: OnceBox<Vec<(u32, u64)>>,
    /// The pages of the page tables in use: see `translations.rs`.
    pub(crate) tables: OnceBox<Option<Vec<u64>>>,
    /// Whether its guest cannot leave ring 3 unnoticed: see `confined.rs`.
    pub(crate) is_confined: OnceBox<bool>,
    /// The state of its vCPUs, which is also that of its copies.
    pub(crate) state: StateId,
}

impl Default for SnapshotCache {
    fn default() -> Self {
        Self {
            constant_msrs: OnceBox::new(),
            tables: OnceBox::new(),
            is_confined: OnceBox::new(),
            state: StateId::new(),
        }
    }
}

impl Snapshot {
    /// The virtio device of this name, which a fork is given another for.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with the names that there are, if it has none.
    pub fn virtio_device(&self, name: &str) -> Result<&VirtioDeviceState> {
        self.virtio.iter().find(|device| device.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.virtio.iter().map(|device| device.name.as_str()).collect();
            let detail = match names.as_slice() {
                [] => "the snapshot has no virtio devices".to_owned(),
                names => format!("the snapshot has no such device; it has {}", names.join(", ")),
            };
            Error::new(ErrorKind::Config, given_key(name), detail)
        })
    }

    /// Ask for the parts of XSAVE that its vCPUs' states include, before a vCPU is created for
    /// them.
    ///
    /// # Errors
    /// Those of [`xstate::request`].
    pub(crate) fn request_xstate(&self) -> Result<()> {
        let of_first = self.vcpus.first().and_then(|vcpu| get(vcpu, RecordKind::Xsave, 0));
        match of_first {
            Some(xsave) if xstate::needs_permission(xsave.len()) => xstate::request("xsave"),
            _ => Ok(()),
        }
    }
}

/// The key of what a fork is given for a virtio device.
pub(crate) fn given_key(name: &str) -> String {
    format!("virtio[{name:?}]")
}

/// A unique id.
pub(crate) fn new_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    // SAFETY: the buffer has this length.
    let filled = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if usize::try_from(filled) == Ok(id.len()) {
        return Ok(id);
    }
    Err(Error::os(ErrorKind::Io, "getrandom", &io::Error::last_os_error()))
}

impl Snapshot {
    /// The size of guest memory in bytes.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        self.ranges.iter().map(|range| range.image.size()).sum()
    }

    /// Bytes of host memory and of files that its pages use. Other snapshots may share them.
    #[must_use]
    pub fn allocated(&self) -> (u64, u64) {
        let mut layers: Vec<_> =
            self.ranges.iter().flat_map(|range| range.image.layers()).collect();
        layers.sort_by_key(|layer| Arc::as_ptr(layer));
        layers.dedup_by_key(|layer| Arc::as_ptr(layer));
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

    /// A snapshot of the same state with its memory in one layer, which shares nothing with other
    /// snapshots: forks need fewer mappings, and the snapshots that it was based on can be dropped.
    ///
    /// # Errors
    /// If the process is out of memory.
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
