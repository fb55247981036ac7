//! The class `Snapshot`: its properties, and what its other parts use.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::py::ending::{self, import};
use crate::snapshot::Snapshot;

/// The state of a machine, created by `Vmm.snapshot` or `Snapshot.load`.
///
/// It never changes, and threads may share it.
#[pyclass(frozen, weakref, name = "Snapshot", module = "pyvmm")]
#[derive(Debug)]
pub struct PySnapshot {
    pub(in crate::py) core: Arc<Snapshot>,
    /// The configuration of the original machine, as far as it is known.
    #[pyo3(get)]
    pub(in crate::py) config: Py<PyAny>,
    /// The file it was loaded from, or None.
    #[pyo3(get)]
    pub(super) path: Option<PathBuf>,
    /// The base of that file.
    pub(super) base: Option<Py<Self>>,
    /// Whether it was loaded although this host lacks something.
    pub(super) is_forced: bool,
}

impl PySnapshot {
    pub(crate) fn of(core: Snapshot, config: Py<PyAny>) -> Self {
        Self { core: Arc::new(core), config, path: None, base: None, is_forced: false }
    }

    /// # Errors
    /// [`ErrorKind::State`](crate::error::ErrorKind::State) while the interpreter finalizes. A
    /// forked child may use a snapshot, because it never changes and never waits for another
    /// thread.
    pub(crate) fn core(&self) -> PyResult<&Snapshot> {
        ending::check()?;
        Ok(&self.core)
    }
}

#[pymethods]
impl PySnapshot {
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
    pub(super) fn id(&self) -> String {
        hex(self.core.id)
    }

    /// The number of vCPUs.
    #[getter]
    fn vcpus(&self) -> u16 {
        self.core.spec.vcpus
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

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        crate::py::notebook::html(slf, "snapshot")
    }
}

pub(super) fn hex(id: [u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The part of the binding that is written in Python.
pub(in crate::py) fn snapshots(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    import(py, "pyvmm.snapshots")
}
