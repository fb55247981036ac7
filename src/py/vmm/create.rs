//! Creates the Python object of a machine: `Vmm(...)`, and the object of a fork. Runs with the GIL
//! held, which is released while the machine is built.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::loop_objects::LoopObjects;
use super::object::{Origin, PyVmm};
use crate::boot::{Kind, kind_of_file};
use crate::py::ending::{guard_thread, import};
use crate::py::event::{PyEventManager, PySubscriberId, PyWrappedExitHandler};
use crate::py::gil_cell::GilCell;
use crate::py::hooks::Hooks;
use crate::py::lease::ReuseTracker;
use crate::py::owned::Owned;
use crate::py::parts::Parts;
use crate::py::registry::{self, Close};
use crate::py::serial::PySerial;
use crate::py::virtio_custom::PyVirtioTransport;
use crate::py::{config, interrupt, net};
use crate::sync::Mutex;
use crate::vmm::Vmm;

impl PyVmm {
    /// An object without a machine.
    fn vacant() -> Self {
        let tracker = ReuseTracker::default();
        Self {
            origin: OnceLock::new(),
            loop_objects: GilCell::new(None),
            vmm: Owned::vacant("machine"),
            hooks: Arc::new(Hooks::new(Arc::default(), &tracker)),
            devices: Arc::default(),
            programs: Mutex::default(),
            streams: Mutex::default(),
            leased: Mutex::default(),
            parts: Arc::new(Parts::of(&tracker)),
            tracker,
        }
    }

    /// The object for a machine.
    pub(in crate::py) fn of(
        config: &Bound<'_, PyAny>,
        vmm: Arc<Vmm>,
        event_manager: Option<Py<PyEventManager>>,
        python_streams: &[&'static str],
    ) -> PyResult<Self> {
        let this = Self::vacant();
        this.fill(config, vmm, event_manager, python_streams)?;
        Ok(this)
    }

    /// Attach a machine to the object.
    fn fill(
        &self,
        config: &Bound<'_, PyAny>,
        vmm: Arc<Vmm>,
        event_manager: Option<Py<PyEventManager>>,
        python_streams: &[&'static str],
    ) -> PyResult<()> {
        let (py, tracker) = (config.py(), &self.tracker);
        registry::register(py, Arc::downgrade(&vmm) as Weak<dyn Close>);
        let is_shared = event_manager.is_some();
        let event_manager = match event_manager {
            Some(shared) => shared,
            None => Py::new(py, PyEventManager::over(vmm.event_manager()?))?,
        };
        let mut streams: Vec<Py<PySubscriberId>> = Vec::new();
        for (key, port) in vmm.serials().filter(|(key, _)| python_streams.contains(key)) {
            // The loop holds them, so they must not hold the machine.
            let serial = Py::new(py, PySerial::over(Arc::clone(port), tracker))?;
            let name = config::stream_key(key);
            let connected = import(py, "pyvmm.streams")?
                .call_method1("connect", (serial, &event_manager, config.getattr(name)?, name))?;
            streams.extend(connected.extract::<Vec<_>>()?);
        }
        streams.extend(net::connect(&vmm, &event_manager, config)?);
        let programs = self.connect_programs(py, &vmm, &event_manager, &mut streams);
        programs.inspect_err(|_| self.abandon_programs(py, &event_manager, &streams))?;
        let exit_handler = Py::new(py, PyWrappedExitHandler::over(vmm.exit_handler()?))?;
        // Two threads may call __init__ at the same time. The object keeps the first machine.
        self.vmm.fill(vmm)?;
        let _ = self.origin.set(Origin { config: config.clone().unbind(), is_shared });
        self.loop_objects.with(py, |own| *own = Some(LoopObjects { event_manager, exit_handler }));
        *self.streams.lock() = streams;
        Ok(())
    }

    /// The machine is not made after all. The transports of its devices in Python hold them, where
    /// the garbage collector does not see it.
    fn abandon_programs(
        &self,
        py: Python<'_>,
        event_manager: &Py<PyEventManager>,
        subscribers: &[Py<PySubscriberId>],
    ) {
        self.release_programs();
        for id in subscribers {
            // Fails if the program has already removed it.
            let _ = event_manager.get().remove_subscriber(py, id.get());
        }
    }

    /// Serve the virtio devices in Python in the machine's loop, by `subscribers`.
    fn connect_programs(
        &self,
        py: Python<'_>,
        vmm: &Vmm,
        event_manager: &Py<PyEventManager>,
        subscribers: &mut Vec<Py<PySubscriberId>>,
    ) -> PyResult<()> {
        for attached in vmm.virtio()? {
            let Some(transport) = PyVirtioTransport::of(&attached.transport) else { continue };
            let program = Arc::clone(transport.program());
            let device = program.object(py)?;
            self.programs.lock().push(program);
            let arguments = (device, Py::new(py, transport)?, event_manager);
            let connected =
                import(py, "pyvmm.virtio_device")?.call_method1("connect", arguments)?;
            subscribers.push(connected.extract()?);
        }
        Ok(())
    }
}

#[pymethods]
impl PyVmm {
    /// `__init__` builds the machine, so that a subclass's `__init__` may take other arguments.
    #[new]
    #[pyo3(
        signature = (*_args, **_kwargs),
        text_signature = "(config=None, *, event_manager=None)"
    )]
    fn new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> Self {
        Self::vacant()
    }

    /// Check a configuration as far as this is possible without KVM, for `VmmConfig.check`.
    #[staticmethod]
    fn _check(config: &Bound<'_, PyAny>) -> PyResult<()> {
        guard_thread();
        let native = config::from_python(config)?;
        interrupt::interruptible(config.py(), |interrupted| Vmm::check(&native, interrupted))
    }

    /// Which boot a kernel's file is for, for the command line: "linux" or "kernel".
    #[staticmethod]
    fn _boot_kind(py: Python<'_>, path: PathBuf) -> PyResult<&'static str> {
        match py.detach(|| kind_of_file(&path))? {
            Kind::Linux => Ok("linux"),
            Kind::Kernel => Ok("kernel"),
        }
    }

    #[pyo3(signature = (config = None, *, event_manager = None))]
    fn __init__(
        &self,
        py: Python<'_>,
        config: Option<Bound<'_, PyAny>>,
        event_manager: Option<Py<PyEventManager>>,
    ) -> PyResult<()> {
        self.vmm.check_vacant()?;
        let config = match config {
            Some(config) => config,
            None => import(py, "pyvmm.config")?.getattr("VmmConfig")?.call0()?,
        };
        guard_thread();
        let native = config::from_python(&config)?;
        let python_streams = config::python_streams(&native.serial, &native.others);
        let shared = event_manager.as_ref().map(|manager| manager.get().shared_core());
        let vmm = Arc::new(interrupt::interruptible(py, |interrupted| {
            Vmm::build(native, shared, interrupted)
        })?);
        self.fill(&config, vmm, event_manager, &python_streams)
    }
}
