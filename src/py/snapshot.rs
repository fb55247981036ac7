//! `Snapshot` for Python: the crate's snapshot, the configuration it was taken with, and the file
//! it came from.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use super::ending::import;
use super::event::PyEventManager;
use super::vmm::{PyVmm, close};
use super::{config, ending, interrupt};
use crate::config::SerialConfig;
use crate::hop::hop;
use crate::snapshot::{Device, Host, Kind, Load, Snapshot, described, inspect, load};
use crate::vm::Shape;
use crate::vmm::ForkConfig;
use crate::vmm::Vmm;

/// The state of a machine, created by `Vmm.snapshot` or `Snapshot.load`.
///
/// It never changes, and threads may share it.
#[pyclass(frozen, weakref, name = "Snapshot", module = "pyvmm")]
#[derive(Debug)]
pub struct PySnapshot {
    core: Arc<Snapshot>,
    /// The configuration of the original machine, as far as it is known.
    #[pyo3(get)]
    config: Py<PyAny>,
    /// The file it was loaded from, or None.
    #[pyo3(get)]
    path: Option<PathBuf>,
    /// What that file was saved against.
    base: Option<Py<Self>>,
    /// It was loaded although this machine lacks something.
    is_forced: bool,
}

impl PySnapshot {
    pub(super) fn of(core: Snapshot, config: Py<PyAny>) -> Self {
        Self { core: Arc::new(core), config, path: None, base: None, is_forced: false }
    }

    /// # Errors
    /// [`ErrorKind::State`](crate::error::ErrorKind::State) where the interpreter ends. A forked
    /// child may use it: nothing changes it, and nothing of it waits for another thread.
    pub(super) fn core(&self) -> PyResult<&Snapshot> {
        ending::check()?;
        Ok(&self.core)
    }
}

#[pymethods]
impl PySnapshot {
    /// Create a new machine that continues from this snapshot.
    ///
    /// The fork does not affect the snapshot, the original machine or other forks.
    ///
    /// Args:
    ///     serial: the streams of its serial port; None keeps the output for `serial.read()`.
    ///     event_manager: a loop shared with others; None creates one.
    ///     setup: called with the machine before the devices are restored. It adds the Python
    ///         devices of the snapshot, and hooks, eventfds and subscribers if the program uses
    ///         them.
    ///     entropy: writes new randomness to the guest before it runs: a callable that takes the
    ///         machine, or a guest-physical address and a number of bytes that are filled from
    ///         os.urandom. With None, every fork draws the same random numbers.
    ///
    /// Raises:
    ///     KvmError: KVM refused a part.
    ///     SnapshotError: the snapshot's file has changed since it was loaded.
    ///     StateError: the snapshot has a device that this machine does not have.
    #[pyo3(signature = (*, serial = None, event_manager = None, setup = None, entropy = None))]
    fn fork(
        &self,
        py: Python<'_>,
        serial: Option<Bound<'_, PyAny>>,
        event_manager: Option<Py<PyEventManager>>,
        setup: Option<Bound<'_, PyAny>>,
        entropy: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyVmm>> {
        hop!();
        let core = self.core()?;
        let streams = match &serial {
            Some(serial) => config::serial_from_python(serial.clone())?,
            None => SerialConfig::default(),
        };
        let has_python_streams = config::has_python_streams(&streams);
        let shared = event_manager.as_ref().map(|manager| manager.get().shared_core());
        let changes = ForkConfig { serial: streams, event_manager: shared };
        let vmm = Arc::new(py.detach(|| Vmm::fork(core, changes))?);
        let config = match &serial {
            Some(serial) => {
                let replace = import(py, "msgspec.structs")?.getattr("replace")?;
                let changes = PyDict::new(py);
                changes.set_item(intern!(py, "serial"), serial)?;
                replace.call((&self.config,), Some(&changes))?
            }
            None => self.config.bind(py).clone(),
        };
        let fork = Py::new(py, PyVmm::of(&config, vmm, event_manager, has_python_streams)?)?;
        let complete = || {
            if let Some(setup) = setup {
                setup.call1((&fork,))?;
            }
            let vmm = fork.get().core()?;
            py.detach(|| vmm.restore_devices(core))
                .map_err(|e| fork.get().device_failure(e.into()))?;
            let stir = |entropy| fork.bind(py).call_method1(intern!(py, "_stir"), (entropy,));
            entropy.map_or(Ok(()), |entropy| stir(entropy).map(drop))
        };
        match complete() {
            Ok(()) => Ok(fork),
            Err(error) => {
                // Not when the last traceback that names it goes.
                if let Ok(vmm) = fork.get().core()
                    && let Err(signalled) = close(py, vmm)
                {
                    return Err(signalled);
                }
                Err(error)
            }
        }
    }

    /// Create `count` forks in parallel. If one fails, all are closed.
    ///
    /// `changes`, if given, is called with the number of each fork and returns a dict of arguments
    /// for `fork`. `entropy` applies to the forks whose arguments do not include it.
    #[pyo3(signature = (count, changes = None, *, entropy = None))]
    fn fork_many<'py>(
        slf: &Bound<'py, Self>,
        count: usize,
        changes: Option<Bound<'py, PyAny>>,
        entropy: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        snapshots(slf.py())?.call_method1("fork_many", (slf, count, changes, entropy))
    }

