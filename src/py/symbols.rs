//! `Vmm` for Python, continued: the names of an ELF program. On the caller's thread.

use std::collections::BTreeMap;

use pyo3::prelude::*;

use super::vmm::PyVmm;

#[pymethods]
impl PyVmm {
    /// The addresses of the functions, variables and labels of the program of `ElfBoot`, by name.
    ///
    /// Empty if its file has no symbols, or the machine runs something else. Forks have them too.
    #[getter]
    fn symbols(&self, py: Python<'_>) -> PyResult<BTreeMap<String, u64>> {
        let vmm = self.core()?;
        Ok(py.detach(|| vmm.symbols())?)
    }
}
