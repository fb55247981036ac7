//! The console of a serial port for `pyvmm.console`: what has been printed, and `expect`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::ending::import;
use super::owned::Owned;
use super::serial::PySerial;
use crate::devices::OutputWatch;
use crate::error::Result;

/// A thread's wait for the output of a serial port.
#[pyclass(frozen, name = "_OutputWatch", module = "pyvmm")]
#[derive(Debug)]
pub struct PyOutputWatch(Owned<OutputWatch>);

impl PyOutputWatch {
    pub(super) fn get(&self) -> Result<&OutputWatch> {
        self.0.get()
    }
}

#[pymethods]
impl PyOutputWatch {
    /// The position of the output since the last call, and its bytes.
    fn look<'py>(&self, py: Python<'py>) -> PyResult<(u64, Bound<'py, PyBytes>)> {
        let watch = self.0.get()?;
        let news = py.detach(|| watch.look());
        Ok((news.position, PyBytes::new(py, &news.bytes)))
    }

    /// The output up to this position is matched.
    fn match_up_to(&self, py: Python<'_>, position: u64) -> PyResult<()> {
        let watch = self.0.get()?;
        py.detach(|| watch.match_up_to(position));
        Ok(())
    }

    /// End the wait. May be called from any thread.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        let watch = self.0.get()?;
        py.detach(|| watch.cancel());
        Ok(())
    }

    /// Whether it was cancelled.
    fn is_cancelled(&self) -> PyResult<bool> {
        Ok(self.0.get()?.is_cancelled())
    }
}

impl PySerial {
    /// Call a function of `pyvmm.console` that waits for a pattern.
    pub(super) fn await_pattern<'py>(
        slf: &Bound<'py, Self>,
        function: &str,
        pattern: &Bound<'py, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let machine = slf.get().machine(slf.py());
        let console = import(slf.py(), "pyvmm.console")?;
        console.call_method1(function, (machine, slf, pattern, timeout))
    }
}

#[pymethods]
impl PySerial {
    /// For `pyvmm.console`: the position of the oldest output that is kept, the output from there
    /// on, and the position up to which it is matched.
    fn _kept<'py>(&self, py: Python<'py>) -> PyResult<(u64, Bound<'py, PyBytes>, u64)> {
        let port = self.bytes()?;
        let (kept, matched) = py.detach(|| port.kept());
        Ok((kept.position, PyBytes::new(py, &kept.bytes), matched))
    }

    /// For `pyvmm.console`: a wait of this thread for output.
    fn _watch(&self, py: Python<'_>) -> PyResult<PyOutputWatch> {
        let port = self.bytes()?;
        let watch = py.detach(|| OutputWatch::new(port))?;
        Ok(PyOutputWatch(Owned::new("serial port", watch)))
    }

    /// How many threads wait for output, for tests.
    fn _watches(&self, py: Python<'_>) -> PyResult<usize> {
        let port = self.bytes()?;
        Ok(py.detach(|| port.watches()))
    }

    /// For `pyvmm.console`: end the run at the byte that completes one of these texts. Output that
    /// is not matched counts. No texts cancel the request.
    fn _run_until(&self, py: Python<'_>, texts: Vec<Vec<u8>>) -> PyResult<bool> {
        let port: &Arc<_> = self.bytes()?;
        Ok(py.detach(|| port.run_until(texts)))
    }

    /// Wait until the console shows a pattern, and return the match.
    ///
    /// Output that an earlier call has matched, and everything before it, does not count. The match
    /// takes nothing from the configured output or `take_output`. docs/console.md describes
    /// machines that are run by other threads, several waiters, and the limits.
    ///
    /// If no thread runs the machine, this call runs the event loop. If the machine is not running,
    /// it is started, and continues to run after the match: another `expect`, `wait` or `run`
    /// continues the loop.
    ///
    /// Args:
    ///     pattern: bytes or str for that text, a compiled regular expression of either, or a list
    ///         or tuple of these. The earliest match counts, then the first pattern in the list.
    ///     timeout: seconds; None means no limit.
    ///
    /// Raises:
    ///     ExpectTimeoutError: nothing matched in this time; the guest keeps running. It shows the
    ///         last lines of the console.
    ///     GuestEndedError: the run ended before a match; it says how.
    ///     StateError: a callback of the machine made the call, or the machine is a `KvmVm`.
    ///     ClosedError: the machine is closed.
    ///     Exception: the first exception of a callback, if this call runs the loop.
    #[pyo3(signature = (pattern, timeout = None))]
    fn expect<'py>(
        slf: &Bound<'py, Self>,
        pattern: &Bound<'py, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::await_pattern(slf, "expect", pattern, timeout)
    }

    /// `expect` in a running asyncio loop, which stays responsive. Cancelling it does not stop the
    /// guest.
    #[pyo3(signature = (pattern, timeout = None))]
    fn expect_async<'py>(
        slf: &Bound<'py, Self>,
        pattern: &Bound<'py, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::await_pattern(slf, "expect_async", pattern, timeout)
    }

    /// Send a line of input: the text, as UTF-8 if it is a str, and `end`.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (text = None, *, end = None), text_signature = "($self, text='', *, end='\\n')")]
    fn sendline(
        slf: &Bound<'_, Self>,
        text: Option<Bound<'_, PyAny>>,
        end: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let py = slf.py();
        let end = match end {
            Some(end) => end,
            None => "\n".into_pyobject(py)?.into_any(),
        };
        let line = import(py, "pyvmm.console")?.call_method1("line", (text, end))?;
        slf.call_method1("send", (line,)).map(drop)
    }
}
