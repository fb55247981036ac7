//! Accesses that no device answered, for Python.

use pyo3::prelude::*;
use pyo3::types::PyList;

use super::ending::import;
use crate::devices::Buses;

/// A list of `pyvmm.Unanswered`.
pub(super) fn unanswered<'py>(py: Python<'py>, buses: &Buses) -> PyResult<Bound<'py, PyList>> {
    let class = import(py, "pyvmm.devices")?.getattr("Unanswered")?;
    let (rows, others) = buses.unanswered();
    let list = PyList::empty(py);
    for (access, address, counts) in rows {
        let bus = access.kind().name();
        list.append(class.call1((bus, address, counts.reads, counts.writes))?)?;
    }
    if others.reads + others.writes > 0 {
        list.append(class.call1(("other", py.None(), others.reads, others.writes))?)?;
    }
    Ok(list)
}