    /// Write the snapshot to a file for `load`: see docs/snapshot-format.md.
    ///
    /// Pages of zeros take no space. The file gets its name once all data is on disk; until then,
    /// and after any error, an existing file of that name is unchanged.
    ///
    /// Args:
    ///     path: the file.
    ///     base: write only the pages that differ from this snapshot; loading needs it again.
    ///     progress: called with the number of bytes written and the total; an exception that it
    ///         raises ends the save.
    ///
    /// Raises:
    ///     OSError: (a StreamError) the file cannot be written.
    ///     SnapshotError: the base's memory has another size, a file of this snapshot has changed,
    ///         or the state of the devices exceeds 256 MiB.
    #[pyo3(signature = (path, base = None, progress = None))]
    fn save(
        &self,
        py: Python<'_>,
        path: PathBuf,
        base: Option<&Self>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let (core, base) = (self.core()?, base.map(Self::core).transpose()?);
        let tell = |done, total| interrupt::progress(progress.as_ref(), done, total);
        py.detach(|| core.save(&path, base, tell))
    }

    /// Load a snapshot from its file. Pages are mapped on demand, so the time does not depend on
    /// the size.
    ///
    /// The file must not change while the snapshot or one of its forks is alive. `save` to the same
    /// name is safe, because it creates a new file. A change is detected at the next fork or reset.
    ///
    /// Args:
    ///     path: the file.
    ///     base: the snapshot that the file was saved against, or its file.
    ///     force: load it although this host lacks something that the original one had.
    ///     copy: read the pages to memory; the file may then change.
    ///     verify: read all pages and check their checksum. The other checksums are always checked.
    ///
    /// Raises:
    ///     SnapshotError: the file is damaged, of another version or host, or needs another base.
    ///     OSError: (a StreamError) the file cannot be read.
    #[staticmethod]
    #[pyo3(signature = (path, base = None, *, force = false, copy = false, verify = false))]
    fn load(
        py: Python<'_>,
        path: PathBuf,
        base: Option<Bound<'_, PyAny>>,
        force: bool,
        copy: bool,
        verify: bool,
    ) -> PyResult<Self> {
        ending::check()?;
        let base: Option<Py<Self>> = match base {
            None => None,
            Some(base) => Some(match base.cast::<Self>() {
                Ok(base) => base.clone().unbind(),
                Err(_) => Py::new(py, Self::load(py, base.extract()?, None, force, copy, verify)?)?,
            }),
        };
        let of = base.as_ref().map(|base| base.get().core()).transpose()?;
        let core = py.detach(|| load(&path, &Load { base: of, force, copy, verify }))?;
        let shape = core.shape;
        let config = snapshots(py)?.call_method1(
            "config_of",
            (
                core.memory_size(),
                shape.vcpus,
                shape.exit_port,
                shape.irqchip,
                shape.pit,
                shape.fixups,
            ),
        )?;
        let path = std::path::absolute(&path).unwrap_or(path);
        let (core, config) = (Arc::new(core), config.unbind());
        Ok(Self { core, config, path: Some(path), base, is_forced: force })
    }

