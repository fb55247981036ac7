//! The network devices of a machine for Python: `Vmm.nets`.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use super::config_net;
use super::ending::import;
use super::event::{PyEventManager, PySubscriberId};
use super::frame_queue::PyFrameQueue;
use super::network_port::PyNetworkPort;
use super::parts::Part;
use super::user_net::PyUserNetwork;
use super::virtio;
use super::vmm::PyVmm;
use crate::net::switch::PortBackend;
use crate::net::user::UserBackend;
use crate::net::{FrameQueue, NetBackend};
use crate::virtio::{Attached, Net};
use crate::vmm::Vmm;

/// What is behind a device, if the program can hold it.
fn native(py: Python<'_>, backend: Arc<dyn NetBackend>) -> PyResult<Option<Py<PyAny>>> {
    let backend = match backend.as_any().downcast::<FrameQueue>() {
        Ok(queue) => return Ok(Some(Py::new(py, PyFrameQueue(queue))?.into_any())),
        Err(backend) => backend,
    };
    let backend = match backend.downcast::<UserBackend>() {
        Ok(user) => return Ok(Some(Py::new(py, PyUserNetwork::over(user))?.into_any())),
        Err(backend) => backend,
    };
    match backend.downcast::<PortBackend>() {
        Ok(port) => Ok(Some(Py::new(py, PyNetworkPort::over(Arc::clone(port.port())))?.into_any())),
        Err(_) => Ok(None),
    }
}

/// Have a machine's loop call Python for the backends that need it. Returns the subscribers.
pub(super) fn connect(
    vmm: &Vmm,
    manager: &Py<PyEventManager>,
    config: &Bound<'_, PyAny>,
) -> PyResult<Vec<Py<PySubscriberId>>> {
    let py = config.py();
    let found: Vec<_> = virtio::devices_of::<Net>(vmm.virtio()?).collect();
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let pairs = PyList::empty(py);
    for (net, (_, device)) in config.getattr("nets")?.try_iter()?.zip(found) {
        pairs.append((net?.getattr("backend")?, native(py, device.backend())?))?;
    }
    import(py, "pyvmm.nets")?.call_method1("connect", (manager, pairs))?.extract()
}

/// A network device of a machine: an item of `Vmm.nets`. It holds the machine.
#[pyclass(frozen, weakref, name = "NetDevice", module = "pyvmm")]
#[derive(Debug)]
pub struct PyNetDevice {
    vmm: Py<PyVmm>,
    at: usize,
}

impl PyNetDevice {
    /// # Errors
    /// `ClosedError` if the machine is closed.
    fn found(&self) -> PyResult<(Attached, Arc<Net>)> {
        virtio::nth(&self.vmm, self.at)
    }

    fn device(&self) -> PyResult<Arc<Net>> {
        Ok(self.found()?.1)
    }
}

