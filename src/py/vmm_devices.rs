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
    /// Answer the guest's accesses to ports by an object with `read(offset, size)`, `write(offset,
    /// size, value)` or both.
    ///
    /// Also while the guest runs and from callbacks. Its methods are called on the thread of the
    /// vCPU; see `ReadableDevice` and `WritableDevice`.
    ///
    /// Raises:
    ///     ConfigError: the range is not one of ports, or overlaps another device's.
    ///     TypeError: the object has no method of a device's.
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

    /// Answer the guest's accesses to guest-physical addresses, where there is no memory; as
    /// `add_pio_device` does.
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

    /// Take the device away whose ports start here, and return it. An access in progress is still
    /// answered.
    ///
    /// Raises:
    ///     ConfigError: no device that was added starts there.
    fn remove_pio_device(&self, py: Python<'_>, base: u64) -> PyResult<Py<PyAny>> {
        self.remove_device(py, Access::Pio, base)
    }

    /// Take the device away whose addresses start here, and return it.
    fn remove_mmio_device(&self, py: Python<'_>, base: u64) -> PyResult<Py<PyAny>> {
        self.remove_device(py, Access::Mmio, base)
    }

    fn _pio_device(&self, py: Python<'_>, base: u64) -> PyResult<Option<Py<PyAny>>> {
        self.core()?;
        let devices = self.devices.lock();
        let device = devices.iter().find(|device| device.is_at(Access::Pio, base));
        Ok(device.map(|device| device.object().clone_ref(py)))
    }

    /// An interrupt line: pin 0 to 23 of the I/O APIC, of which the PICs have the first sixteen.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    ///     ConfigError: it has no such line.
    fn irq(slf: Bound<'_, Self>, line: u32) -> PyResult<PyIrqLine> {
        slf.get().core()?.vm()?.check_irq_line(line)?;
        Ok(PyIrqLine { vmm: slf.unbind(), line })
    }

    /// Send a message-signalled interrupt (KVM_SIGNAL_MSI); whether a vCPU took it.
    ///
    /// Args:
    ///     address: 0xfee00000 and the destination's APIC id shifted by 12 (Intel SDM volume 3,
    ///     11.11.1). data: the vector, and the delivery mode above it.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    fn msi(&self, py: Python<'_>, address: u64, data: u32) -> PyResult<bool> {
        let vmm = self.core()?;
        Ok(py.detach(|| vmm.vm()?.signal_msi(address, data))?)
    }

    /// Send a vCPU a non-maskable interrupt. From any thread.
    ///
    /// Raises:
    ///     ConfigError: there is no such vCPU.
    #[pyo3(signature = (vcpu = 0))]
    fn nmi(&self, py: Python<'_>, vcpu: u64) -> PyResult<()> {
        let vmm = self.core()?;
        Ok(py.detach(|| vmm.vm()?.nmi(vcpu))?)
    }

    /// Have each write of an eventfd pulse an interrupt line, in the kernel: KVM_IRQFD.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    ///     KvmError: KVM refuses it: an eventfd pulses one line.
    fn add_irqfd(&self, py: Python<'_>, event_fd: &PyEventFd, line: u32) -> PyResult<()> {
        let (vmm, event) = (self.changing()?, event_fd.shared(py)?);
        Ok(py.detach(|| vmm.vm()?.add_irqfd(&event, line))?)
    }

    /// Undo `add_irqfd`.
    fn remove_irqfd(&self, py: Python<'_>, event_fd: &PyEventFd, line: u32) -> PyResult<()> {
        let (vmm, event) = (self.changing()?, event_fd.shared(py)?);
        Ok(py.detach(|| vmm.vm()?.remove_irqfd(&event, line))?)
    }

    /// Have the guest's writes to an address add one to an eventfd, in the kernel: KVM_IOEVENTFD.
    /// They are no exits.
    ///
    /// Args:
    ///     address: a guest-physical address, or with `pio` a port.
    ///     event_fd: what is written; a subscriber that watches it is told.
    ///     length: bytes of the writes that match: 1, 2, 4 or 8; with `datamatch`.
    ///     datamatch: the one value that matches; None for every write.
    ///     pio: a port is meant.
    ///
    /// Raises:
    ///     ConfigError: there is no such write.
    ///     KvmError: KVM refuses it, as for one that another eventfd has.
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

    /// Have a function look at each exit of a kind before it is answered: `function(vcpu, exit)`,
    /// on the vCPU's thread.
    ///
    /// It takes effect at the next exit. It returns None for the usual answer, an `ExitAction`, a
    /// `Stop`, or for a read what the guest reads. Without a function this is a decorator. Hooks of
    /// a kind are asked in the order they were added.
    ///
    /// Args:
    ///     kind: an `ExitKind` or its name. function: the hook. msrs: for the kind "msr", numbers
    ///     of registers whose accesses come out besides those that KVM does not know.
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

    /// Decorate a function that the guest calls by a number, with integers and pieces of its
    /// memory: see `pyvmm.hostcalls`.
    ///
    /// Args:
    ///     number: what the guest calls it by; a function instead gets the next free one.
    ///
    /// Raises:
    ///     ValueError: the number is taken, or none of 32 bits.
    ///     ClosedError: the machine is closed.
    #[pyo3(signature = (number = None, /))]
    fn hostcall<'py>(
        slf: &Bound<'py, Self>,
        number: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        slf.get().core()?;
        import(slf.py(), "pyvmm.hostcalls")?.call_method1("hostcall", (slf, number))
    }

    /// Remove a hook. With the last one of the kind "msr" the registers that its hooks asked for
    /// are KVM's again.
    ///
    /// Raises:
    ///     ValueError: it is none of this kind.
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

/// An interrupt line of a machine: `Vmm.irq`. From any thread.
#[pyclass(frozen, name = "IrqLine", module = "pyvmm")]
#[derive(Debug)]
pub struct PyIrqLine {
    vmm: Py<PyVmm>,
    /// Its number.
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

    /// Lower it.
    fn lower(&self, py: Python<'_>) -> PyResult<()> {
        self.set_levels(py, &[false])
    }

    /// Raise and lower it, for an edge-triggered interrupt.
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