    /// Describe a file without loading it: sizes, ids, the machine, and each record's name, number
    /// and length.
    ///
    /// Raises:
    ///     SnapshotError: the file is damaged, or of another version.
    #[staticmethod]
    fn inspect(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
        let (header, records) = py.detach(|| inspect(&path))?;
        let found = PyDict::new(py);
        let pages = header.file_length - header.pages;
        found.set_item("id", hex(header.id))?;
        found.set_item("base", (header.base != [0; 16]).then(|| hex(header.base)))?;
        found.set_item("file_bytes", header.file_length)?;
        found.set_item("page_bytes", pages)?;
        let (mut list, mut ranges, mut devices) = (Vec::new(), Vec::new(), Vec::new());
        for record in &records {
            list.push((record.kind.name(), record.number, record.bytes.len()));
            match record.kind {
                Kind::Shape => {
                    let shape = Shape::decode(&record.bytes)?;
                    found.set_item("vcpus", shape.vcpus)?;
                    found.set_item("irqchip", shape.irqchip)?;
                    found.set_item("pit", shape.pit)?;
                    found.set_item("fixups", shape.fixups)?;
                    found.set_item("exit_port", shape.exit_port)?;
                }
                Kind::Host => {
                    let host = Host::decode(&record.bytes)?;
                    found.set_item("pyvmm", &host.version)?;
                    found.set_item("processor", host.vendor())?;
                }
                Kind::Device => devices.push(Device::decode(&record.bytes)?.place()),
                Kind::Range => ranges.push(described(&record.bytes)?),
                _ => {}
            }
        }
        found.set_item("ranges", ranges)?;
        found.set_item("devices", devices)?;
        found.set_item("records", list)?;
        Ok(found)
    }

