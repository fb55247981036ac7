//! CPUID tables as tuples of `pyvmm.registers.CpuidEntry`, and the names of what is in them.

use kvm_bindings::kvm_cpuid_entry2;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::config::cpu_from_python;
use super::ending::import;
use crate::cpu::{Register, cpuid, names_in};
use crate::kvm::open_kvm;

/// CPUID leaves as Python objects.
pub(super) fn cpuid_entries<'py>(
    py: Python<'py>,
    table: &[kvm_cpuid_entry2],
) -> PyResult<Bound<'py, PyTuple>> {
    let class = import(py, "pyvmm.registers")?.getattr("CpuidEntry")?;
    let entries: Vec<_> = table
        .iter()
        .map(|e| class.call1((e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)))
        .collect::<PyResult<_>>()?;
    PyTuple::new(py, entries)
}

/// A `CpuidEntry` as a leaf.
pub(super) fn cpuid_entry(entry: &Bound<'_, PyAny>) -> PyResult<kvm_cpuid_entry2> {
    let number = |name: &str| {
        let Ok(value) = entry.getattr(name) else {
            let class = entry.get_type().name()?.to_string();
            return Err(PyTypeError::new_err(format!("expected a CpuidEntry, not {class}")));
        };
        value.extract::<u32>()
    };
    Ok(kvm_cpuid_entry2 {
        function: number("function")?,
        index: number("index")?,
        flags: number("flags")?,
        eax: number("eax")?,
        ebx: number("ebx")?,
        ecx: number("ecx")?,
        edx: number("edx")?,
        ..Default::default()
    })
}

/// Return the CPUID table of vCPU 0 in a machine with this `CpuConfig`: a tuple of `CpuidEntry`.
///
/// None means all that KVM supports on this host, which is more than any template offers.
///
/// Raises:
///     ConfigError: the configuration is invalid, or the host lacks a feature of its template.
///     KvmUnavailableError: there is no usable /dev/kvm.
#[pyfunction]
#[pyo3(signature = (cpu=None))]
pub(crate) fn cpuid_table<'py>(
    py: Python<'py>,
    cpu: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyTuple>> {
    let Some(cpu) = cpu else {
        let supported = py.detach(|| cpuid::supported(&open_kvm()?))?;
        return cpuid_entries(py, supported.as_slice());
    };
    let config = cpu_from_python(cpu)?;
    let table = py.detach(|| {
        config.check()?;
        let table = cpuid::guest_cpuid(&open_kvm()?, &config)?;
        table.with_vcpu(0, config.topology(), |table| Ok(table.as_slice().to_vec()))
    })?;
    cpuid_entries(py, &table)
}

/// Return the names of the features in a `CpuidEntry`, as in /proc/cpuinfo, by register: a dict of
/// tuples.
///
/// Registers without a known feature are left out.
#[pyfunction]
pub(crate) fn cpuid_features<'py>(
    py: Python<'py>,
    entry: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyDict>> {
    let kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, .. } = cpuid_entry(entry)?;
    let registers = [
        ("eax", Register::Eax, eax),
        ("ebx", Register::Ebx, ebx),
        ("ecx", Register::Ecx, ecx),
        ("edx", Register::Edx, edx),
    ];
    let found = PyDict::new(py);
    for (name, register, value) in registers {
        let names: Vec<_> = names_in((function, index), register, value).collect();
        if !names.is_empty() {
            found.set_item(name, PyTuple::new(py, names)?)?;
        }
    }
    Ok(found)
}
