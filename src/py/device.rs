//! A Python object as a device on a machine's buses. Its methods are called on vCPU threads;
//! `save`, `restore`, `quiesce` and `resume` on the thread that pauses, takes a snapshot, forks or
//! resets.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyInt};

use super::enter::{attach, call_out, on_vcpu_thread};
use super::pending_outcome::{PendingOutcome, position};
use super::recorded::{name_of, recorded};
use super::returned::refuse_awaitable;
use crate::devices::{Access, Device, each};
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::Outcome;
use crate::hop::hop;
use crate::sync::{Mutex, rank};
use crate::vcpu::Data;

/// A Python device, its methods looked up when it was added.
#[derive(Debug)]
pub(super) struct PythonDevice {
    object: Py<PyAny>,
    access: Access,
    base: u64,
    /// The object's class.
    name: String,
    methods: Methods,
    pending: Arc<PendingOutcome>,
    /// The exception of its `save`, `restore` or `quiesce`, until the caller takes it.
    failed: Mutex<Option<PyErr>, rank::DeviceFailure>,
}

#[derive(Debug)]
struct Methods {
    read: Option<Py<PyAny>>,
    write: Option<Py<PyAny>>,
    read_many: Option<Py<PyAny>>,
    write_many: Option<Py<PyAny>>,
    save: Option<Py<PyAny>>,
    restore: Option<Py<PyAny>>,
    quiesce: Option<Py<PyAny>>,
    resume: Option<Py<PyAny>>,
}

fn method(object: &Bound<'_, PyAny>, name: &str) -> PyResult<Option<Py<PyAny>>> {
    match object.getattr_opt(name)? {
        None => Ok(None),
        Some(method) if method.is_none() => Ok(None),
        Some(method) if method.is_callable() => Ok(Some(method.unbind())),
        Some(_) => {
            let class = object.get_type();
            let text =
                format!("a device's {name} must be a method, and that of {} is not", class.name()?);
            Err(PyTypeError::new_err(text))
        }
    }
}

impl PythonDevice {
    pub(super) fn new(
        object: &Bound<'_, PyAny>,
        access: Access,
        base: u64,
        pending: &Arc<PendingOutcome>,
    ) -> PyResult<Self> {
        let methods = Methods {
            read: method(object, "read")?,
            write: method(object, "write")?,
            read_many: method(object, "read_many")?,
            write_many: method(object, "write_many")?,
            save: method(object, "save")?,
            restore: method(object, "restore")?,
            quiesce: method(object, "quiesce")?,
            resume: method(object, "resume")?,
        };
        let Methods { read, write, read_many, write_many, .. } = &methods;
        if [read, write, read_many, write_many].into_iter().all(Option::is_none) {
            let class = object.get_type();
            let text =
                format!("a device needs read() or write(), and {} has neither", class.name()?);
            return Err(PyTypeError::new_err(text));
        }
        if methods.quiesce.is_some() != methods.resume.is_some() {
            let class = object.get_type();
            let text =
                format!("{} has one of quiesce() and resume(): both go together", class.name()?);
            return Err(PyTypeError::new_err(text));
        }
        let name = object.get_type().qualname()?.to_string();
        let (object, pending) = (object.clone().unbind(), Arc::clone(pending));
        Ok(Self { object, access, base, name, methods, pending, failed: Mutex::new(None) })
    }

    pub(super) fn is_at(&self, access: Access, base: u64) -> bool {
        (self.access, self.base) == (access, base)
    }

    pub(super) fn object(&self) -> &Py<PyAny> {
        &self.object
    }

    /// The place of an access, for the note of an exception.
    pub(super) fn place(&self, offset: u64) -> String {
        let bus = if self.access == Access::Pio { "port" } else { "address" };
        format!("{bus} {:#x}, offset {offset:#x} of the device", self.base.wrapping_add(offset))
    }

    pub(super) fn pending(&self) -> &PendingOutcome {
        &self.pending
    }

    /// Take the exception of its `save`, `restore` or `quiesce`.
    pub(super) fn take_failure(&self) -> Option<PyErr> {
        self.failed.lock().take()
    }

    fn at(&self) -> String {
        let bus = if self.access == Access::Pio { "pio" } else { "mmio" };
        format!("{bus} {:#x}", self.base)
    }

    /// Store the exception of a method, and return an error for it.
    fn keep<T>(&self, what: &str, result: PyResult<T>) -> Result<T> {
        result.map_err(|error| {
            let failed = Error::new(ErrorKind::State, self.at(), format!("{what} raised: {error}"));
            *self.failed.lock() = Some(error);
            failed
        })
    }

