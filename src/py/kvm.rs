//! `Kvm` for Python: /dev/kvm itself.

use std::os::fd::AsRawFd;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::vcpu::cpuid_entries;
use crate::error::Error;
use crate::kvm::open_kvm;

/// KVM's system interface: /dev/kvm.
///
/// Raises:
///     KvmUnavailableError: this machine offers no usable KVM.
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

    /// What KVM_CHECK_EXTENSION says of a capability, by number or as `Cap`: 0 where KVM has it
    /// not, else more.
    fn check_extension(&self, capability: u32) -> PyResult<i32> {
        let answer = self.0.check_extension_raw(libc::c_ulong::from(capability));
        if answer >= 0 {
            return Ok(answer);
        }
        Err(Error::kvm("KVM_CHECK_EXTENSION", kvm_ioctls::Error::last()).into())
    }

    /// What CPUID can say to a guest on this machine: a tuple of `CpuidEntry`, as `Vcpu.cpuid`
    /// takes it.
    #[getter]
    fn supported_cpuid<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let table = self
            .0
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::kvm("KVM_GET_SUPPORTED_CPUID", e))?;
        cpuid_entries(py, table.as_slice())
    }

    /// The numbers of the model-specific registers that belong to a guest's state:
    /// KVM_GET_MSR_INDEX_LIST.
    #[getter]
    fn msr_list<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let list =
            self.0.get_msr_index_list().map_err(|e| Error::kvm("KVM_GET_MSR_INDEX_LIST", e))?;
        PyTuple::new(py, list.as_slice())
    }

    /// The most vCPUs of one machine.
    #[getter]
    fn max_vcpus(&self) -> usize {
        self.0.get_max_vcpus()
    }

    /// The file descriptor, for ioctls of one's own.
    fn fileno(&self) -> i32 {
        self.0.as_raw_fd()
    }

    fn __repr__(&self) -> String {
        format!("Kvm(api_version={})", self.api_version())
    }
}
