//! What `GuestMemory` hands out: slots, dirty pages, and the buffer behind a view.

use std::ffi::{c_int, c_void};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::memory::{DirtyPages, Slot, View};

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

/// The written pages of 4 KiB, of all memory slots.
#[pyclass(frozen, name = "DirtyPages", module = "pyvmm")]
#[derive(Debug)]
pub struct PyDirtyPages(Vec<DirtyPages>);

impl PyDirtyPages {
    pub(super) fn of(slots: Vec<DirtyPages>) -> Self {
        Self(slots)
    }
}

#[pymethods]
impl PyDirtyPages {
    /// Start and length of each run of written pages, by address.
    #[getter]
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.0.iter().flat_map(DirtyPages::ranges).collect()
    }

    /// A bitmap for the start address of each slot, with one bit a page.
    ///
    /// Bit 0 of the first byte is the first page; the length is a multiple of 8 bytes.
    #[getter]
    fn bitmaps<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let bitmaps = PyDict::new(py);
        for slot in &self.0 {
            let bytes: Vec<u8> = slot.bitmap.iter().flat_map(|word| word.to_le_bytes()).collect();
            bitmaps.set_item(slot.start, PyBytes::new(py, &bytes))?;
        }
        Ok(bitmaps)
    }

    /// The number of pages.
    fn __len__(&self) -> usize {
        let ones = |word: &u64| word.count_ones() as usize;
        self.0.iter().flat_map(|slot| &slot.bitmap).map(ones).sum()
    }

    fn __repr__(&self) -> String {
        let show = |(start, length)| format!("{start:#x}+{length:#x}");
        let ranges: Vec<String> = self.ranges().into_iter().map(show).collect();
        format!("DirtyPages({})", ranges.join(", "))
    }
}

/// What a memoryview of guest memory holds.
#[pyclass(frozen, name = "_MemoryView", module = "pyvmm")]
#[derive(Debug)]
pub(super) struct PyMemoryView(View);

impl PyMemoryView {
    pub(super) fn of(view: View) -> Self {
        Self(view)
    }
}

#[pymethods]
impl PyMemoryView {
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        buffer: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let view = &slf.get().0;
        let length = ffi::Py_ssize_t::try_from(view.len())
            .map_err(|_| PyBufferError::new_err("the view is too long"))?;
        let readonly = c_int::from(!view.is_writable());
        let start = view.as_ptr().cast::<c_void>();
        // SAFETY: the interpreter hands in a buffer to fill; the memory is mapped as long as this
        // object lives, of which the buffer takes a reference.
        let result =
            unsafe { ffi::PyBuffer_FillInfo(buffer, slf.as_ptr(), start, length, readonly, flags) };
        if result == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}
