//! The hops of a flow, for the test that compares them with docs/architecture.md. In builds with
//! debug assertions only.

use pyo3::prelude::*;

use super::trace::PyTrace;
use crate::hop;

#[pymethods]
impl PyTrace {
    /// Start or stop recording hops. Returns those since the last call: thread, file, function.
    #[staticmethod]
    fn _record_hops(is_recording: bool) -> Vec<(Option<String>, &'static str, &'static str)> {
        let hops = hop::record(is_recording);
        hops.into_iter().map(|hop| (hop.thread, hop.file, hop.function)).collect()
    }
}
