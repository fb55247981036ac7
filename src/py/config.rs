//! Converts the Python configuration objects to the crate's `VmmConfig`. Errors name the key.

use std::os::fd::RawFd;
use std::path::PathBuf;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

use super::ending::import;
use super::items::Items;
use crate::config::{
    Boot, Code, ElfBoot, ExitPort, FlatBoot, LinuxBoot, MemoryConfig, SerialConfig, SerialInput,
    SerialOutput, VmmConfig,
};
use crate::cpu::{CpuConfig, CpuMode, CpuTemplate};
use crate::devices::{Direction, duplicate, input_file};
use crate::error::{Error, ErrorKind};

/// An object of the configuration and its key.
struct Part<'py> {
    object: Bound<'py, PyAny>,
    key: &'static str,
}

impl<'py> Part<'py> {
    fn at(&self, name: &str) -> String {
        if self.key.is_empty() { name.to_owned() } else { format!("{}.{name}", self.key) }
    }

    /// The value of a key. The error says what is `needed`.
    fn get<T>(&self, name: &Bound<'py, PyString>, needed: &str) -> PyResult<T>
    where
        T: for<'a> FromPyObject<'a, 'py>,
    {
        let value = self.object.getattr(name)?;
        value.extract().map_err(|_| bad(self.at(&name.to_string()), unlike(&value, needed)))
    }

    /// A part of the configuration, of this class or of any class that is checked later.
    fn part(
        &self,
        name: &Bound<'py, PyString>,
        key: &'static str,
        class: Option<&Py<PyAny>>,
    ) -> PyResult<Self> {
        let object = self.object.getattr(name)?;
        if let Some(class) = class.map(|class| class.bind(object.py()))
            && !object.is_instance(class)?
        {
            let needed = format!("a {}", class.getattr("__name__")?);
            return Err(bad(key, unlike(&object, &needed)));
        }
        Ok(Self { object, key })
    }
}

/// The classes of `pyvmm.config` that decide what is read.
struct Classes {
    config: Py<PyAny>,
    memory: Py<PyAny>,
    cpu: Py<PyAny>,
    serial: Py<PyAny>,
    embedded: Py<PyAny>,
    flat: Py<PyAny>,
    elf: Py<PyAny>,
    linux: Py<PyAny>,
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
            embedded: class("EmbeddedBoot")?,
            flat: class("FlatBoot")?,
            elf: class("ElfBoot")?,
            linux: class("LinuxBoot")?,
        })
    })
}

/// The error text for a value of the wrong kind.
fn unlike(value: &Bound<'_, PyAny>, needed: &str) -> String {
    /// The maximum number of characters of a value in an error.
    const SHOWN: usize = 60;
    let shown = value.repr().map(|shown| shown.to_string()).unwrap_or_default();
    let class = value.get_type().name().map(|name| name.to_string()).unwrap_or_default();
    let is_short = (1..=SHOWN).contains(&shown.chars().count());
    format!("expected {needed}, not {}", if is_short { shown } else { class })
}

fn bad(at: impl Into<String>, detail: impl Into<String>) -> PyErr {
    Error::new(ErrorKind::Config, at, detail).into()
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
        cpu: cpu(&all.part(intern!(py, "cpu"), "cpu", Some(&classes.cpu))?)?,
        boot: boot(&all.part(intern!(py, "boot"), "boot", None)?)?,
        serial: serial(&all.part(intern!(py, "serial"), "serial", Some(&classes.serial))?)?,
        exit_port: ExitPort(all.get(intern!(py, "exit_port"), port)?),
        irqchip: all.get(intern!(py, "irqchip"), "True, False or None")?,
        pit: all.get(intern!(py, "pit"), "True, False or None")?,
    })
}

fn cpu(part: &Part<'_>) -> PyResult<CpuConfig> {
    let py = part.object.py();
    let templates = "one of auto, host, software-kvm";
    let template = match part.get::<String>(intern!(py, "template"), templates)?.as_str() {
        "auto" => CpuTemplate::Auto,
        "host" => CpuTemplate::Host,
        "software-kvm" => CpuTemplate::SoftwareKvm,
        other => {
            let detail = format!("'{other}' is not one of auto, host, software-kvm");
            return Err(bad("cpu.template", detail));
        }
    };
    let names = "a sequence of names, as in [\"avx2\"]";
    Ok(CpuConfig {
        vcpus: part.get(intern!(py, "vcpus"), "a number from 1 to 254")?,
        hide: part.get::<Items<_>>(intern!(py, "hide"), names)?.0,
        expose: part.get::<Items<_>>(intern!(py, "expose"), names)?.0,
        template,
        fixups: part.get(intern!(py, "fixups"), "True or False")?,
    })
}

fn boot(part: &Part<'_>) -> PyResult<Boot> {
    let py = part.object.py();
    let classes = classes(py)?;
    let is = |class: &Py<PyAny>| part.object.is_instance(class.bind(py));
    if is(&classes.linux)? {
        return Ok(Boot::Linux(LinuxBoot {
            kernel: part.get(intern!(py, "kernel"), "a path")?,
            initrd: part.get(intern!(py, "initrd"), "a path, or None")?,
            cmdline: part.get(intern!(py, "cmdline"), "a str")?,
            load_address: part.get(intern!(py, "load_address"), "an address, or None")?,
        }));
    }
    if is(&classes.flat)? {
        return Ok(Boot::Flat(flat(part)?));
    }
    if is(&classes.elf)? {
        return Ok(Boot::Elf(ElfBoot {
            path: part.get(intern!(py, "path"), "a path")?,
            stack_kib: part.get(intern!(py, "stack_kib"), "a number of KiB from 1")?,
        }));
    }
    if is(&classes.embedded)? {
        return Ok(Boot::Embedded);
    }
    Err(bad("boot", unlike(&part.object, "an EmbeddedBoot, FlatBoot, ElfBoot or LinuxBoot")))
}

fn flat(part: &Part<'_>) -> PyResult<FlatBoot> {
    let py = part.object.py();
    let code: PyBackedBytes = part.get(intern!(py, "code"), "bytes")?;
    let path: Option<PathBuf> = part.get(intern!(py, "path"), "a path, or None")?;
    let code = match path {
        Some(_) if !code.is_empty() => {
            return Err(bad("boot.path", "give either path or code, not both"));
        }
        Some(path) => Code::File(path),
        None => Code::Bytes(code.to_vec()),
    };
    let modes = "one of real16, protected32, long64, user64";
    let mode = match part.get::<String>(intern!(py, "mode"), modes)?.as_str() {
        "real16" => CpuMode::Real16,
        "protected32" => CpuMode::Protected32,
        "long64" => CpuMode::Long64,
        "user64" => CpuMode::User64,
        other => {
            let detail = format!("'{other}' is not one of real16, protected32, long64, user64");
            return Err(bad("boot.mode", detail));
        }
    };
    Ok(FlatBoot {
        code,
        address: part.get(intern!(py, "address"), "an address from 0 to 2^64 - 1")?,
        entry: part.get(intern!(py, "entry"), "an address from 0 to 2^64 - 1, or None")?,
        mode,
    })
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
