//! Handles signals that arrive while a thread waits in Rust. Python's own C handler writes each
//! signal to the process's wake-up fd. A longer wait on the main thread installs its own pipe there
//! and also waits for it.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCFunction, PyDict, PyTuple};

use super::ending::import;
use super::enter::attach;
use super::gil_cell::GilCell;
use crate::limit::CHECK_INTERVAL;
use crate::process::ProcessTag;

/// How long a wait lasts before the pipe is installed, which takes system calls and the GIL.
const PIPE_DELAY: Duration = Duration::from_millis(5);

/// The longest wait between two checks for signals if the pipe cannot be created.
pub(super) const SIGNAL_CHECK_INTERVAL: Duration = CHECK_INTERVAL;

/// The pipe, and the program's fd that it has displaced.
static PIPE: GilCell<Option<Pipe>> = GilCell::new(None);

struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    /// While it is installed, the program's own fd, or -1.
    displaced: Option<RawFd>,
}

thread_local! {
    /// Whether Python runs signal handlers on this thread, as found out in this process.
    static RUNS_HANDLERS: Cell<Option<(ProcessTag, bool)>> = const { Cell::new(None) };
}

/// Wait. On Python's main thread, the arrival of a signal ends the wait. `wait` is called with its
/// deadline and another fd to wait for, and returns None if nothing arrived. Handlers of earlier
/// signals may run here; the caller runs those of signals that arrive during the wait. Called
/// without the GIL.
pub(super) fn wait<T: Send>(
    deadline: Option<Instant>,
    wait: impl Fn(Option<Instant>, Option<RawFd>) -> Option<T> + Send + Sync,
) -> PyResult<Option<T>> {
    if RUNS_HANDLERS.get() == Some((ProcessTag::current(), false)) {
        return Ok(wait(deadline, None));
    }
    let brief = Instant::now() + PIPE_DELAY;
    let found = wait(Some(earlier(deadline, brief)), None);
    // If it ended earlier, this thread received the signal itself.
    let now = Instant::now();
    if found.is_some() || now < brief || deadline.is_some_and(|deadline| now >= deadline) {
        return Ok(found);
    }
    attach(|py| wait_long(py, deadline, wait))
}

fn earlier(deadline: Option<Instant>, other: Instant) -> Instant {
    deadline.map_or(other, |deadline| deadline.min(other))
}

fn wait_long<T: Send>(
    py: Python<'_>,
    deadline: Option<Instant>,
    wait: impl Fn(Option<Instant>, Option<RawFd>) -> Option<T> + Send + Sync,
) -> PyResult<Option<T>> {
    if !runs_handlers(py)? {
        return Ok(py.detach(|| wait(deadline, None)));
    }
    py.check_signals()?;
    let Ok(wakeup) = Wakeup::install(py) else {
        let slice = earlier(deadline, Instant::now() + SIGNAL_CHECK_INTERVAL);
        return Ok(py.detach(|| wait(Some(slice), None)));
    };
    // Python has recorded a signal from before the pipe, but it is not in the pipe.
    py.check_signals()?;
    let reader = wakeup.reader;
    Ok(py.detach(|| wait(deadline, Some(reader))))
}

/// Whether this is the thread on which Python runs signal handlers.
pub(super) fn runs_handlers(py: Python<'_>) -> PyResult<bool> {
    let here = ProcessTag::current();
    if let Some((process_tag, runs)) = RUNS_HANDLERS.get()
        && process_tag == here
    {
        return Ok(runs);
    }
    // Python allows setting the fd only on that thread.
    let runs = match set_wakeup_fd(py, -1) {
        Ok(former) => {
            // Fails if the program has closed it.
            drop(set_wakeup_fd(py, former));
            true
        }
        Err(error) if error.is_instance_of::<PyValueError>(py) => false,
        Err(error) => return Err(error),
    };
    RUNS_HANDLERS.set(Some((here, runs)));
    Ok(runs)
}

/// The end of a wait that no signal can end: on Python's main thread, the time of the next check
/// for signals. Called without the GIL.
pub(super) fn until_check(deadline: Option<Instant>) -> PyResult<Option<Instant>> {
    let runs = match RUNS_HANDLERS.get() {
        Some((process_tag, runs)) if process_tag == ProcessTag::current() => runs,
        _ => attach(runs_handlers)?,
    };
    Ok(if runs {
        Some(earlier(deadline, Instant::now() + SIGNAL_CHECK_INTERVAL))
    } else {
        deadline
    })
}

