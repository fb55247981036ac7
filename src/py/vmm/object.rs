//! `Vmm` for Python. The GIL is released while it waits.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use super::loop_objects::LoopObjects;
use crate::devices::Serial;
use crate::error::{Error, ErrorKind, Result};
use crate::py::device::PythonDevice;
use crate::py::enter::prepare_vcpu_threads;
use crate::py::event::{PyEventManager, PySubscriberId};
use crate::py::gil_cell::GilCell;
use crate::py::hooks::Hooks;
use crate::py::lease::{Lease, ReuseTracker};
use crate::py::memory::PyGuestMemory;
use crate::py::owned::Owned;
use crate::py::parts::{Part, Parts};
use crate::py::registry::Close;
use crate::py::serial::PySerial;
use crate::py::unanswered::unanswered;
use crate::py::virtio_custom::PythonVirtio;
use crate::py::{exit, interrupt, vcpu};
use crate::sync::{Mutex, rank};
use crate::vmm::{Vmm, closed};

/// A virtual machine: the constructor builds it, `run` runs it, and `close` or the end of a `with`
/// releases it.
///
/// A subclass's `__init__` may take any arguments and calls `super().__init__`. Forks and pools
/// create plain `Vmm` objects.
///
/// Args:
///     config: the configuration; None uses the built-in guest.
///     event_manager: a loop shared with others; None creates one. In a shared loop, the `run` of
///         each machine runs the loop for all machines, on its own thread, and ends only for its
///         own machine.
///
/// Raises:
///     ConfigError: a value cannot be used; the text starts with its key.
///     BootError: the kernel, RAM disk or code cannot be loaded.
///     KvmUnavailableError: there is no usable /dev/kvm; `hint` says what to do.
///     KvmError: KVM refused a part.
#[pyclass(frozen, subclass, weakref, name = "Vmm", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVmm {
    pub(in crate::py) vmm: Owned<Arc<Vmm>>,
    /// Exit hooks, and the pending outcomes of hooks and Python devices for the run.
    pub(in crate::py) hooks: Arc<Hooks>,
    /// The Python devices on its buses.
    pub(in crate::py) devices: Devices,
    /// The virtio devices in Python.
    pub(in crate::py) programs: Mutex<Vec<Arc<PythonVirtio>>, rank::PythonDevices>,
    /// Subscribers that serve the serial port's Python streams and the virtio devices in Python.
    pub(in crate::py) streams: Mutex<Vec<Py<PySubscriberId>>, rank::PythonStreams>,
    /// Empty until `__init__` has built the machine.
    pub(in crate::py) origin: OnceLock<Origin>,
    /// None once the machine is closed, which closes their descriptors unless the program holds
    /// them.
    pub(in crate::py) loop_objects: GilCell<Option<LoopObjects>>,
    pub(in crate::py) tracker: ReuseTracker,
    /// The objects of its vCPUs, its memory and its serial port.
    pub(in crate::py) parts: Arc<Parts>,
    /// The objects that were passed to the last job of a pool.
    pub(in crate::py) leased: Mutex<Option<Lease>, rank::Lease>,
}

/// The configuration and the loop of a machine.
#[derive(Debug)]
pub(in crate::py) struct Origin {
    pub(in crate::py) config: Py<PyAny>,
    /// Whether other machines may share the loop.
    pub(in crate::py) is_shared: bool,
}

/// The Python devices on a machine's buses.
type Devices = Arc<Mutex<Vec<Arc<PythonDevice>>, rank::PythonDevices>>;

impl Close for Vmm {
    fn stop(&self) {
        // Fails only in a forked child.
        let _ = Vmm::stop(self);
    }

    fn close(&self) {
        Vmm::close(self);
    }

    fn is_open(&self) -> bool {
        self.vm().is_ok()
    }
}

impl PyVmm {
    /// The machine, for operations that a reset cannot undo. A pool closes it after the job.
    ///
    /// # Errors
    /// [`ErrorKind::State`] in a forked child, and while the interpreter finalizes.
    pub(in crate::py) fn vmm(&self) -> Result<&Arc<Vmm>> {
        self.tracker.hand_out();
        self.core()
    }

    /// The machine, for a change that a reset cannot undo and that is complete when the call
    /// returns.
    pub(in crate::py) fn changing(&self) -> Result<&Arc<Vmm>> {
        self.tracker.change();
        self.core()
    }

