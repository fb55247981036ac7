//! `MemorySlot`: a memory slot of a machine, as `GuestMemory` returns and takes it.

use pyo3::prelude::*;

use crate::memory::Slot;

/// A memory slot of a machine: KVM_SET_USER_MEMORY_REGION.
#[pyclass(frozen, eq, name = "MemorySlot", module = "pyvmm")]
#[derive(Debug, PartialEq)]
pub struct PyMemorySlot(Slot);

impl PyMemorySlot {
    pub(super) fn of(slot: Slot) -> Self {
        Self(slot)
    }

    pub(super) fn slot(&self) -> Slot {
        self.0
    }
}

#[pymethods]
impl PyMemorySlot {
    /// The slot's number in KVM.
    #[getter]
    fn number(&self) -> u32 {
        self.0.number
    }

    /// Guest-physical start.
    #[getter]
    fn start(&self) -> u64 {
        self.0.start
    }

    /// The number of bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.0.size
    }

    /// Whether the guest cannot write to it.
    #[getter]
    fn read_only(&self) -> bool {
        self.0.backing.read_only
    }

    /// Whether the memory is that of a file or memfd.
    #[getter]
    fn shared(&self) -> bool {
        self.0.backing.shared
    }

    fn __hash__(&self) -> u64 {
        self.0.start ^ u64::from(self.0.number)
    }

    fn __repr__(&self) -> String {
        let Slot { number, start, size, backing } = self.0;
        let flag = |is_set, name| if is_set { format!(", {name}=True") } else { String::new() };
        format!(
            "MemorySlot(number={number}, start={start:#x}, size={size:#x}{}{})",
            flag(backing.read_only, "read_only"),
            flag(backing.shared, "shared"),
        )
    }
}
