//! A virtio device in Python: its configuration, its transport, its queues and their chains. The
//! loop's thread gives it the queues; any thread completes chains.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyo3::exceptions::PyIndexError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use super::config_part::{Part, bad, unlike};
use super::enter::{attach, on_vcpu_thread};
use super::virtio_chain::PyVirtqueue;
use crate::config::{CustomConfig, CustomProgram};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};
use crate::virtio::{Custom, Happened, Queues, Transport};

/// The Python object behind a device.
#[derive(Debug)]
pub(super) struct PythonVirtio {
    /// None once the machine is closed.
    object: Mutex<Option<Py<PyAny>>, rank::PythonDevices>,
    /// An exception of a call that the loop did not make, until the loop raises it.
    raised: Mutex<Option<PyErr>, rank::DeviceFailure>,
}

impl PythonVirtio {
    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        // The collector runs on a thread that may hold another lock: it never waits.
        match self.object.try_lock() {
            Some(object) => object.iter().try_for_each(|object| visit.call(object)),
            None => Ok(()),
        }
    }

    /// # Errors
    /// `ClosedError` if the machine is closed.
    pub(super) fn object(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let object = self.object.lock();
        object
            .as_ref()
            .map(|object| object.clone_ref(py))
            .ok_or_else(|| Error::closed("machine").into())
    }

    /// The machine is closed: the object, to be dropped where Python code may run.
    pub(super) fn release(&self) -> Option<Py<PyAny>> {
        self.object.lock().take()
    }

    fn optional<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        let method = self.object(py)?.bind(py).getattr_opt(name)?;
        Ok(method.filter(|method| !method.is_none()))
    }
}

impl CustomProgram for PythonVirtio {
    fn write_config(&self, offset: u64, data: &[u8]) {
        on_vcpu_thread(
            |py| {
                let Some(method) = self.optional(py, "write_config")? else { return Ok(()) };
                method.call1((offset, PyBytes::new(py, data))).map(drop)
            },
            |_, error| *self.raised.lock() = Some(error),
        );
    }

    fn save(&self) -> Result<Vec<u8>> {
        let saved = attach(|py| match self.optional(py, "save")? {
            None => Ok(Vec::new()),
            Some(save) => save.call0()?.extract::<Vec<u8>>(),
        });
        saved.map_err(|error| failed("save()", &error))
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let restored = attach(|py| match self.optional(py, "restore")? {
            None => Ok(()),
            Some(restore) => restore.call1((PyBytes::new(py, state),)).map(drop),
        });
        restored.map_err(|error| failed("restore()", &error))
    }
}

fn failed(what: &str, error: &PyErr) -> Error {
    Error::new(ErrorKind::State, "virtio device", format!("{what} raised: {error}"))
}

/// The configuration of a device that is a Python object.
pub(super) fn from_python(object: &Bound<'_, PyAny>) -> PyResult<CustomConfig> {
    let py = object.py();
    if object.getattr_opt(intern!(py, "process"))?.is_none_or(|process| !process.is_callable()) {
        return Err(bad("virtio", unlike(object, "a device with a method process(queue)")));
    }
    let part = Part { object: object.clone(), key: "virtio" };
    let features = match object.getattr_opt(intern!(py, "features"))? {
        None => 0,
        Some(_) => part.get(intern!(py, "features"), "a number from 0 to 2**64 - 1")?,
    };
    let space = match object.getattr_opt(intern!(py, "config"))? {
        None => Vec::new(),
        Some(_) => part.get(intern!(py, "config"), "bytes")?,
    };
    Ok(CustomConfig {
        device_type: part.get(intern!(py, "device_type"), "a number from 1 to 2**32 - 1")?,
        features,
        queues: part.get(intern!(py, "queues"), "a sequence of sizes, each a power of two")?,
        space,
        program: Arc::new(PythonVirtio {
            object: Mutex::new(Some(object.clone().unbind())),
            raised: Mutex::new(None),
        }),
    })
}