#[pymethods]
impl PyNetDevice {
    /// Its name, such as "net0".
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.found()?.0.name().to_owned())
    }

    /// The guest's hardware address.
    #[getter]
    fn mac(&self, py: Python<'_>) -> PyResult<String> {
        let device = self.device()?;
        let bytes = py.detach(|| device.mac()).map(|byte| format!("{byte:02x}"));
        Ok(bytes.join(":"))
    }

    /// The MTU that the guest is asked to use, or None.
    #[getter]
    fn mtu(&self) -> PyResult<Option<u16>> {
        Ok(self.device()?.mtu())
    }

    /// What is behind it, such as "tap tap0".
    #[getter]
    fn backend(&self, py: Python<'_>) -> PyResult<String> {
        let device = self.device()?;
        Ok(py.detach(|| device.backend().describe()))
    }

    /// The `UserNetwork` or `NetworkPort` behind it; None for any other backend.
    #[getter]
    fn network(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let device = self.device()?;
        let found = native(py, py.detach(|| device.backend()))?;
        let found = found.filter(|found| !found.bind(py).is_instance_of::<PyFrameQueue>());
        if found.is_some() {
            // A reset does not undo what is done with it.
            self.vmm.get().vmm()?;
        }
        Ok(found)
    }

    /// Whether the guest has a link. Set it to plug the cable in or out.
    ///
    /// It is False if the program has set it, and once the backend has failed. Without a link,
    /// frames are dropped in both directions.
    #[getter]
    fn link(&self) -> PyResult<bool> {
        Ok(self.device()?.is_up())
    }

    #[setter]
    fn set_link(&self, py: Python<'_>, is_up: bool) -> PyResult<()> {
        let device = self.device()?;
        py.detach(|| device.set_link(is_up));
        Ok(())
    }

    /// Why the backend takes and gives no more frames, or None.
    #[getter]
    fn failure(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let device = self.device()?;
        Ok(py.detach(|| crate::virtio::VirtioDevice::failure(&*device)))
    }

    /// Counts since the machine was made.
    ///
    /// "received" and "received_bytes" are what the guest has received, "sent" and "sent_bytes"
    /// what it has sent. "receive_dropped" and "send_dropped" had no link, or were malformed or
    /// longer than the guest's buffers; "backend_dropped" is what the backend has dropped.
    #[getter]
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let device = self.device()?;
        let counts = py.detach(|| device.counts());
        let found = PyDict::new(py);
        for (name, count) in [
            ("received", counts.received),
            ("received_bytes", counts.received_bytes),
            ("receive_dropped", counts.receive_dropped),
            ("sent", counts.sent),
            ("sent_bytes", counts.sent_bytes),
            ("send_dropped", counts.send_dropped),
            ("backend_dropped", counts.backend_dropped),
        ] {
            found.set_item(name, count)?;
        }
        Ok(found)
    }

    /// Put another backend behind the device, as `Net` takes it. The former one is closed.
    ///
    /// Raises:
    ///     ConfigError: it is no backend.
    ///     StreamError: it cannot be opened.
    fn connect(&self, py: Python<'_>, backend: &Bound<'_, PyAny>) -> PyResult<()> {
        let device = self.device()?;
        let new = config_net::backend(backend)?;
        let vmm = self.vmm.get();
        // A reset keeps it: a pool closes the machine after the job.
        vmm.vmm()?;
        let pairs = PyList::new(py, [(backend, native(py, Arc::clone(&new))?)])?;
        let connected =
            import(py, "pyvmm.nets")?.call_method1("connect", (vmm.manager(py)?, pairs))?;
        vmm.streams.lock().extend(connected.extract::<Vec<_>>()?);
        py.detach(|| device.connect(new));
        Ok(())
    }

    /// Record frames of both directions into a new file; None ends the recording.
    ///
    /// Wireshark opens the file: pcap, with nanoseconds. A former recording ends; the number of its
    /// frames is returned. A frame whose checksum is left to the receiver is recorded without it.
    ///
    /// Raises:
    ///     StreamError: the file cannot be written.
    fn capture(&self, py: Python<'_>, path: Option<PathBuf>) -> PyResult<u64> {
        let device = self.device()?;
        self.vmm.get().vmm()?;
        let former = py.detach(|| device.capture(path.as_deref()))?;
        Ok(former.map_or(0, |capture| capture.frames()))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.found().map_or_else(
            |_| "NetDevice(unreachable)".into(),
            |(attached, device)| {
                let backend = py.detach(|| device.backend().describe());
                let link = if device.is_up() { "up" } else { "down" };
                format!("NetDevice({}, {backend}, link {link})", attached.name())
            },
        )
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vmm)
    }
}

#[pymethods]
impl PyVmm {
    /// The network devices, in the order of `VmmConfig.nets`; the same objects each time.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[getter]
    fn nets<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let count = virtio::devices_of::<Net>(slf.get().core()?.virtio()?).count();
        virtio::objects(slf, count, Part::Net, |vmm, at| Bound::new(py, PyNetDevice { vmm, at }))
    }
}
