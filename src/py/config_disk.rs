//! Converts the Python configuration of disks.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use super::config_part::{Part, bad};
use super::disk_backend::PythonBackend;
use crate::config::{DiskConfig, RateLimits};
use crate::disk::{Contents, Format, Layer};

/// What takes the writes, in Python.
#[derive(FromPyObject)]
enum Overlay {
    Flag(bool),
    Path(PathBuf),
}

pub(super) fn disk(part: &Part<'_>) -> PyResult<DiskConfig> {
    let py = part.object.py();
    let format: String = part.get(intern!(py, "format"), FORMATS)?;
    let format = match format.as_str() {
        "auto" => Format::Auto,
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        _ => return Err(bad(part.at("format"), format!("{format:?} is not {FORMATS}"))),
    };
    let layer = match part.get(intern!(py, "overlay"), "True, False, or a path")? {
        Overlay::Flag(false) => Layer::None,
        Overlay::Flag(true) => Layer::Memory,
        Overlay::Path(path) => Layer::File(path),
    };
    let rate = |name: &Bound<'_, PyString>| part.get(name, "a number from 1 on, or None");
    let limits = RateLimits {
        bytes: rate(intern!(py, "bytes_per_second"))?,
        operations: rate(intern!(py, "operations_per_second"))?,
    };
    let config = DiskConfig {
        contents: contents(part, format)?,
        layer,
        read_only: part.get(intern!(py, "read_only"), "True or False")?,
        serial: part.get(intern!(py, "serial"), "up to 20 printable ASCII characters")?,
        block_size: part.get(intern!(py, "block_size"), "512, 1024, 2048 or 4096")?,
        limits,
    };
    config.check()?;
    Ok(config)
}

const FORMATS: &str = "\"auto\", \"raw\" or \"qcow2\"";

fn contents(part: &Part<'_>, format: Format) -> PyResult<Contents> {
    let source = part.object.getattr(intern!(part.object.py(), "source"))?;
    if let Ok(bytes) = source.cast::<PyBytes>() {
        return Ok(Contents::Bytes(bytes.as_bytes().to_vec()));
    }
    if let Ok(path) = source.extract::<PathBuf>() {
        return Ok(Contents::File(path, format));
    }
    let backend = PythonBackend::new(&source, &part.at("source"))?;
    Ok(Contents::Backend(Arc::new(backend)))
}
