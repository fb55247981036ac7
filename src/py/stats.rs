//! The counters of a machine's exits for Python: `Vmm.stats`.

use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyList;

use super::ending::import;
use super::parts::Part;
use super::vmm::PyVmm;
use crate::vcpu::{ExitRouter, Stats};
use crate::virtio::CountValues;

/// Counters of a machine's exits, of its vCPUs' time, and of the work of its virtio devices:
/// `Vmm.stats`.
///
/// They count between `enable` and `disable`, or inside `with vmm.stats:`. They can be read at any
/// time, from any thread, also after the machine is closed. In a forked child every call raises
/// StateError.
#[pyclass(frozen, weakref, name = "Stats", module = "pyvmm")]
#[derive(Debug)]
pub struct PyStats {
    vmm: Py<PyVmm>,
}

impl PyStats {
    fn parts(&self) -> PyResult<(&Arc<Stats>, &Arc<ExitRouter>)> {
        let vmm = self.vmm.get().vmm()?;
        Ok((&vmm.instruments().stats, vmm.router()))
    }

    fn stats(&self) -> PyResult<&Arc<Stats>> {
        Ok(self.parts()?.0)
    }
}

#[pymethods]
impl PyStats {
    /// Start counting, at each vCPU's next entry to the guest. May be called while the guest runs.
    fn enable(&self, py: Python<'_>) -> PyResult<()> {
        let (stats, router) = self.parts()?;
        // A closed machine has no exits to count.
        self.vmm.get().vmm()?.vm()?;
        Ok(py.detach(|| stats.enable(router))?)
    }

    /// Stop counting. The counts are kept.
    fn disable(&self, py: Python<'_>) -> PyResult<()> {
        let (stats, router) = self.parts()?;
        Ok(py.detach(|| stats.disable(router))?)
    }

    /// Set all counters to zero.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        let stats = self.stats()?;
        Ok(py.detach(|| stats.reset())?)
    }

    /// Whether the counters are enabled.
    #[getter]
    fn enabled(&self, py: Python<'_>) -> PyResult<bool> {
        let stats = self.stats()?;
        Ok(py.detach(|| stats.is_enabled())?)
    }

    /// The exits by vCPU, kind, direction and address, as `ExitCount`s, the most frequent first.
    #[getter]
    fn exits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let stats = self.stats()?;
        let class = import(py, "pyvmm.stats")?.getattr("ExitCount")?;
        let list = PyList::empty(py);
        for (vcpu, place, count) in py.detach(|| stats.exits())? {
            let seconds = count.time.as_secs_f64();
            let row = (vcpu, place.kind, place.access, place.address, count.count, seconds);
            list.append(class.call1(row)?)?;
        }
        Ok(list)
    }

    /// The time of each vCPU, by number, as `VcpuTime`s.
    #[getter]
    fn vcpus<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let stats = self.stats()?;
        let class = import(py, "pyvmm.stats")?.getattr("VcpuTime")?;
        let list = PyList::empty(py);
        for time in py.detach(|| stats.vcpus())? {
            let (guest, host) = (time.guest.as_secs_f64(), time.host.as_secs_f64());
            list.append(class.call1((time.vcpu, time.exits, guest, host))?)?;
        }
        Ok(list)
    }

    /// The work of each virtio device, as `VirtioCount`s, in the order of `Vmm.virtio`.
    #[getter]
    fn virtio<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let stats = self.stats()?;
        let class = import(py, "pyvmm.stats")?.getattr("VirtioCount")?;
        let list = PyList::empty(py);
        for (name, count) in py.detach(|| stats.devices())? {
            let CountValues { notifications, taken, chains, interrupts, .. } = count;
            let bytes = (count.bytes_from_guest, count.bytes_to_guest);
            let row = (name, notifications, taken, chains, interrupts, bytes.0, bytes.1);
            list.append(class.call1(row)?)?;
        }
        Ok(list)
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        slf.get().enable(slf.py())?;
        Ok(slf.clone())
    }

    #[pyo3(
        signature = (_kind, _error, _traceback, /),
        text_signature = "($self, kind, error, traceback, /)"
    )]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        // A forked child leaves the block that its parent has entered.
        let Ok((stats, router)) = self.parts() else { return Ok(()) };
        let _ = py.detach(|| stats.disable(router));
        Ok(())
    }

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pyvmm.stats")?.call_method1("html", (slf,))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let Ok(stats) = self.stats() else { return Ok("Stats(unreachable)".into()) };
        let exits: u64 = py.detach(|| stats.vcpus())?.iter().map(|time| time.exits).sum();
        let counting = if self.enabled(py)? { "enabled" } else { "disabled" };
        Ok(format!("Stats({counting}, {exits} exits)"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vmm)
    }
}

#[pymethods]
impl PyVmm {
    /// Counters of exits and of the time inside and outside the guest; the same object each time.
    ///
    /// They count only while they are enabled.
    #[getter]
    fn stats<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyStats>> {
        slf.get().core()?;
        slf.get().parts.get_or_make(slf.py(), Part::Stats, || {
            Bound::new(slf.py(), PyStats { vmm: slf.clone().unbind() })
        })
    }
}
