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

/// A machine as it was, made by `Vmm.snapshot` or `Snapshot.load`. Nothing changes it; threads may
/// share it.
#[pyclass(frozen, weakref, name = "Snapshot", module = "pyvmm")]
#[derive(Debug)]
pub struct PySnapshot {
    core: Arc<Snapshot>,
    /// Of the machine it was taken of, as far as that is known.
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
    /// A new machine that goes on from here.
    ///
    /// The snapshot, the machine it was taken of and other forks see nothing of it.
    ///
    /// Args:
    ///     serial: the streams of its serial port; None: its output is kept for `serial.read()`.
    ///     event_manager: a loop to share with others; None for one of its own. setup: called with
    ///     the machine before its devices are given their state: adds the Python devices that the
    ///         snapshot has, and what else is the program's own: hooks, eventfds in the kernel,
    ///         subscribers.
    ///     entropy: writes new randomness into the guest before it runs: a callable that is given
    ///     the machine, or a
    ///         guest-physical address and a number of bytes, which are filled from os.urandom.
    ///         None: the fork draws the same random numbers as every other.
    ///
    /// Raises:
    ///     KvmError: KVM refused a part.
    ///     SnapshotError: the snapshot's file has been changed since it was loaded.
    ///     StateError: the snapshot has a device that this machine has not.
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

    /// So many forks, made in parallel. When one cannot be made, none is left.
    ///
    /// `changes`, if given, is called with each one's number for its arguments of `fork`, as a
    /// dict; `entropy` is that of all whose arguments have none.
    #[pyo3(signature = (count, changes = None, *, entropy = None))]
    fn fork_many<'py>(
        slf: &Bound<'py, Self>,
        count: usize,
        changes: Option<Bound<'py, PyAny>>,
        entropy: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        snapshots(slf.py())?.call_method1("fork_many", (slf, count, changes, entropy))
    }

    /// Write it to a file, which `load` reads: see docs/snapshot-format.md.
    ///
    /// Pages of zeros take no room. The file gets its name when all of it is on the disk: until
    /// then, and whatever fails, a file of that name is as it was.
    ///
    /// Args:
    ///     path: the file. base: write only the pages that differ from those of this snapshot;
    ///     loading needs it again. progress: called with how many bytes of how many have been
    ///     written; what it raises ends the writing.
    ///
    /// Raises:
    ///     OSError: (a StreamError) the file cannot be written. SnapshotError: the base's memory
    ///     has another size, a file under this snapshot has been changed, or
    ///         the state of devices is larger than 256 MiB.
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

    /// A snapshot from its file. Its pages are mapped when they are needed: it takes the same time
    /// for any size.
    ///
    /// The file must stay as it is for as long as the snapshot or a fork of it lives; `save` to the
    /// same name does not change it, but puts another in its place. What was written to it is
    /// noticed at the next fork or reset.
    ///
    /// Args:
    ///     path: the file.
    ///     base: the snapshot that the file was saved against, or its file.
    ///     force: load it although this machine lacks something of the one it was taken on.
    ///     copy: read its pages into memory: then nothing that happens to the file matters.
    ///     verify: read all pages and check their checksum. That of the rest is always checked.
    ///
    /// Raises:
    ///     SnapshotError: the file is damaged, of another version or machine, or needs another
    ///     base. OSError: (a StreamError) the file cannot be read.
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

    /// What a file holds, without loading it: sizes, ids, the machine, and each record's name,
    /// number and length.
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

    /// `function(fork, input)` for each input, on so many forks at once: what they returned, in
    /// order.
    ///
    /// Each job finds a machine that stands here, of which no other job has a part. See
    /// `pyvmm.ForkExecutor`.
    ///
    /// `entropy` is that of `fork`, new for each job. Without it a job's result depends on its
    /// input alone.
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

    /// The same machine with its memory in one piece, which shares nothing with other snapshots.
    ///
    /// Its forks need fewer mappings, and the snapshots under it may go.
    fn flatten(&self, py: Python<'_>) -> PyResult<Self> {
        let core = self.core()?;
        let core = py.detach(|| core.flatten())?;
        Ok(Self::of(core, self.config.clone_ref(py)))
    }

    /// 32 hexadecimal digits that tell it from every other; a file keeps them.
    #[getter]
    fn id(&self) -> String {
        hex(self.core.id)
    }

    /// How many vCPUs.
    #[getter]
    fn vcpus(&self) -> u16 {
        self.core.shape.vcpus
    }

    /// Bytes of guest memory.
    #[getter]
    fn memory_size(&self) -> u64 {
        self.core.memory_size()
    }

    /// Bytes of host memory that its pages take; other snapshots and machines may share them.
    #[getter]
    fn memory_bytes(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.core.allocated().0)
    }

    /// Bytes of files that its pages take.
    #[getter]
    fn file_bytes(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.core.allocated().1)
    }

    /// How many mappings each fork needs for its memory: one, and more for each layer of changes;
    /// see `flatten`.
    #[getter]
    fn mappings(&self) -> usize {
        self.core.mappings()
    }

    /// Its state beside the memory: what, of which vCPU or chip, and the bytes.
    ///
    /// Two snapshots of machines that nothing tells apart have the same, but for what time changes:
    /// `clock`, `pit`, the TSC in `msrs`, and what counts down in `lapic`.
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
    /// Everything a guest can see of this machine, to be forked, reset to and saved: vCPUs, memory,
    /// devices, clock.
    ///
    /// A running machine is paused for it and goes on. Memory is not copied: the machine goes on
    /// with private copies of the pages that it writes from now on. Of a machine whose guest has
    /// ended the snapshot goes on behind that.
    ///
    /// Raises:
    ///     StateError: the machine is closed, a device cannot be saved, memory is shared with
    ///     others, or another thread
    ///         resumed it meanwhile.
    fn snapshot(&self, py: Python<'_>) -> PyResult<PySnapshot> {
        hop!();
        let vmm = self.vmm()?;
        let core = py.detach(|| vmm.snapshot()).map_err(|e| self.device_failure(e.into()))?;
        Ok(PySnapshot::of(core, self.origin()?.config.clone_ref(py)))
    }

    /// Be what the machine was at a snapshot, in place. Returns how many pages of memory were
    /// changed for it.
    ///
    /// A machine whose guest has ended can be run again; one that is running goes on from there.
    /// What was printed since and nobody has taken is dropped.
    ///
    /// Raises:
    ///     StateError: the machine is closed, its run is ending, or the snapshot is of another
    ///     shape, device or CPUID.
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
