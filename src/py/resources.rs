//! The resources of a machine for Python: `Vmm.resources` and `KvmVm.resources`.

use pyo3::prelude::*;
use pyo3::types::PyList;

use super::ending::import;
use super::vm::PyKvmVm;
use super::vmm::PyVmm;
use crate::resources::Resource;

#[pymethods]
impl PyVmm {
    /// The owner of each range of addresses, ports and lines: memory, devices, KVM's own chips,
    /// eventfds.
    ///
    /// The list is sorted by kind and start, and follows the memory and devices that are added and
    /// removed. Ranges never overlap, except shared ones: an overlapping addition is refused.
    ///
    /// Raises:
    ///     StateError: the machine is closed, or the process is a forked child.
    #[getter]
    fn resources<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        to_python(py, &self.core()?.vm()?.resources()?)
    }
}

#[pymethods]
impl PyKvmVm {
    /// The owner of each range of addresses, ports and lines: memory, devices, KVM's own chips,
    /// eventfds.
    ///
    /// The list is sorted by kind and start, and follows the memory and devices that are added and
    /// removed. Ranges never overlap, except shared ones: an overlapping addition is refused.
    ///
    /// Raises:
    ///     StateError: the machine is closed, or the process is a forked child.
    #[getter]
    fn resources<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        to_python(py, &self.vm()?.resources()?)
    }
}

fn to_python<'py>(py: Python<'py>, resources: &[Resource]) -> PyResult<Bound<'py, PyList>> {
    let class = import(py, "pyvmm.devices")?.getattr("Resource")?;
    let list = PyList::empty(py);
    for Resource { kind, start, length, name, is_shared } in resources {
        list.append(class.call1((kind.name(), start, length, name, is_shared))?)?;
    }
    Ok(list)
}
