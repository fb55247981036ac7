//! The capabilities of this host's KVM, for `pyvmm doctor`.

use kvm_ioctls::Cap;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::boot;
use crate::cpu::{self, cpuid};
use crate::kvm::{max_vcpus, open_kvm};
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

/// Describe /dev/kvm: api_version, capabilities, max_vcpus, software_kvm, hidden_features.
///
/// Raises:
///     KvmUnavailableError: there is no usable /dev/kvm; `hint` says what to do.
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
    info.set_item("max_vcpus", max_vcpus(&kvm))?;
    info.set_item("software_kvm", cpuid::host_is_software_kvm())?;
    info.set_item("hidden_features", cpuid::hidden_by_default())?;
    Ok(info)
}

/// Names of the CPUID features that `CpuConfig.hide` and `expose` know.
#[pyfunction]
pub(crate) fn cpu_features() -> Vec<&'static str> {
    cpu::feature_names().collect()
}

/// The machine code of the built-in guest: 64-bit ring 3, position-independent.
#[pyfunction]
pub(crate) fn embedded_guest(py: Python<'_>) -> Bound<'_, PyBytes> {
    PyBytes::new(py, boot::embedded_guest())
}

/// Return the number of the signal that makes vCPUs leave the guest. The first call claims the
/// signal.
///
/// Raises:
///     StateError: the program uses every real-time signal.
#[pyfunction]
pub(crate) fn kick_signal() -> PyResult<i32> {
    Ok(vcpu::kick_signal()?)
}

/// Choose the kick signal before the first machine is created.
///
/// By default it is the first real-time signal that has no handler then. If the chosen signal
/// already has a handler, that handler is still called for signals that are not kicks.
///
/// Raises:
///     ConfigError: the signal cannot be used.
///     StateError: another signal is already in use.
#[pyfunction]
pub(crate) fn set_kick_signal(signal: i32) -> PyResult<()> {
    Ok(vcpu::use_signal(signal)?)
}
