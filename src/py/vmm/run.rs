//! A machine's run that an asyncio task awaits and can cancel. Runs on a separate thread.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::object::PyVmm;
use crate::error::{Error, ErrorKind};
use crate::event::{EventManager, NextTurn};
use crate::exit_handler::{Exit, ExitReason};
use crate::limit::Interrupted;
use crate::py::ending::import;
use crate::py::enter::prepare_vcpu_threads;
use crate::py::event::{Ownership, PyEventManager, turn};
use crate::py::{exit, interrupt};
use crate::vmm::Vmm;

/// One turn of the loop.
type Turn<'a> = dyn FnMut(NextTurn) -> PyResult<()> + 'a;

/// Ends one run of a machine, and no other run.
#[pyclass(frozen, name = "_Cancel", module = "pyvmm")]
#[derive(Debug)]
pub struct PyCancel {
    /// Dropped when the machine is closed, which ends the run.
    core: Weak<EventManager>,
    is_set: AtomicBool,
}

#[pymethods]
impl PyCancel {
    /// Request the end of the run. May be called from any thread, at any time.
    fn set(&self) -> PyResult<()> {
        // Release: pairs with the acquire of the iteration that the kick wakes.
        self.is_set.store(true, Ordering::Release);
        let Some(core) = self.core.upgrade() else { return Ok(()) };
        Ok(core.kick()?)
    }
}

impl PyCancel {
    fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }
}

impl PyVmm {
    /// Run the loop on this thread. In a shared loop, each machine's run runs it for all machines.
    /// `awaiter` takes the awaitables returned by callbacks on this thread.
    pub(in crate::py) fn claim<'a>(
        &self,
        manager: &'a Py<PyEventManager>,
        awaiter: Option<Py<PyAny>>,
    ) -> PyResult<Ownership<'a>> {
        let owners = manager.get().owners();
        if self.origin()?.is_shared {
            owners.share(awaiter)
        } else {
            owners.claim("the machine", awaiter)
        }
    }

    /// Call one of the crate's runs on this thread. It gets what asks for signals, and the turn of
    /// the loop.
    pub(in crate::py) fn run_by<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
        run: impl FnOnce(&Vmm, Option<Duration>, Interrupted<'_>, &mut Turn<'_>) -> PyResult<Exit>
        + Send,
    ) -> PyResult<Bound<'py, PyAny>> {
        let exit = self.turn_by(py, timeout, |vmm, timeout, interrupted, turn| {
            run(vmm, timeout, interrupted, turn).map(Some)
        })?;
        exit.ok_or_else(|| PyRuntimeError::new_err("a run ends with an exit"))
    }

    /// [`Self::run_by`] for a call that may return before the run has ended.
    pub(in crate::py) fn turn_by<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
        run: impl FnOnce(
            &Vmm,
            Option<Duration>,
            Interrupted<'_>,
            &mut Turn<'_>,
        ) -> PyResult<Option<Exit>>
        + Send,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let vmm = self.core()?;
        let timeout = exit::timeout(timeout)?;
        let manager = &self.manager(py)?;
        let _wanted = interrupt::interruptible(py, |interrupted| vmm.want_loop(interrupted))?;
        let pending = &self.hooks.pending;
        if let Some(exit) = pending.take_exit() {
            return Ok(Some(exit.into_bound(py)));
        }
        let _ownership = self.claim(manager, None)?;
        let _kept = self.hooks.keep_vcpus(py);
        let ended = interrupt::interruptible(py, |interrupted| {
            run(vmm, timeout, interrupted, &mut |next| turn(manager, pending, next))
        });
        self.finish(py, ended)
    }

    /// The result or exception of `run` and `wait`, including the outcomes of callbacks on vCPU
    /// threads.
    pub(in crate::py) fn finish<'py>(
        &self,
        py: Python<'py>,
        ended: PyResult<Option<Exit>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let pending = &self.hooks.pending;
        // A signal that has ended one wait is not followed by another.
        self.close_if_due(py, ended.is_ok())?;
        let exit = match ended {
            Ok(None) => return Ok(None),
            Ok(Some(exit)) => exit,
            // The stored outcome belongs to the run in progress, for which another thread waits, or
            // to the parent of a forked child.
            Err(error) if self.core().map_or(true, |vmm| vmm.is_in_run()) => return Err(error),
            Err(error) => {
                let error = pending.beside(py, error);
                // This run's, and no later one's.
                drop(pending.take_stop());
                return Err(error);
            }
        };
        pending.check(py).inspect_err(|_| drop(pending.take_stop()))?;
        if exit.reason != ExitReason::Stopped {
            // A value that has come meanwhile is the next run's, which its stop ends.
            return exit::to_python(py, &exit).map(Some);
        }
        if let Some((vcpu, value)) = pending.take_stop() {
            return exit::stopped(py, Some(vcpu), &value).map(Some);
        }
        match self.core()?.take_match() {
            Some(text) => {
                exit::stopped(py, None, PyBytes::new(py, &text).as_any().as_unbound()).map(Some)
            }
            None => exit::to_python(py, &exit).map(Some),
        }
    }
}

