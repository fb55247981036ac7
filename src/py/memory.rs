//! `GuestMemory` for Python: bounds-checked copies, numbers and views, at any time, from any
//! thread.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView, PyTuple};

use super::ending::import;
use super::lease::Tie;
use super::memory_parts::{PyDirtyPages, PyMemorySlot, PyMemoryView as Exporter};
use super::owned::Owned;
use super::vcpu::PyVcpu;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Backing, GuestMemory, Slot, anonymous, shared};

/// Copies of at least so many bytes are made without the GIL.
const LARGE: usize = 1 << 16;

/// The memory of a machine, by guest-physical address. It can be read and written at any time, from
/// any thread.
///
/// Numbers are little-endian. Addresses and lengths are from 0 to 2^64 - 1; others raise
/// OverflowError.
#[pyclass(frozen, weakref, name = "GuestMemory", module = "pyvmm")]
pub struct PyGuestMemory {
    /// Asked each time, so that the memory goes when the machine is closed.
    ask: Owned<Ask>,
    /// The machine, which is not closed for as long as somebody has its memory.
    machine: Py<PyAny>,
    tie: Tie,
}

type Ask = Box<dyn Fn() -> Result<GuestMemory> + Send + Sync>;

impl std::fmt::Debug for PyGuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PyGuestMemory").finish_non_exhaustive()
    }
}

impl PyGuestMemory {
    /// The memory of a machine's object, whose core is `core`.
    pub(super) fn of<T>(
        machine: &Bound<'_, PyAny>,
        core: &Arc<T>,
        ask: fn(&T) -> Result<GuestMemory>,
        tie: &Tie,
    ) -> Self
    where
        T: Send + Sync + 'static,
    {
        // The object holds the core: to be the last to do so is for it alone.
        let core = Arc::downgrade(core);
        let closed = || Error::closed("machine");
        let ask: Ask = Box::new(move || ask(&*core.upgrade().ok_or_else(closed)?));
        let (ask, machine) = (Owned::new("machine", ask), machine.clone().unbind());
        Self { ask, machine, tie: tie.clone() }
    }

    /// The memory, for what a reset does not take back.
    fn get(&self) -> Result<GuestMemory> {
        self.tie.hand_out();
        self.bytes()
    }

    /// The memory, for a change that a reset does not take back, and that is over when the call
    /// returns.
    fn changing(&self) -> Result<GuestMemory> {
        self.tie.change();
        self.bytes()
    }

    /// The memory, to read and write what it holds.
    fn bytes(&self) -> Result<GuestMemory> {
        self.ask.get()?()
    }
}

/// A pointer that crosses to where the GIL is not held.
#[derive(Clone, Copy)]
struct Place(*mut u8);

// SAFETY: the pointer is used by one thread at a time, while its owner waits.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

fn copy(py: Python<'_>, length: usize, work: impl FnOnce() -> Result<()> + Send) -> PyResult<()> {
    Ok(if length < LARGE { work() } else { py.detach(work) }?)
}

/// The guest-physical pieces of a range, in their order.
type Pieces = Vec<(u64, usize)>;

fn pieces(
    py: Python<'_>,
    memory: &GuestMemory,
    (address, length): (u64, u64),
    vcpu: Option<&PyVcpu>,
) -> PyResult<Pieces> {
    let too_long = || {
        let detail = format!("{length} bytes are more than all of guest memory");
        Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
    };
    let Some(vcpu) = vcpu else {
        memory.check(address, length)?;
        return Ok(vec![(address, usize::try_from(length).map_err(|_| too_long())?)]);
    };
    if length > memory.size() {
        return Err(too_long().into());
    }
    vcpu.look(py, |vcpu| {
        if !vcpu.memory().is(memory) {
            let detail = "the vCPU is another machine's";
            return Err(Error::new(ErrorKind::State, "memory", detail));
        }
        let paging = vcpu.paging()?;
        let mut pieces = Pieces::new();
        let mut left = length;
        let mut at = address;
        loop {
            let here = left.min(4096 - at % 4096);
            let Some(physical) = vcpu.translate(&paging, at) else {
                let detail = "nothing is mapped there by the vCPU's page tables";
                return Err(Error::new(ErrorKind::Memory, format!("{at:#x}"), detail));
            };
            memory.check(physical, here)?;
            pieces.push((physical, usize::try_from(here).map_err(|_| too_long())?));
            left -= here;
            if left == 0 {
                return Ok(pieces);
            }
            at = at.wrapping_add(here);
        }
    })
}

