//! `Vmm` for Python, continued: devices on its buses, interrupts, eventfds in the kernel, and exit
//! hooks.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyString;

use super::device::PythonDevice;
use super::ending::import;
use super::event::PyEventFd;
use super::vmm::PyVmm;
use crate::devices::{Access, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::vcpu::{ExitHook, ExitKind, HookPriority};
use crate::vm::IoEvent;

impl PyVmm {
    fn add_device(
        &self,
        py: Python<'_>,
        access: Access,
        (base, length): (u64, u64),
        object: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let vmm = self.changing()?;
        let device = PythonDevice::new(object, access, base, &self.hooks.pending)?;
        let device = Arc::new(device);
        let added = Arc::clone(&device) as Arc<dyn Device>;
        py.detach(|| vmm.add_device(access, base, length, added))?;
        self.devices.lock().push(device);
        Ok(())
    }

    fn remove_device(&self, py: Python<'_>, access: Access, base: u64) -> PyResult<Py<PyAny>> {
        let vmm = self.changing()?;
        vmm.vm()?;
        let is_it = |device: &Arc<PythonDevice>| device.is_at(access, base);
        let Some(device) = self.devices.lock().iter().find(|device| is_it(device)).cloned() else {
            let detail = "no device that was added starts here";
            return Err(Error::new(ErrorKind::Config, format!("{base:#x}"), detail).into());
        };
        py.detach(|| vmm.remove_device(access, base))?;
        self.devices.lock().retain(|known| !Arc::ptr_eq(known, &device));
        Ok(device.object().clone_ref(py))
    }

    fn set_hooks(&self) -> Result<()> {
        let kinds = self.hooks.kinds();
        let hook = Arc::clone(&self.hooks) as Arc<dyn ExitHook>;
        self.changing()?.router().set_hook(HookPriority::Program, &hook, &kinds);
        Ok(())
    }
}

fn io_event(address: u64, length: usize, datamatch: Option<u64>, pio: bool) -> IoEvent {
    let access = if pio { Access::Pio } else { Access::Mmio };
    IoEvent { access, address, length, datamatch }
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
        PyValueError::new_err(format!("{name:?} is not one of {}", names.join(", ")))
    })
}

#[pymethods]
impl PyVmm {
    /// Answer the guest's accesses to ports by a Python object.
    ///
    /// It has `read(offset, size)`, `write(offset, size, value)`, or both.
    ///
    /// May be called while the guest runs and from callbacks. The methods are looked up now and
    /// called on the thread of the vCPU; see `pyvmm.devices`.
    ///
    /// Raises:
    ///     ConfigError: the range is not a range of ports, or overlaps another device's.
    ///     TypeError: the object has no device method.
    ///     ClosedError: the machine is closed.
    fn add_pio_device(
        &self,
        py: Python<'_>,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.add_device(py, Access::Pio, (base, length), device)
    }

    /// Answer the guest's accesses to guest-physical addresses without memory.
    ///
    /// Otherwise the same as `add_pio_device`.
    ///
    /// Raises:
    ///     ConfigError: the range overlaps memory or another device's.
    fn add_mmio_device(
        &self,
        py: Python<'_>,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.add_device(py, Access::Mmio, (base, length), device)
    }

    /// Remove the device whose ports start here, and return it. An access in progress is still
    /// answered.
    ///
    /// Raises:
    ///     ConfigError: no added device starts there.
    fn remove_pio_device(&self, py: Python<'_>, base: u64) -> PyResult<Py<PyAny>> {
        self.remove_device(py, Access::Pio, base)
    }

    /// Remove the device whose addresses start here, and return it. Otherwise the same as
    /// `remove_pio_device`.
    fn remove_mmio_device(&self, py: Python<'_>, base: u64) -> PyResult<Py<PyAny>> {
        self.remove_device(py, Access::Mmio, base)
    }

    fn _pio_device(&self, py: Python<'_>, base: u64) -> PyResult<Option<Py<PyAny>>> {
        self.core()?;
        let devices = self.devices.lock();
        let device = devices.iter().find(|device| device.is_at(Access::Pio, base));
        Ok(device.map(|device| device.object().clone_ref(py)))
    }

