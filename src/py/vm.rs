//! `KvmVm` for Python: the machine without an event loop, with any exit handler.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use super::ending::guard_thread;
use super::enter::{attach, prepare_vcpu_threads};
use super::kick_handler::{Handler, PythonHandler, handler};
use super::machine::Machine;
use super::memory::PyGuestMemory;
use super::owned::Owned;
use super::parts::{Part, Parts};
use super::registry::{self, Close};
use super::serial::PySerial;
use super::unanswered::unanswered;
use super::vcpu::PyVcpu;
use super::{config, exit, interrupt, vcpu, wakeup};
use crate::boot;
use crate::config::VmmConfig;
use crate::devices::{self, MachineFacts, Serial, Streams};
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::WrappedExitHandler;
use crate::fixup::Counts;
use crate::limit::deadline_of;
use crate::memory::GuestMemory;
use crate::vcpu::{ExitRouter, VmRunState};
use crate::vm::{KvmVm, claim_platform};

/// A KVM virtual machine without an event loop. A kick of the exit handler reports the end of the
/// guest.
///
/// Args:
///     config: the configuration, whose serial port must have no streams. None creates a bare VM:
///         no memory, devices or vCPUs until `memory.add` and `create_vcpu` are called.
///     exit_handler: an object with `kick()`, called on the thread of the vCPU whose guest has
///         ended. None creates one.
///
/// Raises:
///     VmmError: as for `Vmm`.
#[pyclass(frozen, weakref, name = "KvmVm", module = "pyvmm")]
#[derive(Debug)]
pub struct PyKvmVm {
    machine: Owned<Arc<Machine>>,
    python_handler: Option<Arc<PythonHandler>>,
    router: Arc<ExitRouter>,
    fixups: Arc<Counts>,
    /// The address where the configured code starts.
    #[pyo3(get)]
    entry: u64,
    /// None for a bare VM.
    serial: Option<Arc<Serial>>,
    /// The objects of its vCPUs, its memory and its serial port.
    parts: Parts,
}

impl Drop for PyKvmVm {
    fn drop(&mut self) {
        let Some(machine) = self.machine.take() else { return };
        // Its vCPUs may be running, and may need the GIL to stop.
        attach(|py| {
            // A close that a signal has interrupted continues in the background.
            if !machine.is_closing()
                && let Err(error) = machine.close_interruptibly(py)
            {
                error.write_unraisable(py, None);
            }
            py.detach(|| drop(machine));
        });
    }
}

impl PyKvmVm {
    pub(super) fn vm(&self) -> Result<Arc<KvmVm<Handler>>> {
        self.machine.get()?.get()
    }

    fn of(
        py: Python<'_>,
        vm: KvmVm<Handler>,
        python_handler: Option<Arc<PythonHandler>>,
        router: Arc<ExitRouter>,
        entry: u64,
        serial: Option<Arc<Serial>>,
    ) -> Self {
        let fixups = Arc::clone(vm.fixups());
        let machine = Arc::new(Machine::new(vm));
        registry::register(py, Arc::downgrade(&machine) as Weak<dyn Close>);
        let machine = Owned::new("machine", machine);
        let parts = Parts::default();
        Self { machine, python_handler, router, fixups, entry, serial, parts }
    }

    /// Raise what the exit handler's `kick()` raised, once.
    fn check_kick(&self) -> PyResult<()> {
        self.python_handler.as_ref().map_or(Ok(()), |handler| handler.check())
    }
}

/// A machine without a loop has nothing to serve streams.
fn check_streams(config: &VmmConfig) -> Result<()> {
    let mut ports = std::iter::once(&config.serial).chain(config.others.iter().flatten());
    if ports.any(|port| port.output.is_some() || port.input.is_some()) {
        let detail =
            "a KvmVm has no event loop to serve streams; use Vmm, or serial.send() and read()";
        return Err(Error::new(ErrorKind::Config, "serial", detail));
    }
    Ok(())
}

