//! The machines that are alive, so that none is when the interpreter ends: a vCPU's thread must not meet a
//! Python that is going down.

use std::sync::{Arc, Weak};

use pyo3::prelude::*;

use crate::sync::{Mutex, rank};

/// Something that can be closed from any thread, any number of times.
pub(super) trait Close: Send + Sync {
    fn close(&self);
}

static LIVE: Mutex<Vec<Weak<dyn Close>>, rank::Live> = Mutex::new(Vec::new());

/// Remember a machine for as long as it lives.
pub(super) fn remember(machine: Weak<dyn Close>) {
    let mut live = LIVE.lock();
    if live.len() == live.capacity() {
        live.retain(|known| known.strong_count() > 0);
    }
    live.push(machine);
}

/// Close every machine that is alive. `pyvmm` has this called at interpreter exit.
#[pyfunction]
pub(crate) fn close_all(py: Python<'_>) {
    let live = std::mem::take(&mut *LIVE.lock());
    let machines: Vec<Arc<dyn Close>> = live.iter().filter_map(Weak::upgrade).collect();
    py.detach(|| {
        machines.iter().for_each(|machine| machine.close());
        drop(machines);
    });
}
