//! The objects of a machine's vCPUs, memory, serial port and counters. While such an object exists,
//! the machine returns the same one. Used with the GIL held.

use std::collections::BTreeMap;

use pyo3::PyTypeInfo;
use pyo3::prelude::*;
use pyo3::types::{PyWeakrefMethods, PyWeakrefReference};

use super::gil_cell::GilCell;
use super::lease::ReuseTracker;

/// A part of a machine that has its own object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Memory,
    /// By key.
    Serial(&'static str),
    Stats,
    /// By number.
    Virtio(usize),
    Balloon,
    Console,
    /// By number.
    Disk(usize),
    /// By number.
    Net(usize),
    /// By number.
    Vcpu(u64),
}

/// Weak references to the objects of one machine's parts. Each object holds the machine, and a
/// strong reference back would be a cycle that keeps a dropped machine alive until the garbage
/// collector runs.
#[derive(Debug, Default)]
pub(super) struct Parts {
    objects: GilCell<BTreeMap<Part, Py<PyWeakrefReference>>>,
    /// The tracker of each object.
    pub(super) tracker: ReuseTracker,
}

impl Parts {
    pub(super) fn of(tracker: &ReuseTracker) -> Self {
        Self { tracker: tracker.clone(), ..Self::default() }
    }

    /// The object of a part: the existing one, or a new one.
    pub(super) fn get_or_make<'py, T: PyTypeInfo>(
        &self,
        py: Python<'py>,
        part: Part,
        make: impl FnOnce() -> PyResult<Bound<'py, T>>,
    ) -> PyResult<Bound<'py, T>> {
        if let Some(known) = self.find(py, part)? {
            return Ok(known);
        }
        let new = make()?;
        let weak = PyWeakrefReference::new(new.as_any())?.unbind();
        // An allocation may run the garbage collector and thus Python code, during which another
        // thread may create the same object.
        if let Some(known) = self.find(py, part)? {
            return Ok(known);
        }
        let former = self.objects.with(py, |known| known.insert(part, weak));
        drop(former);
        Ok(new)
    }

    fn find<'py, T: PyTypeInfo>(
        &self,
        py: Python<'py>,
        part: Part,
    ) -> PyResult<Option<Bound<'py, T>>> {
        let known = self.objects.with(py, |known| known.get(&part).map(|weak| weak.clone_ref(py)));
        Ok(known.map(|weak| weak.bind(py).upgrade_as::<T>()).transpose()?.flatten())
    }
}