    /// # Errors
    /// [`ErrorKind::State`], because the device cannot be in a snapshot.
    fn stateless<T>(&self, lacking: &str) -> Result<T> {
        let name = &self.name;
        let detail = format!("the {name} there has no {lacking}");
        let error = Error::new(ErrorKind::State, self.at(), detail);
        Err(error.hint("a device in a snapshot needs save() -> bytes and restore(bytes)"))
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        let Methods { read, write, read_many, write_many, save, restore, quiesce, resume } =
            &self.methods;
        visit.call(&self.object)?;
        [read, write, read_many, write_many, save, restore, quiesce, resume]
            .into_iter()
            .try_for_each(|method| visit.call(method))
    }
}

impl Device for PythonDevice {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        match (&self.methods.read, &self.methods.read_many) {
            (Some(read), _) => call_read(self, read, offset, data),
            (None, Some(_)) => self.read_many(offset, data, data.len()),
            (None, None) => Outcome::Continue,
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        hop!();
        match (&self.methods.write, &self.methods.write_many) {
            (Some(write), _) => call_write(self, write, offset, data),
            (None, Some(_)) => self.write_many(offset, data, data.len()),
            (None, None) => Outcome::Continue,
        }
    }

    fn read_many(&self, offset: u64, data: &mut [u8], size: usize) -> Outcome {
        let Some(read_many) = &self.methods.read_many else {
            return each(data.chunks_mut(size), |element| self.read(offset, element));
        };
        call_read_many(self, read_many, offset, size, data)
    }

    fn write_many(&self, offset: u64, data: &[u8], size: usize) -> Outcome {
        let Some(write_many) = &self.methods.write_many else {
            return each(data.chunks(size), |element| self.write(offset, element));
        };
        call_write_many(self, write_many, offset, size, data)
    }

    fn save(&self) -> Result<Vec<u8>> {
        match (&self.methods.save, &self.methods.restore) {
            (Some(save), Some(_)) => self.keep("save()", call_save(save)),
            (Some(_), None) => self.stateless("restore()"),
            (None, _) => self.stateless("save()"),
        }
    }

    fn check_restorable(&self) -> Result<()> {
        self.methods.restore.as_ref().map_or_else(|| self.stateless("restore()"), |_| Ok(()))
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        match &self.methods.restore {
            Some(restore) => self.keep("restore()", call_restore(restore, state)),
            None => self.stateless("restore()"),
        }
    }

    fn acts_by_itself(&self) -> bool {
        self.methods.quiesce.is_some()
    }

    fn quiesce(&self) -> Result<()> {
        let quiesce = self.methods.quiesce.as_ref();
        quiesce.map_or(Ok(()), |quiesce| self.keep("quiesce()", call_none(quiesce)))
    }