#[pymethods]
impl PyKvmVm {
    #[new]
    #[pyo3(signature = (config = None, exit_handler = None))]
    fn new(
        py: Python<'_>,
        config: Option<&Bound<'_, PyAny>>,
        exit_handler: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        guard_thread();
        let (handler, python_handler) = match exit_handler {
            Some(object) => handler(object)?,
            None => {
                let new = WrappedExitHandler::new();
                let new = new.map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?;
                (Handler::Native(new), None)
            }
        };
        let Some(config) = config else {
            let vm = py.detach(|| KvmVm::bare(handler))?;
            return Ok(Self::of(py, vm, python_handler, Arc::default(), 0, None));
        };
        let config = config::from_python(config)?;
        check_streams(&config)?;
        let (vm, entry, router, serial) = interrupt::interruptible(py, |interrupted| {
            config.validate()?;
            let memory = GuestMemory::new(config.memory.size_mib << 20)?;
            claim_platform(memory.resources(), &config.platform())?;
            let start = boot::load(&config, &memory, &[], interrupted)?;
            let router = Arc::new(ExitRouter::default());
            let vm = KvmVm::new(&config, memory, start, Arc::clone(&router), handler)?;
            let files = boot::fw_cfg_files(&config, interrupted)?;
            let facts = MachineFacts::of(&config, vm.memory(), files);
            let platform = config.platform();
            let (buses, streams) = (&router.buses, Streams::default());
            let attached =
                devices::attach(buses, |line| vm.irq(line), &streams, &platform, &facts)?;
            Ok::<_, Error>((vm, start.entry, router, attached.serial))
        })?;
        Ok(Self::of(py, vm, python_handler, router, entry, Some(serial)))
    }

