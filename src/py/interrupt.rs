//! Long calls of the crate that Ctrl-C can end. They run on the caller's thread, or in the
//! background if the call waits for something that a signal cannot end.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, channel};
use std::thread::Builder;
use std::time::Instant;

use pyo3::prelude::*;

use super::enter::{attach, call_out, prepare_vcpu_threads};
use super::exit;
use super::recorded::name_of;
use super::returned::refuse_awaitable;
use super::wakeup::{SIGNAL_CHECK_INTERVAL, runs_handlers};
use crate::error::{Error, ErrorKind, Result};
use crate::limit::Limit;
use crate::sync::{Mutex, rank};
use crate::vcpu;

/// Make a long call without the GIL that periodically runs Python's signal handlers. An exception
/// of a handler is returned.
pub(super) fn interruptible<T: Send, E: Send>(
    py: Python<'_>,
    call: impl FnOnce(&dyn Fn() -> Result<()>) -> std::result::Result<T, E> + Send,
) -> PyResult<T>
where
    PyErr: From<E>,
{
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

/// Make a call without the GIL that waits for callbacks of the program, for at most `timeout`
/// seconds. A signal handler that raises ends it.
pub(super) fn limited<T: Send>(
    py: Python<'_>,
    timeout: Option<f64>,
    call: impl FnOnce(&Limit<'_>) -> Result<T> + Send,
) -> PyResult<T> {
    let timeout = exit::timeout(timeout)?;
    interruptible(py, |interrupted| call(&Limit::new(timeout, interrupted)))
}

/// Make a call that waits for callbacks of the program. On Python's main thread, the call is made
/// in the background. If a signal handler raises, its exception is returned at once, and the call
/// continues.
pub(super) fn waiting<F: FnOnce() + Send + 'static>(py: Python<'_>, call: F) -> PyResult<()> {
    if !runs_handlers(py)? {
        py.detach(call);
        return Ok(());
    }
    match Background::start(py, call) {
        Ok(background) => {
            // Handle earlier signals too, because the call may take arbitrarily long. Only now,
            // because the call is made whatever their handlers raise.
            py.check_signals()?;
            background.wait(py, None)
        }
        Err(call) => {
            py.detach(call);
            py.check_signals()
        }
    }
}

/// Make a call in the background, and do not wait for it.
pub(super) fn in_background<F: FnOnce() + Send + 'static>(py: Python<'_>, call: F) {
    if let Err(call) = Background::start(py, call) {
        py.detach(call);
    }
}

/// A call on a separate thread, `pyvmm-close`, on which Python objects may be dropped.
pub(super) struct Background(Receiver<()>);

impl Background {
    /// # Errors
    /// Returns the call when no thread can be started, not even with the smallest stack.
    pub(super) fn start<F: FnOnce() + Send + 'static>(
        py: Python<'_>,
        call: F,
    ) -> std::result::Result<Self, F> {
        let (done, ended) = channel();
        let run = || {
            let (give, take) = channel::<F>();
            let done = done.clone();
            let run = move || {
                // Fails when the thread was not started.
                if let Ok(call) = take.recv() {
                    call();
                    // Fails if a handler has raised and the caller is no longer waiting.
                    let _ = done.send(());
                }
            };
            (give, run)
        };
        prepare_vcpu_threads(py);
        let name = || "pyvmm-close".to_owned();
        let (mut give, chosen) = run();
        if vcpu::spawn(name(), chosen).is_err() {
            let (give_smallest, smallest) = run();
            give = give_smallest;
            if Builder::new().name(name()).spawn(smallest).is_err() {
                return Err(call);
            }
        }
        drop(done);
        give.send(call).map(|()| Self(ended)).map_err(|SendError(call)| call)
    }

    /// Wait for its end, with a deadline, and run Python's signal handlers meanwhile.
    pub(super) fn wait(mut self, py: Python<'_>, deadline: Option<Instant>) -> PyResult<()> {
        while deadline.is_none_or(|deadline| Instant::now() < deadline) {
            let ended = &mut self.0;
            match py.detach(move || ended.recv_timeout(SIGNAL_CHECK_INTERVAL)) {
                Err(RecvTimeoutError::Timeout) => py.check_signals()?,
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(())
    }
}

/// Report the progress of a long call to a function, and run Python's signal handlers, on the
/// thread of that call.
pub(super) fn progress(function: Option<&Py<PyAny>>, done: u64, total: u64) -> PyResult<()> {
    attach(|py| {
        if let Some(function) = function {
            let function = function.bind(py);
            let said = call_out(py, |_| function.call1((done, total)))?;
            refuse_awaitable(&said, || name_of(function))?;
        }
        py.check_signals()
    })
}
