//! `GuestMemory`: its slots, views, searches and the log of written pages.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyMemoryView, PyTuple};

use super::dirty::PyDirtyPages;
use super::slot::PyMemorySlot;
use super::view::PyMemoryView as Exporter;
use crate::error::{Error, Result};
use crate::memory::{Backing, GuestMemory, Slot, anonymous, shared};
use crate::py::descriptor::descriptor;
use crate::py::ending::import;
use crate::py::lease::ReuseTracker;
use crate::py::owned::Owned;

/// The memory of a machine, by guest-physical address. It can be read and written at any time, from
/// any thread.
///
/// Numbers are little-endian. Addresses and lengths are from 0 to 2^64 - 1; others raise
/// OverflowError.
#[pyclass(frozen, weakref, name = "GuestMemory", module = "pyvmm")]
pub struct PyGuestMemory {
    /// Called for each access, so that the memory is released when the machine is closed.
    source: Owned<MemorySource>,
    /// The machine, so that it stays open while its memory is referenced.
    machine: Py<PyAny>,
    tracker: ReuseTracker,
}

type MemorySource = Box<dyn Fn() -> Result<GuestMemory> + Send + Sync>;

impl std::fmt::Debug for PyGuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PyGuestMemory").finish_non_exhaustive()
    }
}

impl PyGuestMemory {
    /// The memory of a machine's object, whose core is `core`.
    pub(in crate::py) fn of<T>(
        machine: &Bound<'_, PyAny>,
        core: &Arc<T>,
        source: fn(&T) -> Result<GuestMemory>,
        tracker: &ReuseTracker,
    ) -> Self
    where
        T: Send + Sync + 'static,
    {
        // Only the machine's object may hold the last reference to the core.
        let core = Arc::downgrade(core);
        let closed = || Error::closed("machine");
        let source: MemorySource = Box::new(move || source(&*core.upgrade().ok_or_else(closed)?));
        let (source, machine) = (Owned::new("machine", source), machine.clone().unbind());
        Self { source, machine, tracker: tracker.clone() }
    }

    /// The memory, for operations that a reset cannot undo.
    fn get(&self) -> Result<GuestMemory> {
        self.tracker.hand_out();
        self.bytes()
    }

    /// The memory, for a change that a reset cannot undo and that is complete when the call
    /// returns.
    fn changing(&self) -> Result<GuestMemory> {
        self.tracker.change();
        self.bytes()
    }

    /// The memory, to read and write its contents.
    pub(super) fn bytes(&self) -> Result<GuestMemory> {
        self.source.get()?()
    }
}

#[pymethods]
impl PyGuestMemory {
    /// Return the first address of these bytes, at or after `start` and entirely before `end`, or
    /// None.
    ///
    /// Raises:
    ///     ValueError: `data` is empty.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (data, start = 0, end = None))]
    fn find(
        &self,
        py: Python<'_>,
        data: PyBackedBytes,
        start: u64,
        end: Option<u64>,
    ) -> PyResult<Option<u64>> {
        if data.is_empty() {
            return Err(PyValueError::new_err("data is empty"));
        }
        let memory = self.bytes()?;
        Ok(py.detach(|| memory.find(&data, start, end.unwrap_or(u64::MAX)))?)
    }

