//! What this machine's KVM can do, for `pyvmm doctor`.

use kvm_ioctls::Cap;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::boot;
use crate::cpu::{self, cpuid};
use crate::kvm::open_kvm;
use crate::vcpu;

/// The capabilities that pyvmm uses or reports, by their names in the kernel's documentation.
const CAPABILITIES: [(&str, Cap); 16] = [
    ("irqchip", Cap::Irqchip),
    ("pit2", Cap::Pit2),
    ("irqfd", Cap::Irqfd),
    ("ioeventfd", Cap::Ioeventfd),
    ("split-irqchip", Cap::SplitIrqchip),
    ("immediate-exit", Cap::ImmediateExit),
    ("sync-regs", Cap::SyncRegs),
    ("set-tss-addr", Cap::SetTssAddr),
    ("set-identity-map-addr", Cap::SetIdentityMapAddr),
    ("ext-cpuid", Cap::ExtCpuid),
    ("mp-state", Cap::MpState),
    ("user-memory", Cap::UserMemory),
    ("readonly-mem", Cap::ReadonlyMem),
    ("guest-debug", Cap::Debugregs),
    ("tsc-control", Cap::TscControl),
    ("xsave", Cap::Xsave),
];

/// What /dev/kvm offers.
#[pyfunction]
pub(crate) fn kvm_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let kvm = open_kvm()?;
    let capabilities = PyDict::new(py);
    for (name, capability) in CAPABILITIES {
        capabilities.set_item(name, kvm.check_extension(capability))?;
    }
    let info = PyDict::new(py);
    info.set_item("api_version", kvm.get_api_version())?;
    info.set_item("capabilities", capabilities)?;
    info.set_item("max_vcpus", kvm.get_max_vcpus())?;
    info.set_item("software_kvm", cpuid::host_is_software_kvm())?;
    info.set_item("hidden_features", cpuid::hidden_by_default())?;
    Ok(info)
}

/// Names of CPUID features that `CpuConfig.hide` and `expose` know.
#[pyfunction]
pub(crate) fn cpu_features() -> Vec<&'static str> {
    cpu::feature_names().collect()
}

/// The machine code of the guest inside the package.
#[pyfunction]
pub(crate) fn embedded_guest(py: Python<'_>) -> Bound<'_, PyBytes> {
    PyBytes::new(py, boot::embedded_guest())
}

/// The signal that brings vCPUs out of their guests. Asking for it claims it.
///
/// Raises:
///     StateError: every real-time signal is in use by the program.
#[pyfunction]
pub(crate) fn kick_signal() -> PyResult<i32> {
    Ok(vcpu::kick_signal()?)
}

/// Choose that signal, before the first machine is made. Without a choice it is the first real-time
/// signal that has no handler then. A handler that the signal has already is called for every
/// signal that is no kick.
///
/// Raises:
///     ConfigError: the signal cannot be used for this.
///     StateError: another one is in use already.
#[pyfunction]
pub(crate) fn set_kick_signal(signal: i32) -> PyResult<()> {
    Ok(vcpu::use_signal(signal)?)
}