    /// Add a vCPU to a machine that has not run.
    ///
    /// It is in KVM's initial state: at the reset vector, with an empty `cpuid`.
    ///
    /// Raises:
    ///     KvmError: the number is already used, or KVM refuses it.
    ///     StateError: the machine has run, or is closed.
    #[pyo3(signature = (id = 0))]
    fn create_vcpu<'py>(slf: &Bound<'py, Self>, id: u64) -> PyResult<Bound<'py, PyVcpu>> {
        let vm = slf.get().vm()?;
        let handle = slf.py().detach(|| vm.create_vcpu(id))?;
        PyVcpu::of_machine(slf.as_any(), &handle, &slf.get().parts)
    }

    /// Start a thread `vcpu_{id}` for each vCPU and return.
    ///
    /// With an address, the vCPUs start there. Otherwise they start at `entry`, or continue where
    /// they stopped.
    ///
    /// Raises:
    ///     StateError: the machine is running, its guest has ended, or it is closed.
    #[pyo3(signature = (vcpu_run_addr = None))]
    fn run(&self, py: Python<'_>, vcpu_run_addr: Option<u64>) -> PyResult<()> {
        let vm = self.vm()?;
        let address = vcpu_run_addr.or_else(|| vm.first_address(self.entry));
        prepare_vcpu_threads(py);
        Ok(py.detach(|| vm.run(address))?)
    }

    /// Wait until the machine no longer runs, and return how the guest ended. Return None after the
    /// timeout.
    ///
    /// Raises:
    ///     StateError: the call was made from the exit handler, on the thread of one of its vCPUs.
    ///     Exception: the exception raised by the exit handler's `kick`.
    #[pyo3(signature = (timeout = None))]
    fn wait<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let vm = self.vm()?;
        let deadline = deadline_of(exit::timeout(timeout)?);
        let ends = [VmRunState::Exiting, VmRunState::Paused, VmRunState::Closed];
        loop {
            let found = py.detach(|| {
                wakeup::wait(deadline, |until, interrupt| {
                    vm.wait_for_or(&ends, until, interrupt).transpose()
                })
            })?;
            let found = found.transpose()?;
            py.check_signals()?;
            self.check_kick()?;
            if found.is_some() || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return self.exit(py);
            }
        }
    }

    /// Stop all vCPUs and wait until they are out of the guest. Does nothing if the machine is
    /// already paused.
    ///
    /// Raises:
    ///     StateError: the machine is not running.
    ///     WaitTimeoutError: a vCPU did not leave its guest within `timeout` seconds. The machine
    ///         continues.
    #[pyo3(signature = (timeout = None))]
    fn pause(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let vm = self.vm()?;
        interrupt::limited(py, timeout, |limit| vm.pause(limit))
    }

    /// Continue the vCPUs that `pause` stopped. Does nothing if they are running.
    ///
    /// Raises:
    ///     StateError: the machine has been shut down, or the guest has ended.
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        let vm = self.vm()?;
        Ok(py.detach(|| vm.resume())?)
    }

    /// The vCPUs, by number; the same objects each time. Before the first run their RIP is `entry`.
    #[getter]
    fn vcpus<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let (this, vm) = (slf.get(), slf.get().vm()?);
        let handles = slf.py().detach(|| vm.prepare(this.entry).map(|()| vm.handles()))?;
        vcpu::to_python(slf.as_any(), &handles, &this.parts)
    }

    /// Guest memory, by guest-physical address; the same object each time, which keeps the machine
    /// alive.
    #[getter]
    fn memory<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyGuestMemory>> {
        let (py, machine) = (slf.py(), slf.get().machine.get()?);
        let parts = &slf.get().parts;
        parts.get_or_make(py, Part::Memory, || {
            let memory = PyGuestMemory::of(slf.as_any(), machine, Machine::memory, &parts.tracker);
            Bound::new(py, memory)
        })
    }

    /// Stop the vCPUs and wait for callbacks in progress. If the guest has not ended, `run`
    /// continues it.
    ///
    /// An exception of a signal handler, such as Ctrl-C's, ends the wait; the vCPUs are stopped.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        let vm = self.vm()?;
        interrupt::limited(py, None, |limit| vm.shutdown(limit))?;
        self.check_kick()
    }

    /// Shut down and release all resources. A second call does nothing.
    ///
    /// An exception of a signal handler, such as Ctrl-C's, is raised here. The machine is still
    /// closed, and another `close` waits for that.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(machine) = self.machine.peek() else { return Ok(()) };
        machine.close_interruptibly(py)
    }

    /// The machine's run state.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        exit::state(py, self.machine.get()?.state())
    }

    /// How the guest ended, or None if it has not ended.
    #[getter]
    fn exit<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.vm()?.exit().map(|exit| exit::to_python(py, &exit)).transpose()
    }

    /// The first serial port; the same object each time, which keeps the machine alive.
    ///
    /// Raises:
    ///     StateError: the machine was created without a configuration.
    #[getter]
    fn serial<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PySerial>> {
        let none = || Error::new(ErrorKind::State, "serial", "a bare machine has no devices");
        let core = slf.get().machine.get()?;
        let serial = slf.get().serial.clone().ok_or_else(none)?;
        let parts = &slf.get().parts;
        parts.get_or_make(slf.py(), Part::Serial("com1"), || {
            let machine = slf.as_any().clone().unbind();
            let core = Arc::downgrade(core) as Weak<dyn Close>;
            Bound::new(slf.py(), PySerial::of_machine(serial, machine, core, &parts.tracker))
        })
    }

    /// Accesses that no device answered, counted by address.
    #[getter]
    fn unanswered<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.machine.get()?;
        unanswered(py, &self.router.buses)
    }

    /// The instructions that KVM refused and pyvmm executed, counted by mnemonic: as for `Vmm`.
    #[getter]
    fn fixups(&self) -> PyResult<BTreeMap<String, u64>> {
        self.machine.get()?;
        Ok(self.fixups.all())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(
        signature = (_kind, _error, _traceback, /),
        text_signature = "($self, kind, error, traceback, /)"
    )]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: Py<PyAny>,
        _error: Py<PyAny>,
        _traceback: Py<PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        match self.machine.peek() {
            Some(machine) => format!("KvmVm(state={:?})", machine.state().name()),
            None => "KvmVm(unreachable)".into(),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        // The Arc has other owners, but there is one reference to the object, which is visited
        // here.
        self.python_handler.as_ref().map_or(Ok(()), |handler| visit.call(&handler.object))
    }
}
