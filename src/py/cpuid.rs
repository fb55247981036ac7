//! CPUID tables as tuples of `pyvmm.registers.CpuidEntry`.

use kvm_bindings::kvm_cpuid_entry2;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::ending::import;

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
