//! Converts the Python configuration of virtio devices.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use super::config_part::{Part, bad, unlike};
use super::ending::import;
use crate::config::{RngConfig, VirtioConfig};

/// The devices of a machine, in the order of their addresses.
pub(super) fn devices(all: &Part<'_>) -> PyResult<Vec<VirtioConfig>> {
    let mut devices = Vec::new();
    let rng = all.object.getattr(intern!(all.object.py(), "rng"))?;
    if !rng.is_none() {
        devices.push(device(&rng, "rng")?);
    }
    Ok(devices)
}

/// The configurations that a fork is given for devices of its snapshot, by name.
pub(super) fn given(devices: &Bound<'_, PyDict>) -> PyResult<Vec<(String, VirtioConfig)>> {
    let one = |(name, config): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
        let name: String = name.extract()?;
        let config = device(&config, "virtio")?;
        Ok((name, config))
    };
    devices.iter().map(one).collect()
}

/// The configuration of one device, by its class.
fn device(object: &Bound<'_, PyAny>, key: &'static str) -> PyResult<VirtioConfig> {
    let py = object.py();
    let module = import(py, "pyvmm.config")?;
    let is = |class: &Bound<'_, PyString>| object.is_instance(&module.getattr(class)?);
    let part = Part { object: object.clone(), key };
    if is(intern!(py, "Rng"))? {
        let seed = part.get(intern!(py, "seed"), "a number from 0 to 2**64 - 1, or None")?;
        return Ok(VirtioConfig::Rng(RngConfig { seed }));
    }
    Err(bad(key, unlike(object, "the configuration of a virtio device")))
}
