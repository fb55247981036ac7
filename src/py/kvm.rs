//! `Kvm` for Python: /dev/kvm itself.

use std::os::fd::AsRawFd;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::cpuid::cpuid_entries;
use crate::error::Error;
use crate::kvm::{max_vcpus, open_kvm};

/// KVM's system interface: /dev/kvm.
///
/// Raises:
///     KvmUnavailableError: this host has no usable KVM.
#[pyclass(frozen, name = "Kvm", module = "pyvmm")]
#[derive(Debug)]
pub struct PyKvm(Kvm);

#[pymethods]
impl PyKvm {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(open_kvm()?))
    }

    /// KVM_GET_API_VERSION: 12.
    #[getter]
    fn api_version(&self) -> i32 {
        self.0.get_api_version()
    }

    /// Return the result of KVM_CHECK_EXTENSION for a capability, given by number or as `Cap`: 0 if
    /// KVM lacks it.
    fn check_extension(&self, capability: u32) -> PyResult<i32> {
        let answer = self.0.check_extension_raw(libc::c_ulong::from(capability));
        if answer >= 0 {
            return Ok(answer);
        }
        Err(Error::kvm("KVM_CHECK_EXTENSION", kvm_ioctls::Error::last()).into())
    }

    /// The CPUID that guests can have on this host: a tuple of `CpuidEntry`, suitable for
    /// `Vcpu.cpuid`.
    #[getter]
    fn supported_cpuid<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let table = self
            .0
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::kvm("KVM_GET_SUPPORTED_CPUID", e))?;
        cpuid_entries(py, table.as_slice())
    }

    /// The numbers of the MSRs that belong to a guest's state: KVM_GET_MSR_INDEX_LIST.
    #[getter]
    fn msr_list<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let list =
            self.0.get_msr_index_list().map_err(|e| Error::kvm("KVM_GET_MSR_INDEX_LIST", e))?;
        PyTuple::new(py, list.as_slice())
    }

    /// The maximum number of vCPUs of a machine.
    #[getter]
    fn max_vcpus(&self) -> usize {
        max_vcpus(&self.0)
    }

    /// The file descriptor, for ioctls of your own.
    fn fileno(&self) -> i32 {
        self.0.as_raw_fd()
    }

    fn __repr__(&self) -> String {
        format!("Kvm(api_version={})", self.api_version())
    }
}