    /// Call `function(fork, input)` for each input, on several forks at once, and return the
    /// results in order.
    ///
    /// Each job starts from this snapshot and is isolated from other jobs. See
    /// `pyvmm.ForkExecutor`.
    ///
    /// `entropy` is the same as for `fork`, and is written again for each job. Without it, the
    /// result of a job depends only on its input.
    ///
    /// Raises:
    ///     TimeoutError: a job took longer than `timeout` seconds.
    ///     Exception: the first exception of a job.
    #[pyo3(signature = (function, inputs, *, workers = None, timeout = None, entropy = None))]
    fn map<'py>(
        slf: &Bound<'py, Self>,
        function: Bound<'py, PyAny>,
        inputs: Bound<'py, PyAny>,
        workers: Option<usize>,
        timeout: Option<f64>,
        entropy: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments = (slf, function, inputs, workers, timeout, entropy);
        snapshots(slf.py())?.call_method1("map_inputs", arguments)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let Some(path) = &self.path else {
            let text = "a snapshot is pickled by its file: save() it and pickle what load() gives";
            return Err(PyTypeError::new_err(text));
        };
        let base = self.base.as_ref().map(|base| base.clone_ref(py));
        let arguments = (path, base, self.id(), self.is_forced);
        (snapshots(py)?.getattr("unpickled")?, arguments).into_pyobject(py)
    }

    /// Return the same snapshot with its memory in one piece, which shares nothing with other
    /// snapshots.
    ///
    /// Its forks need fewer mappings, and the snapshots that it was based on can be released.
    fn flatten(&self, py: Python<'_>) -> PyResult<Self> {
        let core = self.core()?;
        let core = py.detach(|| core.flatten())?;
        Ok(Self::of(core, self.config.clone_ref(py)))
    }

    /// 32 hexadecimal digits that identify the snapshot; a file keeps them.
    #[getter]
    fn id(&self) -> String {
        hex(self.core.id)
    }

    /// The number of vCPUs.
    #[getter]
    fn vcpus(&self) -> u16 {
        self.core.shape.vcpus
    }

    /// The number of bytes of guest memory.
    #[getter]
    fn memory_size(&self) -> u64 {
        self.core.memory_size()
    }

    /// The number of bytes of host memory that its pages use. Other snapshots and machines may
    /// share them.
    #[getter]
    fn memory_bytes(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.core.allocated().0)
    }

    /// The number of bytes of files that its pages use.
    #[getter]
    fn file_bytes(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.core.allocated().1)
    }

    /// The number of mappings that each fork needs for its memory: one, and more for each layer of
    /// changes.
    ///
    /// See `flatten`.
    #[getter]
    fn mappings(&self) -> usize {
        self.core.mappings()
    }

    /// The state other than memory: the name of each record, its vCPU or chip, and its bytes.
    ///
    /// Snapshots of two identical machines have the same state, except for what depends on time:
    /// `clock`, `pit`, the TSC in `msrs`, and the counter in `lapic`.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let vcpus = self.core.vcpus.iter().flatten();
        let records = vcpus.chain(&self.core.chips);
        let mut all = Vec::new();
        for record in records {
            let bytes = PyBytes::new(py, &record.bytes);
            all.push((record.kind.name(), u64::from(record.number), bytes).into_pyobject(py)?);
        }
        for device in &self.core.devices {
            let bytes = PyBytes::new(py, &device.state);
            all.push((device.place(), device.length, bytes).into_pyobject(py)?);
        }
        PyTuple::new(py, all)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.config)?;
        visit.call(&self.base)
    }

    fn __repr__(&self) -> String {
        let mib = self.core.memory_size() >> 20;
        format!("Snapshot(id={:?}, vcpus={}, memory={mib} MiB)", self.id(), self.vcpus())
    }
}

#[pymethods]
impl PyVmm {
    /// Capture everything that a guest can see of this machine: vCPUs, memory, devices, clock.
    ///
    /// The result can be forked, saved, and reset to.
    ///
    /// A running machine is paused meanwhile. Memory is not copied: the machine continues with
    /// private copies of the pages that it writes from now on. If the guest has ended, the snapshot
    /// continues after the instruction that ended it.
    ///
    /// Raises:
    ///     StateError: the machine is closed, a device cannot be saved, memory is shared with
    ///         others, or another thread resumed the machine meanwhile.
    fn snapshot(&self, py: Python<'_>) -> PyResult<PySnapshot> {
        hop!();
        let vmm = self.vmm()?;
        let core = py.detach(|| vmm.snapshot()).map_err(|e| self.device_failure(e.into()))?;
        Ok(PySnapshot::of(core, self.origin()?.config.clone_ref(py)))
    }

    /// Restore the state of a snapshot in place. Return the number of memory pages that changed.
    ///
    /// If the guest has ended, the machine can be run again. If it is running, it continues from
    /// the snapshot. Output that was not collected is dropped.
    ///
    /// Raises:
    ///     StateError: the machine is closed, its run is ending, or the snapshot has another shape,
    ///         device or CPUID.
    fn reset(&self, py: Python<'_>, snapshot: &PySnapshot) -> PyResult<u64> {
        let (vmm, snapshot) = (self.core()?, snapshot.core()?);
        let changed = py.detach(|| vmm.reset(snapshot));
        changed.map_err(|e| self.device_failure(e.into()))
    }
}

fn hex(id: [u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn snapshots(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    import(py, "pyvmm.snapshots")
}