#[pymethods]
impl PyVmm {
    /// Create the object that ends one `_run_cancellable`.
    fn _new_cancel(&self, py: Python<'_>) -> PyResult<PyCancel> {
        let core = Arc::downgrade(&self.manager(py)?.get().shared_core());
        Ok(PyCancel { core, is_set: AtomicBool::new(false) })
    }

    /// Like `run`, for `pyvmm.aio`. Returns None after it was cancelled. `awaiter` is called with
    /// the awaitables that callbacks return.
    // Long because a run, what cancels it and what it leaves are in one place.
    fn _run_cancellable<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
        cancel: &PyCancel,
        awaiter: Py<PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let vmm = self.vmm()?;
        let timeout = exit::timeout(timeout)?;
        let manager = &self.manager(py)?;
        let _wanted = interrupt::interruptible(py, |interrupted| vmm.want_loop(interrupted))?;
        let pending = &self.hooks.pending;
        if let Some(exit) = pending.take_exit() {
            return Ok(Some(exit.into_bound(py)));
        }
        let _ownership = self.claim(manager, Some(awaiter))?;
        if cancel.is_set() {
            return Ok(None);
        }
        let _kept = self.hooks.keep_vcpus(py);
        prepare_vcpu_threads(py);
        let (ended, is_cancelled) = py.detach(|| {
            let is_cancelled = Cell::new(false);
            let check = || {
                is_cancelled.set(cancel.is_set());
                let error = || Error::new(ErrorKind::State, "run", "the run was cancelled");
                if is_cancelled.get() { Err(error()) } else { Ok(()) }
            };
            let ended = vmm.run_interruptibly(timeout, &check, |next| -> PyResult<()> {
                check()?;
                turn(manager, pending, next)?;
                Ok(check()?)
            });
            (ended, is_cancelled.get())
        });
        match ended {
            Err(_) if is_cancelled => {
                self.close_if_due(py, true)?;
                // This run's, and no later one's.
                drop(pending.take_stop());
                pending.check(py).map(|()| None)
            }
            ended => self.finish(py, ended.map(Some)),
        }
    }

    /// Run the guest like `run`, on this thread alone: it enters the guest itself.
    ///
    /// The machine must have one vCPU. Devices and exit hooks are called on this thread too. No
    /// other thread is started or waited for, which makes short runs faster. The event loop is
    /// checked every 2 ms: subscribers are called that much later than in `run`, and a device must
    /// not wait for one.
    ///
    /// Raises:
    ///     StateError: the machine has several vCPUs; otherwise as for `run`.
    ///     Exception: the first exception of a callback.
    #[pyo3(signature = (timeout = None))]
    fn run_here<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        self.run_by(py, timeout, |vmm, timeout, interrupted, turn| {
            vmm.run_here(timeout, interrupted, turn)
        })
    }

    /// Run the guest like `run`, in a running asyncio loop, which stays responsive.
    ///
    /// The guest's loop runs in its own thread.
    ///
    /// Cancelling the call stops the guest. A subscriber's `process` may be a coroutine function:
    /// it runs as a task of the asyncio loop, and its exception ends the run. When the guest has
    /// ended, running coroutines have one second to finish. Then they are cancelled, and their
    /// names are passed to the asyncio loop's exception handler.
    #[pyo3(signature = (timeout = None))]
    fn run_async<'py>(slf: &Bound<'py, Self>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().core()?;
        import(slf.py(), "pyvmm.aio")?.call_method1("run_vmm", (slf, timeout))
    }
}
