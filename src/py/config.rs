//! Converts the Python configuration objects to the crate's `VmmConfig`. Errors name the key.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::PathBuf;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

use super::config_boot;
use super::config_cpu;
use super::config_part::{Part, bad, unlike};
use super::config_virtio;
use super::ending::import;
use crate::config::{
    Code, ExitPort, MemoryConfig, PcPart, PlatformConfig, SerialConfig, SerialInput, SerialOutput,
    VmmConfig,
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
        others: [
            other_serial(&all, "com2")?,
            other_serial(&all, "com3")?,
            other_serial(&all, "com4")?,
            other_serial(&all, "debugcon")?,
        ],
        exit_port: ExitPort(all.get(intern!(py, "exit_port"), port)?),
        irqchip: all.get(intern!(py, "irqchip"), OPTIONAL)?,
        pit: all.get(intern!(py, "pit"), OPTIONAL)?,
        fw_cfg: fw_cfg(&all)?,
        virtio: config_virtio::devices(&all)?,
        platform: platform(&all.part(
            intern!(py, "platform"),
            "platform",
            Some(&classes.platform),
        )?)?,
    })
}

const OPTIONAL: &str = "True, False or None";

/// The streams of a port that the machine need not have.
fn other_serial(all: &Part<'_>, key: &'static str) -> PyResult<Option<SerialConfig>> {
    let py = all.object.py();
    if all.object.getattr(key)?.is_none() {
        return Ok(None);
    }
    let class = &classes(py)?.serial;
    all.part(&PyString::intern(py, key), key, Some(class)).and_then(|part| serial(&part)).map(Some)
}

/// The files of `PlatformConfig.fw_cfg`: bytes, or a path.
fn fw_cfg(all: &Part<'_>) -> PyResult<Option<Vec<(String, Code)>>> {
    #[derive(FromPyObject)]
    enum Content {
        Bytes(Vec<u8>),
        Path(PathBuf),
    }
    let py = all.object.py();
    let class = Some(&classes(py)?.platform);
    let platform = all.part(intern!(py, "platform"), "platform", class)?;
    let fw_cfg = platform.object.getattr("fw_cfg")?;
    if fw_cfg.is_none() {
        return Ok(None);
    }
    let part = Part { object: fw_cfg, key: "platform.fw_cfg" };
    let files: BTreeMap<String, Content> =
        part.get(intern!(py, "files"), "a dict from names to bytes or paths")?;
    let code = |content| match content {
        Content::Bytes(bytes) => Code::Bytes(bytes),
        Content::Path(path) => Code::File(path),
    };
    Ok(Some(files.into_iter().map(|(name, content)| (name, code(content))).collect()))
}

fn platform(part: &Part<'_>) -> PyResult<PlatformConfig> {
    let py = part.object.py();
    Ok(PlatformConfig {
        acpi: part.get(intern!(py, "acpi"), OPTIONAL)?,
        pvpanic: part.get(intern!(py, "pvpanic"), OPTIONAL)?,
        reset_ports: part.get(intern!(py, "reset_ports"), OPTIONAL)?,
        screen: part.get(intern!(py, "screen"), OPTIONAL)?,
        debug_port: part.get(intern!(py, "debug_port"), OPTIONAL)?,
        pci: part.get(intern!(py, "pci"), OPTIONAL)?,
        hpet: part.get(intern!(py, "hpet"), OPTIONAL)?,
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

/// The keys of the ports with streams that are Python objects.
pub(super) fn python_streams(
    serial: &SerialConfig,
    others: &[Option<SerialConfig>],
) -> Vec<&'static str> {
    let is_python = |port: &SerialConfig| {
        matches!(port.output, Some(SerialOutput::Subscriber))
            || matches!(port.input, Some(SerialInput::Subscriber))
    };
    let first = is_python(serial).then_some("com1");
    let others = PcPart::PRINTING.into_iter().zip(others);
    let others = others.filter(|(_, port)| port.as_ref().is_some_and(is_python));
    first.into_iter().chain(others.map(|(part, _)| part.name())).collect()
}

/// The key of a port's streams in the configuration.
pub(super) fn stream_key(port: &'static str) -> &'static str {
    match port {
        "com1" => "serial",
        "debug_port" => "debugcon",
        other => other,
    }
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