    /// Return an interrupt line: pin 0 to 23 of the I/O APIC. The first sixteen are also lines of
    /// the PICs.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    ///     ConfigError: the machine has no such line.
    fn irq(slf: Bound<'_, Self>, line: u32) -> PyResult<PyIrqLine> {
        slf.get().core()?.vm()?.check_irq_line(line)?;
        Ok(PyIrqLine { vmm: slf.unbind(), line })
    }

    /// Send a message-signalled interrupt (KVM_SIGNAL_MSI). Return whether a vCPU accepted it.
    ///
    /// Args:
    ///     address: 0xfee00000 plus the destination's APIC id shifted left by 12 (Intel SDM volume
    ///         3, 11.11.1).
    ///     data: the vector, with the delivery mode in the higher bits.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    fn msi(&self, py: Python<'_>, address: u64, data: u32) -> PyResult<bool> {
        let vmm = self.core()?;
        Ok(py.detach(|| vmm.vm()?.signal_msi(address, data))?)
    }

    /// Send a non-maskable interrupt to a vCPU. May be called from any thread.
    ///
    /// Raises:
    ///     ConfigError: there is no such vCPU.
    #[pyo3(signature = (vcpu = 0))]
    fn nmi(&self, py: Python<'_>, vcpu: u64) -> PyResult<()> {
        let vmm = self.core()?;
        Ok(py.detach(|| vmm.vm()?.nmi(vcpu))?)
    }

    /// In the kernel, pulse an interrupt line for each write to an eventfd: KVM_IRQFD.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    ///     KvmError: KVM refuses it, for example because the eventfd already pulses a line.
    fn add_irqfd(&self, py: Python<'_>, event_fd: &PyEventFd, line: u32) -> PyResult<()> {
        let (vmm, event) = (self.changing()?, event_fd.shared(py)?);
        Ok(py.detach(|| vmm.vm()?.add_irqfd(&event, line))?)
    }

    /// Undo `add_irqfd`.
    fn remove_irqfd(&self, py: Python<'_>, event_fd: &PyEventFd, line: u32) -> PyResult<()> {
        let (vmm, event) = (self.changing()?, event_fd.shared(py)?);
        Ok(py.detach(|| vmm.vm()?.remove_irqfd(&event, line))?)
    }

    /// In the kernel, add one to an eventfd for each guest write to an address: KVM_IOEVENTFD.
    ///
    /// The writes cause no exits.
    ///
    /// Args:
    ///     address: a guest-physical address, or a port if `pio` is set.
    ///     event_fd: the eventfd; a subscriber that watches it is called.
    ///     length: the size of the matching writes: 1, 2, 4 or 8; required with `datamatch`.
    ///     datamatch: the only value that matches; None matches every write.
    ///     pio: the address is a port.
    ///
    /// Raises:
    ///     ConfigError: no such write is possible.
    ///     KvmError: KVM refuses it, for example because another eventfd uses the address.
    #[pyo3(signature = (address, event_fd, *, length = 0, datamatch = None, pio = false))]
    fn add_ioeventfd(
        slf: &Bound<'_, Self>,
        address: u64,
        event_fd: &PyEventFd,
        length: usize,
        datamatch: Option<u64>,
        pio: bool,
    ) -> PyResult<()> {
        let (event, on) = (event_fd.shared(slf.py())?, io_event(address, length, datamatch, pio));
        let vmm = slf.get().changing()?;
        Ok(slf.py().detach(|| vmm.vm()?.add_ioeventfd(&event, &on))?)
    }

    /// Undo `add_ioeventfd`, with the same arguments.
    #[pyo3(signature = (address, event_fd, *, length = 0, datamatch = None, pio = false))]
    fn remove_ioeventfd(
        slf: &Bound<'_, Self>,
        address: u64,
        event_fd: &PyEventFd,
        length: usize,
        datamatch: Option<u64>,
        pio: bool,
    ) -> PyResult<()> {
        let (event, on) = (event_fd.shared(slf.py())?, io_event(address, length, datamatch, pio));
        let vmm = slf.get().changing()?;
        Ok(slf.py().detach(|| vmm.vm()?.remove_ioeventfd(&event, &on))?)
    }

    /// Register a function that is called for each exit of a kind before pyvmm answers it:
    /// `function(vcpu, exit)`.
    ///
    /// It takes effect at the next exit, and is called on the vCPU's thread. It returns None for
    /// the usual answer, an `ExitAction`, a `Stop`, or for a read the value that the guest reads.
    /// Without a function, this is a decorator. The hooks of a kind are called in the order they
    /// were added.
    ///
    /// Args:
    ///     kind: an `ExitKind` or its name.
    ///     function: the hook.
    ///     msrs: for the kind "msr", the numbers of additional registers whose accesses exit.
    ///         Accesses to registers that KVM does not know always do.
    ///
    /// Raises:
    ///     ValueError: there is no such kind.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (kind, function = None, *, msrs = None))]
    fn on_exit<'py>(
        slf: &Bound<'py, Self>,
        kind: &Bound<'py, PyAny>,
        function: Option<&Bound<'py, PyAny>>,
        msrs: Option<Vec<u32>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        this.core()?;
        let of_kind = kind_of(kind)?;
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
        match (of_kind, msrs) {
            (ExitKind::Msr, msrs) => {
                let (all, added) = this.hooks.filter(msrs.unwrap_or_default());
                py.detach(|| vm.filter_msrs(&all)).inspect_err(|_| {
                    this.hooks.unfilter(&added);
                })?;
            }
            (_, Some(_)) => return Err(PyValueError::new_err("msrs goes with the kind msr")),
            (_, None) => vm.check_process()?,
        }
        this.hooks.belong_to(slf, &this.parts)?;
        this.hooks.add(py, of_kind, function.clone().unbind());
        this.set_hooks()?;
        Ok(function.clone())
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

    /// Remove a hook. When the last hook of the kind "msr" is removed, KVM handles the selected
    /// registers again.
    ///
    /// Raises:
    ///     ValueError: the function is not a hook of this kind.
    fn off_exit(&self, kind: &Bound<'_, PyAny>, function: &Bound<'_, PyAny>) -> PyResult<()> {
        self.changing()?;
        let of_kind = kind_of(kind)?;
        if !self.hooks.remove(of_kind, function)? {
            return Err(PyValueError::new_err("this function is no hook of this kind of exit"));
        }
        self.set_hooks()?;
        if of_kind == ExitKind::Msr && self.hooks.unfilter(&[]) {
            // A machine that is closed has none.
            if let Ok(vm) = self.changing()?.vm() {
                kind.py().detach(|| vm.filter_msrs(&[]))?;
            }
        }
        Ok(())
    }
}