    /// The machine, for operations that change nothing, or only what [`Vmm::renew`] undoes or
    /// detects.
    pub(in crate::py) fn core(&self) -> Result<&Arc<Vmm>> {
        self.vmm.get()
    }

    /// The configuration and the loop of the machine.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it is not initialized.
    pub(in crate::py) fn origin(&self) -> Result<&Origin> {
        match self.origin.get() {
            Some(origin) => Ok(origin),
            None => self.core().and(Err(Error::new(
                ErrorKind::State,
                "machine",
                "it is being initialized",
            ))),
        }
    }

    pub(in crate::py) fn loop_objects<T>(
        &self,
        py: Python<'_>,
        of: impl FnOnce(&LoopObjects) -> T,
    ) -> PyResult<T> {
        let found = self.loop_objects.with(py, |own| own.as_ref().map(of));
        found.ok_or_else(|| closed().into())
    }

    /// The event manager whose loop runs inside `run`.
    pub(in crate::py) fn manager(&self, py: Python<'_>) -> PyResult<Py<PyEventManager>> {
        self.loop_objects(py, |own| own.event_manager.clone_ref(py))
    }

    /// The error, or instead the exception of a device's `save` or `restore`.
    pub(in crate::py) fn device_failure(&self, error: PyErr) -> PyErr {
        let devices = self.devices.lock().clone();
        devices.iter().find_map(|device| device.take_failure()).unwrap_or(error)
    }
}

impl PyVmm {
    /// The object of a port: the existing one, or a new one.
    fn port<'py>(
        slf: &Bound<'py, Self>,
        key: &'static str,
        serial: &Arc<Serial>,
    ) -> PyResult<Bound<'py, PySerial>> {
        let (py, this) = (slf.py(), slf.get());
        this.parts.get_or_make(py, Part::Serial(key), || {
            let (machine, serial) = (slf.as_any().clone().unbind(), Arc::clone(serial));
            let core = Arc::downgrade(this.core()?) as Weak<dyn Close>;
            Bound::new(py, PySerial::of_machine(serial, machine, core, &this.tracker))
        })
    }
}

