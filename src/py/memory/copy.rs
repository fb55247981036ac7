//! Copies between guest memory and Python's buffers and numbers, by guest-physical address or
//! through a vCPU's page tables. On the caller's thread; large copies release the GIL.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::guest::PyGuestMemory;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::memory::GuestMemory;
use crate::py::vcpu::PyVcpu;
use crate::vcpu::Vcpu;

/// Copies of at least this many bytes are made without the GIL.
const LARGE: usize = 1 << 16;

/// A pointer that is used where the GIL is not held.
#[derive(Clone, Copy)]
struct SendPtr(*mut u8);

// SAFETY: the pointer is used by one thread at a time, while its owner waits.
unsafe impl Send for SendPtr {}
// SAFETY: as above.
unsafe impl Sync for SendPtr {}

impl SendPtr {
    fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

fn copy(py: Python<'_>, length: usize, work: impl FnOnce() -> Result<()> + Send) -> PyResult<()> {
    Ok(if length < LARGE { work() } else { py.detach(work) }?)
}

/// The guest-physical pieces of a range, in their order.
type Pieces = Vec<(u64, usize)>;

fn too_long((address, length): (u64, u64)) -> Error {
    let detail = format!("{length} bytes are more than the size of guest memory");
    Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
}

/// The pieces of a range, checked to be memory. With a vCPU, the addresses are guest-virtual.
fn pieces(
    py: Python<'_>,
    memory: &GuestMemory,
    range: (u64, u64),
    vcpu: Option<&PyVcpu>,
) -> PyResult<Pieces> {
    let (address, length) = range;
    let Some(vcpu) = vcpu else {
        memory.check(address, length)?;
        return Ok(vec![(address, usize::try_from(length).map_err(|_| too_long(range))?)]);
    };
    if length > memory.size() {
        return Err(too_long(range).into());
    }
    vcpu.look(py, |vcpu| {
        if !vcpu.memory().is(memory) {
            let detail = "the vCPU belongs to another machine";
            return Err(Error::new(ErrorKind::State, "memory", detail));
        }
        translated(vcpu, memory, range)
    })
}

/// The pieces of a guest-virtual range, translated by the vCPU's page tables.
fn translated(
    vcpu: &mut Vcpu,
    memory: &GuestMemory,
    (start, length): (u64, u64),
) -> Result<Pieces> {
    let paging = vcpu.paging()?;
    let mut pieces = Pieces::new();
    let (mut at, mut left) = (start, length);
    loop {
        let here = left.min(PAGE - at % PAGE);
        let Some(physical) = vcpu.translate(&paging, at) else {
            let detail = "the address is not mapped by the vCPU's page tables";
            return Err(Error::new(ErrorKind::Memory, format!("{at:#x}"), detail));
        };
        memory.check(physical, here)?;
        pieces.push((physical, usize::try_from(here).map_err(|_| too_long((start, length)))?));
        left -= here;
        if left == 0 {
            return Ok(pieces);
        }
        at = at.wrapping_add(here);
    }
}

fn read_pieces(py: Python<'_>, memory: &GuestMemory, pieces: &Pieces, to: SendPtr) -> PyResult<()> {
    let mut done = 0;
    for (address, length) in pieces {
        let place = SendPtr(to.at(done));
        // SAFETY: the caller's place has room for all pieces.
        copy(py, *length, || unsafe { memory.read_raw(*address, place.at(0), *length) })?;
        done += length;
    }
    Ok(())
}

fn contiguous(buffer: &PyUntypedBuffer) -> PyResult<(SendPtr, usize)> {
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer must be contiguous"));
    }
    Ok((SendPtr(buffer.buf_ptr().cast()), buffer.len_bytes()))
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
        // SAFETY: a new bytes object that is filled before anything else can refer to it. The
        // length cannot exceed isize::MAX, because the range is in memory.
        unsafe {
            let size = pyo3::ffi::Py_ssize_t::try_from(length)?;
            let new = pyo3::ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
            let bytes = Bound::from_owned_ptr_or_err(py, new)?.cast_into_unchecked::<PyBytes>();
            let to = SendPtr(pyo3::ffi::PyBytes_AsString(bytes.as_ptr()).cast());
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
            let place = SendPtr(from.at(done));
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
}
