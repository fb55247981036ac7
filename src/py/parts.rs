//! The objects that a machine's object has handed out: its vCPUs, its memory and its serial port.
//! While somebody holds one, asking again gives the same object. With the GIL held.

use std::collections::BTreeMap;

use pyo3::PyTypeInfo;
use pyo3::prelude::*;
use pyo3::types::{PyWeakrefMethods, PyWeakrefReference};

use super::gil_cell::GilCell;
use super::lease::Tie;

/// A part of a machine that has an object of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Memory,
    Serial,
    /// By number.
    Vcpu(u64),
}

/// The objects of one machine's parts, held weakly: each holds the machine, and a strong reference
/// back would be a cycle that keeps a forgotten machine until the garbage collector comes.
#[derive(Debug, Default)]
pub(super) struct Parts {
    objects: GilCell<BTreeMap<Part, Py<PyWeakrefReference>>>,
    /// That of each object.
    pub(super) tie: Tie,
}

impl Parts {
    pub(super) fn of(tie: &Tie) -> Self {
        Self { tie: tie.clone(), ..Self::default() }
    }

    /// The object of a part; a new one where nobody holds one.
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
        // An allocation may run the garbage collector, and with it Python code that lets another
        // thread make the same.
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
