//! A virtio device in Python: its configuration, its transport, its queues and their chains. The
//! loop's thread gives it the queues; any thread completes chains.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyo3::exceptions::{PyIndexError, PyTypeError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use super::config_part::{Part, bad, unlike};
use super::enter::{attach, call_out, on_vcpu_thread};
use super::owned::Owned;
use super::recorded::name_of;
use super::returned::refuse_awaitable;
use super::virtio_chain::{PyVirtqueue, Served};
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

    /// Call a method that the object may have, outside of a run.
    fn call<T>(
        &self,
        name: &str,
        call: impl for<'py> FnOnce(Python<'py>, Option<Bound<'py, PyAny>>) -> PyResult<T>,
    ) -> Result<T> {
        attach(|py| call(py, self.optional(py, name)?)).map_err(|error| {
            let detail = format!("{name}() raised: {error}");
            Error::new(ErrorKind::State, "virtio device", detail)
        })
    }

    fn optional<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        let method = self.object(py)?.bind(py).getattr_opt(name)?;
        Ok(method.filter(|method| !method.is_none()))
    }
}

impl CustomProgram for PythonVirtio {
    fn write_config(&self, offset: u64, data: &[u8]) -> bool {
        on_vcpu_thread(
            |py| {
                let Some(method) = self.optional(py, "write_config")? else { return Ok(true) };
                let said = method.call1((offset, PyBytes::new(py, data)))?;
                refuse_awaitable(&said, || name_of(&method)).map(|()| true)
            },
            |_, error| {
                let former = self.raised.lock().replace(error);
                drop(former);
                false
            },
        )
    }

    fn reset(&self) -> Result<()> {
        self.call("reset", |py, reset| {
            let Some(reset) = reset else { return Ok(()) };
            let said = call_out(py, |_| reset.call0())?;
            refuse_awaitable(&said, || name_of(&reset))
        })
    }

    fn save(&self) -> Result<Vec<u8>> {
        self.call("save", |py, save| {
            let Some(save) = save else { return Ok(Vec::new()) };
            if self.optional(py, "restore")?.is_none() {
                return Err(PyTypeError::new_err("a device with save() needs restore(state)"));
            }
            call_out(py, |_| save.call0())?.extract::<Vec<u8>>()
        })
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        self.call("restore", |py, restore| {
            let Some(restore) = restore else {
                let has_state = !state.is_empty();
                return if has_state { Err(PyTypeError::new_err("it has none")) } else { Ok(()) };
            };
            let said = call_out(py, |_| restore.call1((PyBytes::new(py, state),)))?;
            refuse_awaitable(&said, || name_of(&restore))
        })
    }
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
    served: Owned<Served>,
    program: Arc<PythonVirtio>,
}

impl PyVirtioTransport {
    /// The transport of a device, if it is a Python object's.
    pub(super) fn of(transport: &Arc<Transport>) -> Option<Self> {
        let custom = transport.device_as::<Custom>()?;
        let program = Arc::clone(&custom.config().program).as_any().downcast().ok()?;
        let queues = Arc::clone(transport.queues());
        custom.serve(&queues);
        let served = Owned::new("virtio device", Served { queues, custom });
        Some(Self { served, program })
    }

    pub(super) fn program(&self) -> &Arc<PythonVirtio> {
        &self.program
    }
}

#[pymethods]
impl PyVirtioTransport {
    /// The name of the device, such as "virtio0".
    #[getter]
    fn name(&self) -> PyResult<&str> {
        Ok(self.served.get()?.queues.name())
    }

    /// The feature bits that the driver has accepted, or None while it has not started the device.
    #[getter]
    fn features(&self) -> PyResult<Option<u64>> {
        Ok(self.served.get()?.queues.features())
    }

    /// The configuration space. To set it interrupts the driver, which reads it again.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.served.get()?.custom.space()))
    }

    #[setter]
    fn set_config(&self, space: Vec<u8>) -> PyResult<()> {
        let served = self.served.get()?;
        served.custom.set_space(space)?;
        served.queues.config_changed();
        Ok(())
    }

    /// Change the configuration space without an interrupt: the answer to what the driver writes.
    fn set_config_quietly(&self, space: Vec<u8>) -> PyResult<()> {
        Ok(self.served.get()?.custom.set_space(space)?)
    }

    /// A queue, for chains that the driver has made available. From any thread.
    ///
    /// Raises:
    ///     IndexError: the device has no such queue.
    fn queue(&self, number: usize) -> PyResult<PyVirtqueue> {
        let served = self.served.get()?;
        if number >= served.custom.config().queues.len() {
            return Err(PyIndexError::new_err(format!("the device has no queue {number}")));
        }
        Ok(PyVirtqueue { served: Owned::new("virtio queue", served.clone()), number })
    }

    /// Tell the driver that the device needs a reset. `VirtioDevice.failure` is the reason.
    fn fail(&self, reason: String) -> PyResult<()> {
        self.served.get()?.queues.fail(reason);
        Ok(())
    }

    /// The descriptors of the queues' notifications.
    fn _descriptors(&self) -> PyResult<Vec<RawFd>> {
        Ok(descriptors(&self.served.get()?.queues))
    }

    /// `process` has raised: what it has left in the queue is notified again.
    fn _left(&self, fd: RawFd) -> PyResult<()> {
        let queues = &self.served.get()?.queues;
        let Some(number) = position(queues, fd) else { return Ok(()) };
        if queues.access().is_some_and(|access| !access.is_empty(number)) {
            queues.notify(number);
        }
        Ok(())
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
        let Served { queues, custom } = self.served.get()?;
        for happened in custom.take_happened() {
            events.append(match happened {
                Happened::Activated(features) => Some(features),
                Happened::Reset => None,
            })?;
        }
        let Some(number) = position(queues, fd) else { return Ok((events, None)) };
        if let Some(event) = queues.notification(number) {
            // Fails if it was read already.
            let _ = event.read();
        }
        queues.counts.notifications.fetch_add(1, Ordering::Relaxed);
        let is_open = custom.catch_up(queues);
        Ok((events, if is_open { Some(self.queue(number)?) } else { None }))
    }

    fn __repr__(&self) -> String {
        let name = self.served.peek().map_or("unreachable", |served| served.queues.name());
        format!("VirtioTransport({name})")
    }
}

fn descriptors(queues: &Queues) -> Vec<RawFd> {
    let all = (0..).map_while(|at| queues.notification(at));
    all.map(AsRawFd::as_raw_fd).collect()
}

/// The queue whose notifications have this descriptor.
fn position(queues: &Queues, fd: RawFd) -> Option<usize> {
    descriptors(queues).iter().position(|other| *other == fd)
}