    /// Return a memoryview of guest memory, without a copy. The range must be in one memory slot.
    ///
    /// The memory stays mapped while the view is alive, even if the slot is removed or the machine
    /// is closed. In a forked child, writes through the view are private to the child.
    ///
    /// While dirty pages are logged, the log includes every page of a view that can be written, for
    /// as long as the view is alive: writes through it cannot be seen.
    ///
    /// Args:
    ///     address: the guest-physical start.
    ///     length: the number of bytes.
    ///     readonly: the view cannot be written, and is not in the log.
    ///
    /// Raises:
    ///     GuestMemoryError: a part of the range is not memory, or the range spans several slots.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (address, length, *, readonly = false))]
    fn view<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        length: u64,
        readonly: bool,
    ) -> PyResult<Bound<'py, PyMemoryView>> {
        let exporter = Exporter::of(&self.get()?, (address, length), readonly)?;
        PyMemoryView::from(Bound::new(py, exporter)?.as_any())
    }

    /// Return a ctypes structure, union or array in guest memory: `type.from_buffer(view(...))`.
    ///
    /// Raises:
    ///     TypeError: `type` is not a ctypes type.
    ///     GuestMemoryError, StateError: as for `view`.
    fn overlay<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        r#type: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let Some(from_buffer) = r#type.getattr_opt("from_buffer")? else {
            let text = "expected a ctypes type: a Structure, Union or array class";
            return Err(PyTypeError::new_err(text));
        };
        let size = import(py, "ctypes")?.getattr("sizeof")?.call1((r#type,))?;
        from_buffer.call1((self.view(py, address, size.extract()?, false)?,))
    }

    /// Add memory, also while the guest runs.
    ///
    /// Args:
    ///     address: the guest-physical start, a multiple of 4 KiB.
    ///     size: the number of bytes, a multiple of 4 KiB; optional with a source.
    ///     source: a file or memfd whose pages the guest shares with everyone who maps them, or
    ///         None for zeroed pages.
    ///     offset: the offset in the source, a multiple of 4 KiB.
    ///     read_only: the guest cannot write to the memory; its writes are MMIO accesses.
    ///
    /// Raises:
    ///     GuestMemoryError: the range overlaps other memory, a device, or KVM's own pages; it is
    ///         not a whole number of pages; or the source is too short or open only for reading.
    ///         Nothing changes.
    ///     KvmError: KVM refuses it.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (address, size = None, *, source = None, offset = 0, read_only = false))]
    fn add(
        slf: &Bound<'_, Self>,
        address: u64,
        size: Option<u64>,
        source: Option<&Bound<'_, PyAny>>,
        offset: u64,
        read_only: bool,
    ) -> PyResult<PyMemorySlot> {
        let memory = slf.get().changing()?;
        let mapping = match (source, size) {
            (Some(source), _) => {
                let fd: RawFd = descriptor(source)?;
                // SAFETY: it is used only before this returns, while the source is alive.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                shared(fd, offset, size, read_only)?
            }
            (None, Some(size)) => anonymous(size)?,
            (None, None) => {
                return Err(PyTypeError::new_err("memory needs a size or a source"));
            }
        };
        let backing = Backing { read_only, shared: source.is_some() };
        let slot = slf.py().detach(|| memory.add(address, mapping, backing))?;
        Ok(PyMemorySlot::of(slot))
    }

    /// Remove memory, also while the guest runs. Accesses to it become MMIO.
    ///
    /// Raises:
    ///     GuestMemoryError: the machine does not have the slot, or no longer has it.
    ///     ClosedError: the machine is closed.
    fn remove(&self, py: Python<'_>, slot: &PyMemorySlot) -> PyResult<()> {
        let memory = self.changing()?;
        let slot: Slot = slot.slot();
        Ok(py.detach(|| memory.remove(&slot))?)
    }

    /// The memory slots, by address.
    #[getter]
    fn slots<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let memory = self.bytes()?;
        let slots = py.detach(|| memory.slots());
        PyTuple::new(py, slots.into_iter().map(PyMemorySlot::of))
    }

    /// Whether written pages are logged for `take_dirty`: KVM_MEM_LOG_DIRTY_PAGES. This slows the
    /// guest down.
    #[getter]
    fn log_dirty(&self) -> PyResult<bool> {
        Ok(self.bytes()?.is_logging_dirty())
    }

    #[setter]
    fn set_log_dirty(&self, py: Python<'_>, is_on: bool) -> PyResult<()> {
        let memory = self.changing()?;
        Ok(py.detach(|| memory.log_dirty(is_on))?)
    }

    /// Return the pages written since the last call, or since `log_dirty` was set.
    ///
    /// This covers writes of the guest and of calls of this object. Every written page is included.
    /// So is every page of a writable view that was alive since the last call. KVM may add pages
    /// that the guest has only read.
    ///
    /// Raises:
    ///     StateError: `log_dirty` is not set, or the machine is closed.
    fn take_dirty(&self, py: Python<'_>) -> PyResult<PyDirtyPages> {
        let memory = self.changing()?;
        Ok(PyDirtyPages::of(py.detach(|| memory.take_dirty())?))
    }

    /// The number of bytes of memory.
    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.bytes()?.size())
    }

    /// Start and length of each range of memory, by address.
    #[getter]
    fn ranges(&self) -> PyResult<Vec<(u64, u64)>> {
        Ok(self.bytes()?.ranges())
    }

    fn __repr__(&self) -> String {
        match self.source.peek().map(|source| source()) {
            Some(Ok(memory)) => format!("GuestMemory(size={:#x})", memory.size()),
            Some(Err(_)) => "GuestMemory(closed)".into(),
            None => "GuestMemory(unreachable)".into(),
        }
    }

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        crate::py::notebook::html(slf, "memory")
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.machine)
    }
}
