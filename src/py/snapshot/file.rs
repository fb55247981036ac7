//! `Snapshot` and its file: saved, loaded, inspected and pickled. `src/snapshot` reads and writes
//! the file, with the GIL released.

use std::path::PathBuf;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::object::{PySnapshot, hex, snapshots};
use crate::config::PcPart;
use crate::py::{ending, interrupt};
use crate::snapshot::{DeviceState, Host, Load, RecordKind, described, inspect, load};
use crate::vm::MachineSpec;

#[pymethods]
impl PySnapshot {
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
    ///     progress: called with the number of bytes read and the total, if `copy` or `verify`
    ///         reads the pages; an exception that it raises ends the load. A base that is given as
    ///         a file is read first.
    ///
    /// Raises:
    ///     SnapshotError: the file is damaged, of another version or host, or needs another base.
    ///     OSError: (a StreamError) the file cannot be read.
    #[staticmethod]
    #[allow(clippy::too_many_arguments, reason = "its caller is Python, which has keywords")]
    #[pyo3(signature = (
        path, base = None, *, force = false, copy = false, verify = false, progress = None
    ))]
    fn load(
        py: Python<'_>,
        path: PathBuf,
        base: Option<Bound<'_, PyAny>>,
        force: bool,
        copy: bool,
        verify: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        ending::check()?;
        let again = progress.as_ref().map(|progress| progress.clone_ref(py));
        let base: Option<Py<Self>> = match base {
            None => None,
            Some(base) => Some(match base.cast::<Self>() {
                Ok(base) => base.clone().unbind(),
                Err(_) => {
                    let base = base.extract()?;
                    Py::new(py, Self::load(py, base, None, force, copy, verify, again)?)?
                }
            }),
        };
        let of = base.as_ref().map(|base| base.get().core()).transpose()?;
        let tell = |done, total| interrupt::progress(progress.as_ref(), done, total);
        let core = py.detach(|| load(&path, &Load { base: of, force, copy, verify }, tell))?;
        let spec = core.spec;
        let chips = (spec.irqchip, spec.pit);
        let config = snapshots(py)?.call_method1(
            "config_of",
            (core.memory_size(), spec.vcpus, spec.exit_port, chips, spec.fixups, part_names(&spec)),
        )?;
        let path = std::path::absolute(&path).unwrap_or(path);
        let (core, config) = (std::sync::Arc::new(core), config.unbind());
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
                RecordKind::Machine => {
                    let spec = MachineSpec::decode(&record.bytes)?;
                    found.set_item("vcpus", spec.vcpus)?;
                    found.set_item("irqchip", spec.irqchip)?;
                    found.set_item("pit", spec.pit)?;
                    found.set_item("fixups", spec.fixups)?;
                    found.set_item("exit_port", spec.exit_port)?;
                    found.set_item("parts", part_names(&spec))?;
                }
                RecordKind::Host => {
                    let host = Host::decode(&record.bytes)?;
                    found.set_item("pyvmm", &host.version)?;
                    found.set_item("processor", host.vendor())?;
                }
                RecordKind::Device => devices.push(DeviceState::decode(&record.bytes)?.place()),
                RecordKind::Range => ranges.push(described(&record.bytes)?),
                _ => {}
            }
        }
        found.set_item("ranges", ranges)?;
        found.set_item("devices", devices)?;
        found.set_item("records", list)?;
        Ok(found)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let Some(path) = &self.path else {
            let text =
                "a snapshot is pickled by its file: save() it, load() it, and pickle the result";
            return Err(PyTypeError::new_err(text));
        };
        let base = self.base.as_ref().map(|base| base.clone_ref(py));
        let arguments = (path, base, self.id(), self.is_forced);
        (snapshots(py)?.getattr("unpickled")?, arguments).into_pyobject(py)
    }
}

fn part_names(spec: &MachineSpec) -> Vec<&'static str> {
    spec.parts.iter().map(PcPart::name).collect()
}
