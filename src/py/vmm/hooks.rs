//! `Vmm` for Python, continued: exit hooks and hostcalls, added and removed on the caller's thread.
//! `hooks.rs` calls them.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use super::object::PyVmm;
use crate::error::Result;
use crate::py::ending::import;
use crate::py::hooks::When;
use crate::py::items::Items;
use crate::vcpu::{ExitHook, ExitKind, HookPriority};

impl PyVmm {
    fn set_hooks(&self, py: Python<'_>) -> Result<()> {
        let exits = self.hooks.kinds(py, When::Exit);
        let answers = self.hooks.kinds(py, When::Answer);
        let hook = Arc::clone(&self.hooks) as Arc<dyn ExitHook>;
        self.changing()?.router().set_hook(HookPriority::Program, &hook, &exits, &answers);
        Ok(())
    }

    fn remove_hook(
        &self,
        when: When,
        kinds: &[ExitKind],
        function: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let mut is_removed = false;
        for kind in kinds {
            is_removed |= self.hooks.remove((when, *kind), function)?;
        }
        if !is_removed {
            return Err(PyValueError::new_err("this function is not a hook of this kind of exit"));
        }
        Ok(self.set_hooks(function.py())?)
    }
}

fn check_callable(function: &Bound<'_, PyAny>) -> PyResult<()> {
    if function.is_callable() {
        return Ok(());
    }
    let class = function.get_type();
    Err(PyTypeError::new_err(format!("a hook is a function, not {}", class.name()?)))
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
        check_callable(function)?;
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
        kinds.into_iter().try_for_each(|kind| this.hooks.add(py, (When::Exit, kind), function))?;
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
        let (py, kinds) = (kind.py(), kinds_of(kind)?);
        self.remove_hook(When::Exit, &kinds, function)?;
        if kinds.contains(&ExitKind::Msr) && self.hooks.unfilter(py, &[]) {
            // A closed machine has no hooks.
            if let Ok(vm) = self.changing()?.vm() {
                py.detach(|| vm.filter_msrs(&[]))?;
            }
        }
        Ok(())
    }

    /// Register a function that is called after each exit of a kind has been answered.
    ///
    /// It takes effect at the next exit, and is called on the vCPU's thread before the guest
    /// continues: `function(vcpu, exit, answer)`. `answer` is an `Answer`: what answered the exit,
    /// and the data that the guest reads or has written. The function returns None, or a `Stop` to
    /// end the run. Without a function, this is a decorator. All hooks of a kind are called, in the
    /// order they were added.
    ///
    /// Args:
    ///     kind: an `ExitKind` or its name, or "any" for the exits of every kind. Of registers,
    ///         those exit that KVM does not know, and those that `on_exit` has selected.
    ///     function: the hook.
    ///
    /// Raises:
    ///     ValueError: there is no such kind.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (kind, function = None))]
    fn on_answer<'py>(
        slf: &Bound<'py, Self>,
        kind: &Bound<'py, PyAny>,
        function: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        this.core()?;
        let kinds = kinds_of(kind)?;
        let Some(function) = function else {
            let partial = import(py, "functools")?.getattr("partial")?;
            return partial.call1((slf.getattr("on_answer")?, kind));
        };
        check_callable(function)?;
        let vm = this.changing()?.vm()?;
        vm.check_process()?;
        if kinds.contains(&ExitKind::Msr) {
            let (all, _) = this.hooks.filter(Vec::new());
            py.detach(|| vm.filter_msrs(&all))?;
        }
        this.hooks.belong_to(slf, &this.parts)?;
        let mut kinds = kinds.into_iter();
        kinds.try_for_each(|kind| this.hooks.add(py, (When::Answer, kind), function))?;
        this.set_hooks(py)?;
        Ok(function.clone())
    }

    /// Remove a hook that `on_answer` has added.
    ///
    /// Raises:
    ///     ValueError: the function is not a hook of this kind.
    fn off_answer(&self, kind: &Bound<'_, PyAny>, function: &Bound<'_, PyAny>) -> PyResult<()> {
        self.changing()?;
        self.remove_hook(When::Answer, &kinds_of(kind)?, function)
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