#[pymethods]
impl PyVmm {
    /// Run the guest until it ends, `stop` is called, or `timeout` seconds have passed.
    ///
    /// The call runs the event loop meanwhile: subscribers are called on this thread, devices and
    /// exit hooks on those of the vCPUs. After a stop, a timeout or an exception, the next `run`
    /// continues where this one ended.
    ///
    /// Raises:
    ///     StateError: a run is in progress, the guest has ended, or the machine is closed.
    ///     StreamError: a stream of the serial port failed.
    ///     KeyboardInterrupt: Ctrl-C, within 100 ms.
    ///     Exception: the first exception of a callback.
    #[pyo3(signature = (timeout = None))]
    fn run<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        prepare_vcpu_threads(py);
        self.run_by(py, timeout, |vmm, timeout, interrupted, turn| {
            vmm.run_interruptibly(timeout, interrupted, turn)
        })
    }

    /// Start the vCPUs and return. `wait` runs the event loop for them.
    ///
    /// Raises:
    ///     StateError: a run is in progress, the guest has ended, or the machine is closed.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        let vmm = self.changing()?;
        prepare_vcpu_threads(py);
        let started = py.detach(|| vmm.start());
        self.close_if_due(py, started.is_ok())?;
        started?;
        self.hooks.pending.keep_exit(None);
        Ok(())
    }

    /// Wait for a started machine, as `run` does. Return None after the timeout; the guest keeps
    /// running.
    ///
    /// Raises:
    ///     StateError: the machine was not started, or another thread is waiting.
    ///     Exception: as for `run`; it ends the run.
    #[pyo3(signature = (timeout = None))]
    fn wait<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.turn_by(py, timeout, |vmm, timeout, interrupted, turn| {
            vmm.wait(timeout, interrupted, turn)
        })
    }

    /// Stop all vCPUs and wait until they are out of the guest.
    ///
    /// May be called from any thread or callback; the loop keeps running.
    ///
    /// The registers can then be read and changed. Does nothing if the machine is already paused.
    ///
    /// Raises:
    ///     StateError: the machine is not running.
    ///     WaitTimeoutError: a vCPU did not leave its guest within `timeout` seconds. The machine
    ///         continues.
    #[pyo3(signature = (timeout = None))]
    fn pause(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let vmm = self.changing()?;
        let paused = interrupt::limited(py, timeout, |limit| vmm.pause(limit));
        paused.map_err(|error| self.device_failure(error))
    }

    /// Continue the vCPUs that `pause` stopped. Does nothing if they are running.
    ///
    /// Raises:
    ///     StateError: no run is in progress, or the guest has ended.
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        let vmm = self.changing()?;
        Ok(py.detach(|| vmm.resume())?)
    }

    /// The vCPUs, by number; the same objects each time. Before the first run they have their
    /// initial registers.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[getter]
    fn vcpus<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let (py, vmm) = (slf.py(), slf.get().core()?);
        let handles = py.detach(|| vmm.vcpus())?;
        vcpu::to_python(slf.as_any(), &handles, &slf.get().parts)
    }

    /// Guest memory, by guest-physical address; the same object each time, which keeps the machine
    /// alive.
    #[getter]
    fn memory<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyGuestMemory>> {
        let (py, this, core) = (slf.py(), slf.get(), slf.get().core()?);
        this.parts.get_or_make(py, Part::Memory, || {
            Bound::new(py, PyGuestMemory::of(slf.as_any(), core, Vmm::memory, &this.tracker))
        })
    }

    /// The host's side of the first serial port; the same object each time, which keeps the machine
    /// alive.
    #[getter]
    pub(in crate::py) fn serial<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PySerial>> {
        let core = slf.get().core()?;
        Self::port(slf, "com1", core.serial())
    }

    /// The host's side of every port that prints, by its key.
    ///
    /// The keys are "com1", which is `serial`, "com2" to "com4", and "debug_port", as far as the
    /// machine has them.
    #[getter]
    fn serials<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        let found = PyDict::new(slf.py());
        for (key, serial) in slf.get().core()?.serials() {
            found.set_item(key, Self::port(slf, key, serial)?)?;
        }
        Ok(found)
    }

    /// The configuration.
    #[getter]
    fn config(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        Ok(self.origin()?.config.clone_ref(py))
    }

    /// End the current run. If none is in progress, the next one ends at once.
    ///
    /// May be called from any thread or callback.
    fn stop(&self) -> PyResult<()> {
        Ok(self.core()?.stop()?)
    }

    /// The machine's run state.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        exit::state(py, self.core()?.state())
    }

    /// How the guest ended, or None if it has not ended.
    #[getter]
    fn exit<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.core()?.exit()?.map(|exit| exit::to_python(py, &exit)).transpose()
    }

    /// Accesses that no device answered, counted by address.
    #[getter]
    fn unanswered<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        unanswered(py, &self.core()?.router().buses)
    }

    /// The instructions that KVM refused and pyvmm executed, counted by mnemonic.
    ///
    /// Empty without `CpuConfig(fixups=True)`. docs/fixups.md lists the instructions.
    #[getter]
    fn fixups(&self) -> PyResult<BTreeMap<String, u64>> {
        Ok(self.core()?.fixups().all())
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let class = slf.get_type().name()?;
        Ok(match slf.get().vmm.peek() {
            Some(vmm) => format!("{class}(state={:?})", vmm.state().name()),
            None => format!("{class}(unreachable)"),
        })
    }

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        crate::py::notebook::html(slf, "vmm")
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        self.origin.get().map_or(Ok(()), |origin| visit.call(&origin.config))?;
        // SAFETY: the collector has the GIL.
        let visited = unsafe {
            self.loop_objects
                .peek(|own| own.iter().try_for_each(|own| visit.call(&own.event_manager)))
        };
        visited.unwrap_or(Ok(()))?;
        // The other fields are shared by the objects of one machine, and visited by the object that
        // owns them.
        if self.vmm.peek().is_none() || self.tracker.is_leased() {
            return Ok(());
        }
        self.hooks.traverse(&visit)?;
        self.hooks.pending.traverse(&visit)?;
        if let Some(programs) = self.programs.try_lock() {
            programs.iter().try_for_each(|program| program.traverse(&visit))?;
        }
        match self.devices.try_lock() {
            Some(devices) => devices.iter().try_for_each(|device| device.traverse(&visit)),
            None => Ok(()),
        }
    }
}
