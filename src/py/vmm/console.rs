//! `Vmm` for Python: its console as text, and waits for its output.

use pyo3::prelude::*;

use super::object::PyVmm;
use crate::limit::deadline_of;
use crate::poll;
use crate::py::console::PyOutputWatch;
use crate::py::ending::import;
use crate::py::enter::prepare_vcpu_threads;
use crate::py::event::turn;
use crate::py::serial::PySerial;
use crate::py::{exit, interrupt, wakeup};
use crate::vmm::{Turn, Watcher};

/// How a run ended: an `Exit`, or None after an exception.
type Over<'py> = (Option<Bound<'py, PyAny>>,);

#[pymethods]
impl PyVmm {
    /// The text on the console: what the guest has printed to the first serial port.
    #[getter]
    fn console<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let serial = Self::serial(slf)?;
        import(slf.py(), "pyvmm.console")?.call_method1("Console", (serial,))
    }

    /// The guest's VGA text screen. docs/pc.md describes it.
    #[getter]
    fn screen<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().core()?;
        import(slf.py(), "pyvmm.screen")?.call_method1("Screen", (slf,))
    }

    /// For `pyvmm.screen`: the first character that is shown, and the cursor's, if it is on. None
    /// without the registers of a screen.
    fn _screen(&self) -> PyResult<Option<(u16, Option<u16>)>> {
        let view = self.core()?.vga().map(|vga| vga.view());
        Ok(view.map(|view| (view.start, view.cursor)))
    }

    /// For `pyvmm.console`: wait until there is something to look at. `how`: whether to start a
    /// machine that is not running; and whether to wait as the thread that runs the machine, or
    /// beside such a thread, if there is one. Returns whether the machine is running, and how its
    /// run ended, if it is over.
    // Long because the three ways to wait are in one place.
    #[pyo3(signature = (watch, timeout, how, awaiter))]
    fn _await_output<'py>(
        &self,
        py: Python<'py>,
        watch: &PyOutputWatch,
        timeout: Option<f64>,
        how: (bool, bool),
        awaiter: Option<Py<PyAny>>,
    ) -> PyResult<(bool, Option<Over<'py>>)> {
        let (vmm, watch) = (self.core()?, watch.get()?);
        let deadline = deadline_of(exit::timeout(timeout)?);
        let (may_start, alone) = how;
        let watcher = if alone { Watcher::Alone } else { Watcher::Beside };
        let _wanted = match alone {
            true => Some(interrupt::interruptible(py, |interrupted| vmm.want_loop(interrupted))?),
            false => None,
        };
        match py.detach(|| vmm.begin_watch(watcher, may_start))? {
            Turn::Over(exit) => {
                let exit = exit.map(|exit| exit::to_python(py, &exit)).transpose()?;
                Ok((false, Some((exit,))))
            }
            Turn::Stand { is_running } => {
                py.detach(|| {
                    wakeup::wait(deadline, |until, interrupt| {
                        let fds = [watch.fd(), interrupt.unwrap_or(-1)];
                        let ready = poll::wait_for_either(fds, until);
                        ready.is_ok_and(|[is_told, _]| is_told).then_some(())
                    })
                })?;
                py.check_signals()?;
                Ok((is_running, None))
            }
            Turn::Drive(driving) => {
                let manager = &self.manager(py)?;
                let ownership = self.claim(manager, awaiter)?;
                let kept = self.hooks.keep_vcpus(py);
                let pending = &self.hooks.pending;
                prepare_vcpu_threads(py);
                if driving.must_start() {
                    pending.keep_exit(None);
                }
                let ended = interrupt::interruptible(py, |interrupted| {
                    driving.drive(watch, deadline, interrupted, |next| turn(manager, pending, next))
                });
                // The thread that wants the loop next may enter when `driving` is gone.
                drop((ownership, kept));
                py.detach(|| drop(driving));
                let exit = self.finish(py, ended)?;
                Ok((true, exit.map(|exit| (Some(exit),))))
            }
        }
    }

    /// For `pyvmm.console`: the next `run` or `wait` returns this exit of a run that has ended
    /// during a wait for output.
    fn _keep_exit(&self, exit: Py<PyAny>) {
        self.hooks.pending.keep_exit(Some(exit));
    }

    /// Run the guest until its console shows a pattern, and stop it there.
    ///
    /// Like `run`, but the result is that of `Serial.expect`, with the same patterns. The next
    /// `run` continues the guest. A machine that `expect` or `start` has started is stopped too.
    ///
    /// If all patterns are bytes or str, the guest stops after the instruction that printed the
    /// last byte. With a regular expression it stops a few milliseconds later.
    ///
    /// Raises:
    ///     ExpectTimeoutError: nothing matched within `timeout` seconds; the guest is stopped.
    ///     GuestEndedError: the run ended before a match.
    ///     StateError: another thread runs the machine; otherwise as for `run`.
    ///     Exception: the first exception of a callback.
    #[pyo3(signature = (pattern, timeout = None))]
    fn run_until<'py>(
        slf: &Bound<'py, Self>,
        pattern: &Bound<'py, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        PySerial::await_pattern(&Self::serial(slf)?, "run_until", pattern, timeout)
    }

    /// `run_until` in a running asyncio loop, which stays responsive.
    #[pyo3(signature = (pattern, timeout = None))]
    fn run_until_async<'py>(
        slf: &Bound<'py, Self>,
        pattern: &Bound<'py, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        PySerial::await_pattern(&Self::serial(slf)?, "run_until_async", pattern, timeout)
    }
}
