//! `Vmm` for Python, continued: exit hooks and hostcalls, added and removed on the caller's thread.
//! `hooks.rs` calls them.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use super::object::PyVmm;
use crate::error::Result;
use crate::py::ending::import;
use crate::py::items::Items;
use crate::vcpu::{ExitHook, ExitKind, HookPriority};

impl PyVmm {
    fn set_hooks(&self, py: Python<'_>) -> Result<()> {
        let kinds = self.hooks.kinds(py);
        let hook = Arc::clone(&self.hooks) as Arc<dyn ExitHook>;
        self.changing()?.router().set_hook(HookPriority::Program, &hook, &kinds);
        Ok(())
    }
}

/// The name of all kinds together.
const ANY: &str = "any";

fn kinds_of(kind: &Bound<'_, PyAny>) -> PyResult<Vec<ExitKind>> {
    match kind.cast::<PyString>() {
        Ok(name) if name.to_str()? == ANY => Ok(ExitKind::ALL.to_vec()),
        _ => Ok(vec![kind_of(kind)?]),
    }
}

fn kind_of(kind: &Bound<'_, PyAny>) -> PyResult<ExitKind> {
    let Ok(name) = kind.cast::<PyString>() else {
        let class = kind.get_type();
        return Err(PyTypeError::new_err(format!(
            "a kind of exit is an ExitKind or its name, not {}",
            class.name()?
        )));
    };
    let name = name.to_str()?;
    let found = ExitKind::ALL.into_iter().find(|kind| kind.name() == name);
    found.ok_or_else(|| {
        let names: Vec<&str> = ExitKind::ALL.iter().map(|kind| kind.name()).collect();
        PyValueError::new_err(format!("{name:?} is not one of {}, {ANY}", names.join(", ")))
    })
}

#[pymethods]
impl PyVmm {
    /// Register a function that is called for each exit of a kind before pyvmm answers it:
    /// `function(vcpu, exit)`.
    ///
    /// It takes effect at the next exit, and is called on the vCPU's thread. It returns None for
    /// the usual answer, an `ExitAction`, a `Stop`, or for a read the value that the guest reads.
    /// Without a function, this is a decorator. The hooks of a kind are called in the order they
    /// were added.
    ///
    /// Args:
    ///     kind: an `ExitKind` or its name, or "any" for the exits of every kind.
    ///     function: the hook.
    ///     msrs: for the kinds "msr" and "any", the numbers of additional registers whose accesses
    ///         exit. Accesses to registers that KVM does not know always do.
    ///
    /// Raises:
    ///     ValueError: there is no such kind.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (kind, function = None, *, msrs = None))]
    fn on_exit<'py>(
        slf: &Bound<'py, Self>,
        kind: &Bound<'py, PyAny>,
        function: Option<&Bound<'py, PyAny>>,
        msrs: Option<Items<u32>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        this.core()?;
        let msrs = msrs.map(|items| items.0);
        let kinds = kinds_of(kind)?;
        let Some(function) = function else {
            let keywords = pyo3::types::PyDict::new(py);
            keywords.set_item("msrs", msrs)?;
            let bound = slf.getattr("on_exit")?;
            let partial = import(py, "functools")?.getattr("partial")?;
            return partial.call((bound, kind), Some(&keywords));
        };
        if !function.is_callable() {
            let class = function.get_type();
            return Err(PyTypeError::new_err(format!(
                "a hook is a function, not {}",
                class.name()?
            )));
        }
        let vm = this.changing()?.vm()?;
        match (kinds.contains(&ExitKind::Msr), msrs) {
            (true, msrs) => {
                let (all, added) = this.hooks.filter(msrs.unwrap_or_default());
                py.detach(|| vm.filter_msrs(&all)).inspect_err(|_| {
                    this.hooks.unfilter(py, &added);
                })?;
            }
            (false, Some(_)) => return Err(PyValueError::new_err("msrs needs the kind msr")),
            (false, None) => vm.check_process()?,
        }
        this.hooks.belong_to(slf, &this.parts)?;
        kinds.into_iter().try_for_each(|kind| this.hooks.add(py, kind, function))?;
        this.set_hooks(py)?;
        Ok(function.clone())
    }

    /// Remove a hook. When the last hook of the kind "msr" is removed, KVM handles the selected
    /// registers again.
    ///
    /// Raises:
    ///     ValueError: the function is not a hook of this kind.
    fn off_exit(&self, kind: &Bound<'_, PyAny>, function: &Bound<'_, PyAny>) -> PyResult<()> {
        self.changing()?;
        let (kinds, mut is_removed) = (kinds_of(kind)?, false);
        for kind in &kinds {
            is_removed |= self.hooks.remove(*kind, function)?;
        }
        if !is_removed {
            return Err(PyValueError::new_err("this function is not a hook of this kind of exit"));
        }
        let py = kind.py();
        self.set_hooks(py)?;
        if kinds.contains(&ExitKind::Msr) && self.hooks.unfilter(py, &[]) {
            // A closed machine has no hooks.
            if let Ok(vm) = self.changing()?.vm() {
                py.detach(|| vm.filter_msrs(&[]))?;
            }
        }
        Ok(())
    }

    /// Decorate a function that the guest can call by a number.
    ///
    /// Its arguments are integers and parts of guest memory: see `pyvmm.hostcalls`.
    ///
    /// Args:
    ///     number: the function's number. If a function is passed instead, it gets the next unused
    ///         number.
    ///
    /// Raises:
    ///     ValueError: the number is taken, or does not fit in 32 bits.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (number = None, /))]
    fn hostcall<'py>(
        slf: &Bound<'py, Self>,
        number: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        slf.get().core()?;
        import(slf.py(), "pyvmm.hostcalls")?.call_method1("hostcall", (slf, number))
    }

    /// Answer the next exit `count` times and return the seconds that this took. The guest is
    /// entered only once, so KVM's part is not included.
    fn _time_answers(&self, py: Python<'_>, count: u32) -> PyResult<f64> {
        let vm = self.changing()?.vm()?;
        let _kept = self.hooks.keep_vcpus(py);
        Ok(py.detach(|| vm.time_answers(count))?.as_secs_f64())
    }
}
