//! The elements of a sequence that the program passes. Called with the GIL held.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PySequence, PyString};

/// More elements than any of these sequences may have.
const MAX_ITEMS: usize = 1 << 16;

/// The elements. pyo3's `Vec` reserves memory for the length that the object claims, and a claim
/// that is too large ends the process.
#[derive(Debug)]
pub(super) struct Items<T>(pub(super) Vec<T>);

impl<'py, T: FromPyObjectOwned<'py>> FromPyObject<'_, 'py> for Items<T> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyString>() || object.cast::<PySequence>().is_err() {
            let class = object.get_type().name()?.to_string();
            return Err(PyTypeError::new_err(format!("expected a sequence, not {class}")));
        }
        let mut items = Vec::new();
        for item in object.try_iter()? {
            if items.len() == MAX_ITEMS {
                return Err(PyValueError::new_err(format!("more than {MAX_ITEMS} elements")));
            }
            items.push(item?.extract().map_err(Into::into)?);
        }
        Ok(Self(items))
    }
}
