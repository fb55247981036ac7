//! The machines that are alive, so that they are closed in order before the interpreter ends.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::gil_cell::GilCell;
use super::interrupt::Background;
use crate::process::ProcessTag;
use crate::vcpu::unjoined;

/// How long interpreter exit waits for callbacks in progress.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A machine that can be stopped and closed from any thread, any number of times.
pub(super) trait Close: Send + Sync {
    /// Ask a run in progress to end. Does not wait.
    fn stop(&self);
    /// End the run and release everything, once the callbacks in progress have returned.
    fn close(&self);
    /// Whether it is not closed.
    fn is_open(&self) -> bool;
}

/// The machines of this process, with the process that created each: a forked child has copies.
static LIVE: GilCell<Vec<(ProcessTag, Weak<dyn Close>)>> = GilCell::new(Vec::new());

/// Register a machine for its lifetime.
pub(super) fn register(py: Python<'_>, machine: Weak<dyn Close>) {
    LIVE.with(py, |live| {
        if live.len() == live.capacity() {
            live.retain(|(_, known)| known.strong_count() > 0);
        }
        live.push((ProcessTag::current(), machine));
    });
}

/// Close every machine that is alive. Called at interpreter exit.
#[pyfunction]
pub(crate) fn close_all(py: Python<'_>) -> PyResult<()> {
    let live = LIVE.with(py, std::mem::take);
    let own = live.iter().filter(|(process_tag, _)| !process_tag.is_forked_child());
    let machines: Vec<Arc<dyn Close>> = own.filter_map(|(_, machine)| machine.upgrade()).collect();
    if machines.is_empty() && unjoined::is_empty() {
        return Ok(());
    }
    machines.iter().for_each(|machine| machine.stop());
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    let close = move || {
        machines.iter().for_each(|machine| machine.close());
        drop(machines);
        unjoined::join_all();
    };
    // The closing thread may have to wait for a callback that never returns. This thread does not.
    match Background::start(py, close) {
        Ok(closing) => closing.wait(py, Some(deadline)),
        Err(close) => {
            py.detach(close);
            Ok(())
        }
    }
}