/// An interrupt line of a machine: `Vmm.irq`. Usable from any thread.
#[pyclass(frozen, name = "IrqLine", module = "pyvmm")]
#[derive(Debug)]
pub struct PyIrqLine {
    vmm: Py<PyVmm>,
    /// The line's number.
    #[pyo3(get)]
    line: u32,
}

impl PyIrqLine {
    fn set_levels(&self, py: Python<'_>, levels: &[bool]) -> PyResult<()> {
        let vmm = self.vmm.get().core()?;
        Ok(py.detach(|| {
            let vm = vmm.vm()?;
            levels.iter().try_for_each(|level| vm.set_irq_line(self.line, *level))
        })?)
    }
}

#[pymethods]
impl PyIrqLine {
    /// Raise the line: KVM_IRQ_LINE.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[pyo3(name = "raise_")]
    fn assert(&self, py: Python<'_>) -> PyResult<()> {
        self.set_levels(py, &[true])
    }

    /// Lower the line.
    fn lower(&self, py: Python<'_>) -> PyResult<()> {
        self.set_levels(py, &[false])
    }

    /// Raise and lower the line, for an edge-triggered interrupt.
    fn pulse(&self, py: Python<'_>) -> PyResult<()> {
        self.set_levels(py, &[true, false])
    }

    fn __repr__(&self) -> String {
        format!("IrqLine({})", self.line)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.vmm)
    }
}
