//! The one way into Python for a thread that may not hold the GIL.

use pyo3::prelude::*;

use crate::sync::assert_unlocked;

/// Take the GIL and call `f`. Whoever has the GIL may wait for any lock, so this thread holds none.
pub(super) fn attach<T>(f: impl for<'py> FnOnce(Python<'py>) -> T) -> T {
    assert_unlocked("Python is entered");
    Python::attach(f)
}
