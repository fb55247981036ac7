//! Long calls of the crate that Ctrl-C ends. On the thread that makes the call.

use pyo3::prelude::*;

use super::attach::attach;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

/// Make a long call without the GIL that runs Python's signal handlers now and then. What one
/// raises comes out of it.
pub(super) fn interruptible<T: Send>(
    py: Python<'_>,
    call: impl FnOnce(&dyn Fn() -> Result<()>) -> Result<T> + Send,
) -> PyResult<T> {
    let raised = Mutex::<_, rank::Interruption>::new(None);
    let result = py.detach(|| {
        call(&|| {
            let Err(error) = attach(|py| py.check_signals()) else { return Ok(()) };
            *raised.lock() = Some(error);
            Err(Error::new(ErrorKind::State, "signal", "a signal handler raised"))
        })
    });
    let raised = raised.lock().take();
    match raised {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}
