//! `DirtyPages`: the written pages that `GuestMemory` returns.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::memory::DirtyPages;

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
