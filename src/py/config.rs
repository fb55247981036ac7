//! Converts the Python configuration objects to the crate's `VmmConfig`. Errors name the key.

use std::os::fd::RawFd;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

use super::config_boot;
use super::config_cpu;
use super::config_part::{Part, bad, unlike};
use super::ending::import;
use crate::config::{
    ExitPort, MemoryConfig, PlatformConfig, SerialConfig, SerialInput, SerialOutput, VmmConfig,
};
use crate::cpu::CpuConfig;
use crate::devices::{Direction, duplicate, input_file};

/// The classes of `pyvmm.config` that decide what is read.
struct Classes {
    config: Py<PyAny>,
    memory: Py<PyAny>,
    cpu: Py<PyAny>,
    serial: Py<PyAny>,
    platform: Py<PyAny>,
}

fn classes(py: Python<'_>) -> PyResult<&'static Classes> {
    static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();
    CLASSES.get_or_try_init(py, || {
        let module = import(py, "pyvmm.config")?;
        let class = |name: &str| module.getattr(name).map(Bound::unbind);
        Ok(Classes {
            config: class("VmmConfig")?,
            memory: class("MemoryConfig")?,
            cpu: class("CpuConfig")?,
            serial: class("SerialConfig")?,
            platform: class("PlatformConfig")?,
        })
    })
}

/// The crate's configuration. Files are opened and descriptors duplicated here, so that the machine
/// owns them.
pub(super) fn from_python(config: &Bound<'_, PyAny>) -> PyResult<VmmConfig> {
    let py = config.py();
    if !config.is_instance(classes(py)?.config.bind(py))? {
        return Err(bad("config", unlike(config, "a VmmConfig")));
    }
    let all = Part { object: config.clone(), key: "" };
    let classes = classes(py)?;
    let memory = all.part(intern!(py, "memory"), "memory", Some(&classes.memory))?;
    let size_mib = memory.get(intern!(py, "size_mib"), "a number of MiB from 1 to 8388607")?;
    let port = "a port from 0 to 0xfffc, or None";
    Ok(VmmConfig {
        memory: MemoryConfig { size_mib },
        cpu: config_cpu::cpu(&all.part(intern!(py, "cpu"), "cpu", Some(&classes.cpu))?)?,
        boot: config_boot::from_python(&all.part(intern!(py, "boot"), "boot", None)?)?,
        serial: serial(&all.part(intern!(py, "serial"), "serial", Some(&classes.serial))?)?,
        exit_port: ExitPort(all.get(intern!(py, "exit_port"), port)?),
        irqchip: all.get(intern!(py, "irqchip"), OPTIONAL)?,
        pit: all.get(intern!(py, "pit"), OPTIONAL)?,
        platform: platform(&all.part(
            intern!(py, "platform"),
            "platform",
            Some(&classes.platform),
        )?)?,
    })
}

const OPTIONAL: &str = "True, False or None";

fn platform(part: &Part<'_>) -> PyResult<PlatformConfig> {
    let py = part.object.py();
    Ok(PlatformConfig {
        acpi: part.get(intern!(py, "acpi"), OPTIONAL)?,
        pvpanic: part.get(intern!(py, "pvpanic"), OPTIONAL)?,
        reset_ports: part.get(intern!(py, "reset_ports"), OPTIONAL)?,
    })
}

/// The crate's configuration of vCPUs alone.
pub(super) fn cpu_from_python(config: Bound<'_, PyAny>) -> PyResult<CpuConfig> {
    let py = config.py();
    if !config.is_instance(classes(py)?.cpu.bind(py))? {
        return Err(bad("cpu", unlike(&config, "a CpuConfig")));
    }
    config_cpu::cpu(&Part { object: config, key: "cpu" })
}

/// The result of `pyvmm.streams.endpoint` for a stream.
#[derive(FromPyObject)]
enum Endpoint {
    Fd(RawFd),
    Path(String),
}

fn serial(part: &Part<'_>) -> PyResult<SerialConfig> {
    let py = part.object.py();
    let output = match endpoint(part, intern!(py, "output"))? {
        None => None,
        Some(None) => Some(SerialOutput::Subscriber),
        Some(Some(Endpoint::Fd(fd))) => Some(SerialOutput::Fd(duplicate(fd, Direction::Output)?)),
        Some(Some(Endpoint::Path(path))) => Some(SerialOutput::File(path.into())),
    };
    let input = match endpoint(part, intern!(py, "input"))? {
        None => None,
        Some(None) => Some(SerialInput::Subscriber),
        Some(Some(Endpoint::Fd(fd))) => Some(SerialInput::Fd(duplicate(fd, Direction::Input)?)),
        Some(Some(Endpoint::Path(path))) => Some(SerialInput::Fd(input_file(path.as_ref())?)),
    };
    Ok(SerialConfig { output, input, input_eof: part.get(intern!(py, "input_eof"), "bytes")? })
}

/// The streams of a `SerialConfig`.
pub(super) fn serial_from_python(config: Bound<'_, PyAny>) -> PyResult<SerialConfig> {
    let py = config.py();
    if !config.is_instance(classes(py)?.serial.bind(py))? {
        return Err(bad("serial", unlike(&config, "a SerialConfig")));
    }
    serial(&Part { object: config, key: "serial" })
}

/// Whether Python objects are to be connected to the streams.
pub(super) fn has_python_streams(serial: &SerialConfig) -> bool {
    matches!(serial.output, Some(SerialOutput::Subscriber))
        || matches!(serial.input, Some(SerialInput::Subscriber))
}

/// None means no stream. An inner None means a Python object, which `pyvmm.streams` connects.
fn endpoint<'py>(
    part: &Part<'py>,
    name: &Bound<'py, PyString>,
) -> PyResult<Option<Option<Endpoint>>> {
    let value = part.object.getattr(name)?;
    if value.is_none() {
        return Ok(None);
    }
    let streams = import(part.object.py(), "pyvmm.streams")?;
    let found = streams.call_method1("endpoint", (&value, part.at(&name.to_string())))?;
    Ok(Some(found.extract()?))
}
