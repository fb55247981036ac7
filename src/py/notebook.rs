//! How native objects look in a notebook: `pyvmm.notebook` makes the tables.

use pyo3::prelude::*;

use super::ending::import;

/// The HTML of an object: what the function of `pyvmm.notebook` with this name returns.
pub(in crate::py) fn html<'py, T>(
    object: &Bound<'py, T>,
    name: &str,
) -> PyResult<Bound<'py, PyAny>> {
    import(object.py(), "pyvmm.notebook")?.call_method1(name, (object.as_any(),))
}