/// The device's side of its transport: what `attach(transport)` of a virtio device in Python gets.
#[pyclass(frozen, weakref, name = "VirtioTransport", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVirtioTransport {
    transport: Arc<Transport>,
    custom: Arc<Custom>,
    program: Arc<PythonVirtio>,
}

impl PyVirtioTransport {
    fn queues(&self) -> &Arc<Queues> {
        self.transport.queues()
    }

    /// The transport of a device, if it is a Python object's.
    pub(super) fn of(transport: &Arc<Transport>) -> Option<Self> {
        let device = Arc::clone(transport.device());
        let custom = device.as_any().downcast::<Custom>().ok()?;
        let program = Arc::clone(&custom.config().program).as_any().downcast().ok()?;
        Some(Self { transport: Arc::clone(transport), custom, program })
    }

    pub(super) fn program(&self) -> &Arc<PythonVirtio> {
        &self.program
    }
}

#[pymethods]
impl PyVirtioTransport {
    /// The name of the device, such as "virtio0".
    #[getter]
    fn name(&self) -> &str {
        self.queues().name()
    }

    /// The feature bits that the driver has accepted, or None while it has not started the device.
    #[getter]
    fn features(&self) -> Option<u64> {
        self.queues().features()
    }

    /// The configuration space. To set it interrupts the driver, which reads it again.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.custom.space())
    }

    #[setter]
    fn set_config(&self, space: Vec<u8>) -> PyResult<()> {
        self.custom.set_space(space)?;
        self.queues().config_changed();
        Ok(())
    }

    /// Change the configuration space without an interrupt: the answer to what the driver writes.
    fn set_config_quietly(&self, space: Vec<u8>) -> PyResult<()> {
        Ok(self.custom.set_space(space)?)
    }

    /// A queue, for chains that the driver has made available. From any thread.
    ///
    /// Raises:
    ///     IndexError: the device has no such queue.
    fn queue(&self, number: usize) -> PyResult<PyVirtqueue> {
        if number >= self.custom.config().queues.len() {
            return Err(PyIndexError::new_err(format!("the device has no queue {number}")));
        }
        let (queues, custom) = (Arc::clone(self.queues()), Arc::clone(&self.custom));
        Ok(PyVirtqueue { queues, custom, number })
    }

    /// Tell the driver that the device needs a reset. `VirtioDevice.failure` is the reason.
    fn fail(&self, reason: String) {
        self.queues().fail(reason);
    }

    /// The descriptors of the queues' notifications.
    fn _descriptors(&self) -> Vec<RawFd> {
        let all = (0..self.custom.config().queues.len()).map(|at| self.queues().notification(at));
        all.flatten().map(AsRawFd::as_raw_fd).collect()
    }

    /// Take a notification. Returns what the driver has done, and the queue if it is open.
    fn _take<'py>(
        &self,
        py: Python<'py>,
        fd: RawFd,
    ) -> PyResult<(Bound<'py, PyList>, Option<PyVirtqueue>)> {
        let raised = self.program.raised.lock().take();
        if let Some(error) = raised {
            return Err(error);
        }
        let events = PyList::empty(py);
        for happened in self.custom.take_happened() {
            events.append(match happened {
                Happened::Activated(features) => Some(features),
                Happened::Reset => None,
            })?;
        }
        let number = self._descriptors().iter().position(|other| *other == fd);
        let Some(number) = number else { return Ok((events, None)) };
        if let Some(event) = self.queues().notification(number) {
            // Fails if it was read already.
            let _ = event.read();
        }
        self.queues().counts.notifications.fetch_add(1, Ordering::Relaxed);
        let is_open = self.custom.catch_up(self.queues());
        Ok((events, if is_open { Some(self.queue(number)?) } else { None }))
    }

    fn __repr__(&self) -> String {
        format!("VirtioTransport({})", self.name())
    }
}