/// The pipe is the process's wake-up fd while this lives.
struct Wakeup<'py> {
    py: Python<'py>,
    reader: RawFd,
    /// Whether an outer wait had installed it, and this wait is in one of its signal handlers.
    is_inner: bool,
}

impl<'py> Wakeup<'py> {
    fn install(py: Python<'py>) -> PyResult<Self> {
        let (reader, writer) = Pipe::numbers(py)?;
        let former = set_wakeup_fd(py, writer)?;
        // The handler records a signal before it reads the fd. We check the record after this
        // fence.
        fence(Ordering::SeqCst);
        let is_inner = PIPE.with(py, |pipe| {
            let Some(pipe) = pipe else { return false };
            let is_inner = pipe.displaced.is_some();
            if former != writer {
                pipe.displaced = Some(former);
            } else if !is_inner {
                pipe.displaced = Some(-1);
            }
            is_inner
        });
        Ok(Self { py, reader, is_inner })
    }
}

impl Drop for Wakeup<'_> {
    /// Restore the program's fd and forward the bytes that were written for it.
    fn drop(&mut self) {
        if self.is_inner {
            return;
        }
        let installed = PIPE.with(self.py, |pipe| {
            let pipe = pipe.as_mut()?;
            Some((pipe.writer.as_raw_fd(), pipe.displaced.take()?))
        });
        if let Some((writer, displaced)) = installed {
            restore(self.py, writer, displaced);
            forward(self.reader, displaced);
        }
    }
}

/// Restore the program's fd if `writer` is installed.
fn restore(py: Python<'_>, writer: RawFd, displaced: RawFd) {
    match set_wakeup_fd(py, displaced) {
        // The program has set another fd, which stays.
        Ok(found) if found != writer && found != displaced => drop(set_wakeup_fd(py, found)),
        Ok(_) => {}
        // The program has closed its fd.
        Err(_) => drop(set_wakeup_fd(py, -1)),
    }
}

/// Empty the pipe into the program's fd, as the C handler would have done.
fn forward(reader: RawFd, to: RawFd) {
    let mut signals = [0u8; 64];
    loop {
        // SAFETY: the buffer has room for this many bytes.
        let length = unsafe { libc::read(reader, signals.as_mut_ptr().cast(), signals.len()) };
        let Ok(length @ 1..) = usize::try_from(length) else { return };
        if to >= 0 {
            // SAFETY: as many bytes as were read. A full or closed fd loses them, as with the C
            // handler.
            unsafe { libc::write(to, signals.as_ptr().cast(), length) };
        }
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let mut fds = [-1; 2];
        // SAFETY: room for two numbers.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned these numbers, and nothing else knows them.
        let [reader, writer] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        Ok(Self { reader, writer, displaced: None })
    }

    /// Reader and writer of the process's pipe.
    fn numbers(py: Python<'_>) -> PyResult<(RawFd, RawFd)> {
        static FORGET: PyOnceLock<()> = PyOnceLock::new();
        FORGET.get_or_try_init(py, || forget_in_children(py))?;
        PIPE.with(py, |pipe| {
            let pipe = match pipe {
                Some(pipe) => pipe,
                none => none.insert(Self::new()?),
            };
            Ok((pipe.reader.as_raw_fd(), pipe.writer.as_raw_fd()))
        })
    }
}

/// If another thread forks during a wait, no thread waits in the child. The program's fd is
/// restored there too, and the child does not use the parent's pipe.
fn forget_in_children(py: Python<'_>) -> PyResult<()> {
    let forget = |arguments: &Bound<'_, PyTuple>, _: Option<&Bound<'_, PyDict>>| {
        let pipe = PIPE.with(arguments.py(), Option::take);
        if let Some(Pipe { writer, displaced: Some(displaced), .. }) = pipe {
            restore(arguments.py(), writer.as_raw_fd(), displaced);
        }
    };
    let forget = PyCFunction::new_closure(py, Some(c"forget"), None, forget)?;
    let options = PyDict::new(py);
    options.set_item("after_in_child", forget)?;
    import(py, "os")?.call_method("register_at_fork", (), Some(&options)).map(drop)
}

/// Set the wake-up fd and return the previous one. On the main thread.
fn set_wakeup_fd(py: Python<'_>, fd: RawFd) -> PyResult<RawFd> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    FUNCTION.import(py, "signal", "set_wakeup_fd")?.call1((fd,))?.extract()
}
