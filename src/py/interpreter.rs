//! The import of the module, into the main interpreter alone.
//!
//! Classes and cached objects are one for the process, and the threads of vCPUs call Python in the
//! main interpreter: a subinterpreter's objects must reach neither. So it is refused before
//! anything is made in it.

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;

const REFUSED: &str = "pyvmm runs in the main interpreter alone, and cannot be imported in a subinterpreter; use threads, or \
                       processes of multiprocessing";

unsafe extern "C" {
    /// The initialization that pyo3 has written.
    #[link_name = "PyInit__native"]
    fn init() -> *mut ffi::PyObject;
}

fn check() -> PyResult<()> {
    // SAFETY: Python calls this as it imports the module, with the GIL held.
    let number = unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) };
    if number == 0 { Ok(()) } else { Err(PyImportError::new_err(REFUSED)) }
}

/// What Python calls to import the module.
///
/// # Safety
/// Python alone calls it, with the GIL held.
#[unsafe(no_mangle)]
#[expect(unreachable_pub, reason = "Python finds it by its symbol")]
pub unsafe extern "C" fn PyInit__pyvmm() -> *mut ffi::PyObject {
    // SAFETY: the caller has the GIL.
    let py = unsafe { Python::assume_attached() };
    match check() {
        // SAFETY: as for this function.
        Ok(()) => unsafe { init() },
        Err(error) => {
            error.restore(py);
            std::ptr::null_mut()
        }
    }
}

/// The module has been made. Python 3.13 and newer make the definition in the main interpreter in
/// any case.
pub(crate) fn prepare() -> PyResult<()> {
    super::ending::prepare();
    check()
}