    fn resume(&self) {
        let Some(resume) = &self.methods.resume else { return };
        if let Err(error) = call_none(resume) {
            attach(|py| error.write_unraisable(py, Some(resume.bind(py))));
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn coalesces_outs(&self) -> bool {
        self.methods.write_many.is_some()
    }

    fn may_block(&self) -> bool {
        true
    }
}

/// Call a device on the vCPU's thread. The run raises its exception, with the place in a note.
fn call_device(
    device: &PythonDevice,
    method: &'static str,
    offset: u64,
    call: impl FnOnce(Python<'_>) -> PyResult<Outcome>,
) -> Outcome {
    let name = || Ok(format!("{}.{method}", device.name()));
    on_vcpu_thread(
        |py| recorded(name, || call(py)),
        |py, error| {
            let text = format!("in {method}() at {}{}", device.place(offset), position());
            device.pending().raise_with_note(py, error, &text);
            Outcome::Stop
        },
    )
}

/// Pass the result of a device's read to the guest.
fn answer(device: &PythonDevice, value: &Bound<'_, PyAny>, data: &mut [u8]) -> PyResult<Outcome> {
    // Usually the result is a number.
    if let Some(number) = number_of(value) {
        if fill(data, number) {
            return Ok(Outcome::Continue);
        }
    } else if !value.is_instance_of::<PyInt>() && device.pending().take_if_stop(value)? {
        return Ok(Outcome::Stop);
    }
    let bytes = bytes_of(value, data.len())?;
    // Both have the same length, as checked by `bytes_of`.
    data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    Ok(Outcome::Continue)
}

fn done(device: &PythonDevice, method: &Py<PyAny>, value: &Bound<'_, PyAny>) -> PyResult<Outcome> {
    if value.is_none() {
        return Ok(Outcome::Continue);
    }
    if device.pending().take_if_stop(value)? {
        return Ok(Outcome::Stop);
    }
    refuse_awaitable(value, || name_of(method.bind(value.py())))?;
    Ok(Outcome::Continue)
}

/// `device.read(offset, size)`
fn call_read(device: &PythonDevice, method: &Py<PyAny>, offset: u64, data: &mut [u8]) -> Outcome {
    call_device(device, "read", offset, |py| {
        answer(device, &method.bind(py).call1((offset, data.len()))?, data)
    })
}

/// `device.write(offset, size, value)`
fn call_write(device: &PythonDevice, method: &Py<PyAny>, offset: u64, data: &[u8]) -> Outcome {
    let number = data.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    call_device(device, "write", offset, |py| {
        done(device, method, &method.bind(py).call1((offset, data.len(), number))?)
    })
}

/// `device.read_many(offset, size, count)`
fn call_read_many(
    device: &PythonDevice,
    method: &Py<PyAny>,
    offset: u64,
    size: usize,
    data: &mut [u8],
) -> Outcome {
    call_device(device, "read_many", offset, |py| {
        let value = method.bind(py).call1((offset, size, data.len() / size.max(1)))?;
        answer(device, &value, data)
    })
}

/// `device.write_many(offset, size, data)`
fn call_write_many(
    device: &PythonDevice,
    method: &Py<PyAny>,
    offset: u64,
    size: usize,
    data: &[u8],
) -> Outcome {
    call_device(device, "write_many", offset, |py| {
        done(device, method, &method.bind(py).call1((offset, size, PyBytes::new(py, data)))?)
    })
}

/// `device.save()`. On the thread that takes the snapshot.
fn call_save(method: &Py<PyAny>) -> PyResult<Vec<u8>> {
    attach(|py| {
        let state = call_out(py, |py| method.call0(py))?;
        let bytes: PyBackedBytes = state.extract(py)?;
        Ok(bytes.to_vec())
    })
}

/// `device.quiesce()` or `device.resume()`. On the thread that pauses, snapshots or resets.
fn call_none(method: &Py<PyAny>) -> PyResult<()> {
    attach(|py| {
        let method = method.bind(py);
        let said = call_out(py, |_| method.call0())?;
        refuse_awaitable(&said, || name_of(method))
    })
}

/// `device.restore(state)`. On the thread that forks or resets.
fn call_restore(method: &Py<PyAny>, state: &[u8]) -> PyResult<()> {
    attach(|py| {
        let method = method.bind(py);
        let state = PyBytes::new(py, state);
        let said = call_out(py, |_| method.call1((state,)))?;
        refuse_awaitable(&said, || name_of(method))
    })
}

/// The value of an int, quickly: none if it is of another class, or has more bits.
fn number_of(value: &Bound<'_, PyAny>) -> Option<u64> {
    if !value.is_exact_instance_of::<PyInt>() {
        return None;
    }
    // SAFETY: an int, with the GIL held.
    let number = unsafe { ffi::PyLong_AsUnsignedLongLong(value.as_ptr()) };
    // All one bits are also the sign of an exception.
    if number == u64::MAX && PyErr::take(value.py()).is_some() { None } else { Some(number) }
}

/// Write a little-endian number, if it fits.
fn fill(data: &mut [u8], number: u64) -> bool {
    let bytes = number.to_le_bytes();
    let (low, high) = bytes.split_at(data.len().min(8));
    if high.iter().any(|byte| *byte != 0) {
        return false;
    }
    let (to, rest) = data.split_at_mut(low.len());
    to.copy_from_slice(low);
    rest.fill(0);
    true
}

/// Convert a device's result to the bytes of a read: an int in little-endian order, or bytes.
pub(super) fn bytes_of(value: &Bound<'_, PyAny>, wanted: usize) -> PyResult<Data> {
    if let Some(number) = number_of(value).or_else(|| value.extract().ok()) {
        let mut data = Data::from_elem(0, wanted);
        if fill(&mut data, number) {
            return Ok(data);
        }
    }
    if value.is_instance_of::<PyInt>() {
        let bits = 8 * wanted;
        let text = format!("{} is not a number of {bits} bits", value.repr()?);
        return Err(pyo3::exceptions::PyOverflowError::new_err(text));
    }
    let Ok(bytes) = value.extract::<PyBackedBytes>() else {
        let class = value.get_type();
        let text = format!("a read must return an int or bytes, not {}", class.name()?);
        return Err(PyTypeError::new_err(text));
    };
    if bytes.len() != wanted {
        let text = format!("the guest reads {wanted} bytes, not {}", bytes.len());
        return Err(pyo3::exceptions::PyValueError::new_err(text));
    }
    Ok(Data::from_slice(&bytes))
}