fn read_pieces(py: Python<'_>, memory: &GuestMemory, pieces: &Pieces, to: Place) -> PyResult<()> {
    let mut done = 0;
    for (address, length) in pieces {
        let place = Place(to.at(done));
        // SAFETY: the caller's place has room for all pieces.
        copy(py, *length, || unsafe { memory.read_raw(*address, place.at(0), *length) })?;
        done += length;
    }
    Ok(())
}

fn contiguous(buffer: &PyUntypedBuffer) -> PyResult<(Place, usize)> {
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer must be contiguous"));
    }
    Ok((Place(buffer.buf_ptr().cast()), buffer.len_bytes()))
}

#[pymethods]
impl PyGuestMemory {
    /// Return a copy of guest memory.
    ///
    /// With `vcpu`, which must not be running, the address is guest-virtual and translated by that
    /// vCPU's page tables.
    ///
    /// Raises:
    ///     GuestMemoryError: a part of the range is not memory, or not mapped.
    ///     StateError: the machine is closed, or the vCPU is running.
    #[pyo3(signature = (address, length, *, vcpu = None))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        length: u64,
        vcpu: Option<&PyVcpu>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let memory = self.bytes()?;
        // First, so that a length out of range allocates nothing.
        let pieces = pieces(py, &memory, (address, length), vcpu)?;
        let length = usize::try_from(length)?;
        // SAFETY: a new bytes object that nobody else knows, filled before anybody can. A length
        // over isize::MAX cannot be: the range has been found in memory.
        unsafe {
            let size = pyo3::ffi::Py_ssize_t::try_from(length)?;
            let new = pyo3::ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
            let bytes = Bound::from_owned_ptr_or_err(py, new)?.cast_into_unchecked::<PyBytes>();
            let to = Place(pyo3::ffi::PyBytes_AsString(bytes.as_ptr()).cast());
            read_pieces(py, &memory, &pieces, to)?;
            Ok(bytes)
        }
    }

    /// Fill a writable buffer with a copy of guest memory. Raises the same exceptions as `read`.
    #[pyo3(signature = (address, buffer, *, vcpu = None))]
    fn readinto(
        &self,
        py: Python<'_>,
        address: u64,
        buffer: &Bound<'_, PyAny>,
        vcpu: Option<&PyVcpu>,
    ) -> PyResult<()> {
        let memory = self.bytes()?;
        let buffer = PyUntypedBuffer::get(buffer)?;
        if buffer.readonly() {
            return Err(PyBufferError::new_err("the buffer must be writable"));
        }
        let (to, length) = contiguous(&buffer)?;
        read_pieces(py, &memory, &pieces(py, &memory, (address, length as u64), vcpu)?, to)
    }

    /// Copy the bytes of a buffer to guest memory.
    ///
    /// Raises:
    ///     GuestMemoryError: a part of the range is not memory; nothing is written.
    ///     StateError: the machine is closed, or the vCPU is running.
    #[pyo3(signature = (address, data, *, vcpu = None))]
    fn write(
        &self,
        py: Python<'_>,
        address: u64,
        data: &Bound<'_, PyAny>,
        vcpu: Option<&PyVcpu>,
    ) -> PyResult<()> {
        let memory = self.bytes()?;
        let buffer = PyUntypedBuffer::get(data)?;
        let (from, length) = contiguous(&buffer)?;
        let mut done = 0;
        for (address, length) in pieces(py, &memory, (address, length as u64), vcpu)? {
            let place = Place(from.at(done));
            // SAFETY: the pieces are as long as the buffer, which is held.
            copy(py, length, || unsafe { memory.write_raw(address, place.at(0), length) })?;
            done += length;
        }
        Ok(())
    }

    /// Read an 8-bit number.
    fn read_u8(&self, address: u64) -> PyResult<u8> {
        Ok(self.bytes()?.load(address)?)
    }

    /// Read a 16-bit number, in a single access if the address is aligned.
    fn read_u16(&self, address: u64) -> PyResult<u16> {
        Ok(self.bytes()?.load(address)?)
    }

    /// Read a 32-bit number, in a single access if the address is aligned.
    fn read_u32(&self, address: u64) -> PyResult<u32> {
        Ok(self.bytes()?.load(address)?)
    }

    /// Read a 64-bit number, in a single access if the address is aligned.
    fn read_u64(&self, address: u64) -> PyResult<u64> {
        Ok(self.bytes()?.load(address)?)
    }

    /// Write an 8-bit number.
    fn write_u8(&self, address: u64, value: u8) -> PyResult<()> {
        Ok(self.bytes()?.store(address, value)?)
    }

    /// Write a 16-bit number, in a single access if the address is aligned.
    fn write_u16(&self, address: u64, value: u16) -> PyResult<()> {
        Ok(self.bytes()?.store(address, value)?)
    }

    /// Write a 32-bit number, in a single access if the address is aligned.
    fn write_u32(&self, address: u64, value: u32) -> PyResult<()> {
        Ok(self.bytes()?.store(address, value)?)
    }

    /// Write a 64-bit number, in a single access if the address is aligned.
    fn write_u64(&self, address: u64, value: u64) -> PyResult<()> {
        Ok(self.bytes()?.store(address, value)?)
    }

    /// Set every byte of a range. Raises the same exceptions as `write`.
    #[pyo3(signature = (address, length, value = 0))]
    fn fill(&self, py: Python<'_>, address: u64, length: u64, value: u8) -> PyResult<()> {
        let memory = self.bytes()?;
        copy(py, usize::try_from(length)?, || memory.fill(address, length, value))
    }

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
        data: std::borrow::Cow<'_, [u8]>,
        start: u64,
        end: Option<u64>,
    ) -> PyResult<Option<u64>> {
        if data.is_empty() {
            return Err(PyValueError::new_err("there is nothing to look for: data is empty"));
        }
        let memory = self.bytes()?;
        Ok(py.detach(|| memory.find(&data, start, end.unwrap_or(u64::MAX)))?)
    }

    /// Return a memoryview of guest memory, without a copy. The range must be in one memory slot.
    ///
    /// The memory stays mapped while the view is alive, even if the slot is removed or the machine
    /// is closed. In a forked child, writes through the view are private to the child.
    ///
    /// Raises:
    ///     GuestMemoryError: a part of the range is not memory, or the range spans several slots.
    ///     ClosedError: the machine is closed.
    fn view<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        length: u64,
    ) -> PyResult<Bound<'py, PyMemoryView>> {
        let view = self.get()?.view(address, length)?;
        PyMemoryView::from(Bound::new(py, Exporter::of(view))?.as_any())
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
            let text = "a ctypes type is needed: a Structure, Union or array class";
            return Err(PyTypeError::new_err(text));
        };
        let size = import(py, "ctypes")?.getattr("sizeof")?.call1((r#type,))?;
        from_buffer.call1((self.view(py, address, size.extract()?)?,))
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
                let fd: RawFd = super::descriptor::descriptor(source)?;
                // SAFETY: it is used before this returns, while the source is held.
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

    /// Whether written pages are logged for `dirty`: KVM_MEM_LOG_DIRTY_PAGES. This slows the guest
    /// down.
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
    /// This covers writes of the guest and of calls of this object. Every written page is included,
    /// except for writes through a view. KVM may add pages that the guest has only read.
    ///
    /// Raises:
    ///     StateError: `log_dirty` is not set, or the machine is closed.
    fn dirty(&self, py: Python<'_>) -> PyResult<PyDirtyPages> {
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
        match self.ask.peek().map(|ask| ask()) {
            Some(Ok(memory)) => format!("GuestMemory(size={:#x})", memory.size()),
            Some(Err(_)) => "GuestMemory(closed)".into(),
            None => "GuestMemory(unreachable)".into(),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.machine)
    }
}
