//! `Snapshot` forked: one machine, many, or one for each input of `map`.

use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::close::close;
use super::object::PyVmm;
use crate::config::SerialConfig;
use crate::hop::hop;
use crate::py::config;
use crate::py::config_virtio;
use crate::py::depth;
use crate::py::ending::import;
use crate::py::event::PyEventManager;
use crate::py::snapshot::PySnapshot;
use crate::snapshot::Snapshot;
use crate::vmm::{ForkConfig, Vmm};

impl PySnapshot {
    /// A configuration with another serial port, for a fork.
    fn config_with<'py>(
        &self,
        py: Python<'py>,
        serial: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let config = self.config.bind(py);
        let Some(serial) = serial else { return Ok(config.clone()) };
        let replace = import(py, "msgspec.structs")?.getattr("replace")?;
        let changes = PyDict::new(py);
        changes.set_item(intern!(py, "serial"), serial)?;
        replace.call((config,), Some(&changes))
    }
}

/// Complete a fork: run the program's setup, restore the devices and write entropy.
fn complete(
    fork: &Bound<'_, PyVmm>,
    snapshot: &Snapshot,
    setup: Option<&Bound<'_, PyAny>>,
    entropy: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let py = fork.py();
    depth::check()?;
    if let Some(setup) = setup {
        setup.call1((fork,))?;
    }
    let vmm = fork.get().core()?;
    py.detach(|| vmm.restore_devices(snapshot)).map_err(|e| fork.get().device_failure(e.into()))?;
    let write = |entropy| fork.call_method1(intern!(py, "_write_entropy"), (entropy,));
    entropy.map_or(Ok(()), |entropy| write(entropy).map(drop))
}

#[pymethods]
impl PySnapshot {
    /// Create a new machine that continues from this snapshot.
    ///
    /// The fork does not affect the snapshot, the original machine or other forks.
    ///
    /// Args:
    ///     serial: the streams of its serial port; None keeps the output for
    ///         `serial.take_output()`.
    ///     event_manager: a loop shared with others; None creates one.
    ///     setup: called with the machine before the devices are restored. It adds the Python
    ///         devices of the snapshot, and hooks, eventfds and subscribers if the program uses
    ///         them.
    ///     entropy: writes new randomness to the guest before it runs: a callable that takes the
    ///         machine, or a guest-physical address and a number of bytes that are filled from
    ///         os.urandom. With None, every fork draws the same random numbers.
    ///     virtio: configurations of virtio devices by name, such as {"disk0": Disk("other.img")},
    ///         in place of what the fork gets without it. docs/virtio.md says what that is.
    ///
    /// Raises:
    ///     ConfigError: what is given for a virtio device cannot be used, or the snapshot has no
    ///         device of the name.
    ///     KvmError: KVM refused a part.
    ///     SnapshotError: the snapshot's file has changed since it was loaded.
    ///     StateError: the snapshot has a device that this machine does not have.
    #[pyo3(signature = (*, serial = None, event_manager = None, setup = None, entropy = None, virtio = None))]
    fn fork(
        slf: &Bound<'_, Self>,
        serial: Option<Bound<'_, PyAny>>,
        event_manager: Option<Py<PyEventManager>>,
        setup: Option<Bound<'_, PyAny>>,
        entropy: Option<Bound<'_, PyAny>>,
        virtio: Option<Bound<'_, PyDict>>,
    ) -> PyResult<Py<PyVmm>> {
        hop!();
        let (py, core) = (slf.py(), slf.get().core()?);
        let streams = match &serial {
            Some(serial) => config::serial_from_python(serial.clone())?,
            None => SerialConfig::default(),
        };
        let python_streams = config::python_streams(&streams, &[]);
        let given = config_virtio::given(virtio.as_ref(), core)?;
        let shared = event_manager.as_ref().map(|manager| manager.get().shared_core());
        let changes = ForkConfig { serial: streams, event_manager: shared, virtio: given };
        let vmm = Arc::new(py.detach(|| Vmm::fork(core, changes))?);
        let mut config = slf.get().config_with(py, serial.as_ref())?;
        if let Some(virtio) = &virtio {
            config = import(py, "pyvmm.nets")?.call_method1("given", (config, virtio))?;
        }
        let fork = Py::new(py, PyVmm::of(&config, vmm, event_manager, &python_streams)?)?;
        match complete(fork.bind(py), core, setup.as_ref(), entropy.as_ref()) {
            Ok(()) => Ok(fork),
            Err(error) => {
                // Close it now, not when the last traceback that refers to it is dropped.
                if let Ok(vmm) = fork.get().core()
                    && let Err(signalled) = close(py, vmm)
                {
                    return Err(signalled);
                }
                Err(error)
            }
        }
    }

    /// Create `count` forks in parallel. If one fails, all are closed.
    ///
    /// `changes`, if given, is called with the number of each fork and returns a dict of arguments
    /// for `fork`. `entropy` applies to the forks whose arguments do not include it.
    ///
    /// Raises:
    ///     ValueError: the count is not from 0 to 1,048,576.
    #[pyo3(signature = (count, changes = None, *, entropy = None))]
    fn fork_many<'py>(
        slf: &Bound<'py, Self>,
        count: Bound<'py, PyAny>,
        changes: Option<Bound<'py, PyAny>>,
        entropy: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let parallel = import(slf.py(), "pyvmm.parallel")?;
        parallel.call_method1("fork_many", (slf, count, changes, entropy))
    }

    /// Call `function(fork, input)` for each input, on several forks at once, and return the
    /// results in order.
    ///
    /// Each job starts from this snapshot and is isolated from other jobs. See
    /// `pyvmm.ForkExecutor`.
    ///
    /// `entropy` is the same as for `fork`, and is written again for each job. Without it, the
    /// result of a job depends only on its input.
    ///
    /// Args:
    ///     function: called on the thread of a worker, with a machine and an input.
    ///     inputs: the inputs.
    ///     workers: the number of forks at once; None means the number of processors.
    ///     timeout: seconds for each job; None means no limit.
    ///     entropy: writes new randomness to the guest before each job.
    ///     return_exceptions: the exception of a job is its result, and the other jobs continue.
    ///     progress: called on this thread with the number of jobs that have ended and the number
    ///         of all, after each job. An exception that it raises ends the call.
    ///
    /// Raises:
    ///     TimeoutError: a job took longer than `timeout` seconds.
    ///     Exception: the first exception of a job, unless they are returned. The jobs in progress
    ///         are ended, and the others dropped.
    #[pyo3(
        signature = (function, inputs, **keywords),
        text_signature = "($self, function, inputs, *, workers=None, timeout=None, entropy=None, \
                          return_exceptions=False, progress=None)"
    )]
    fn map<'py>(
        slf: &Bound<'py, Self>,
        function: Bound<'py, PyAny>,
        inputs: Bound<'py, PyAny>,
        keywords: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let map = import(slf.py(), "pyvmm.parallel")?.getattr("map_inputs")?;
        map.call((slf, function, inputs), keywords)
    }
}
