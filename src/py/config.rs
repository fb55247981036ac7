//! From the Python configuration objects to the crate's `VmmConfig`: by attribute, with the place of what is
//! wrong in the error.

use std::fs::File;
use std::os::fd::RawFd;
use std::path::PathBuf;

use pyo3::prelude::*;

use crate::config::{
    Boot, Code, CpuConfig, CpuMode, CpuTemplate, ExitPort, FlatBoot, LinuxBoot, MemoryConfig,
    SerialConfig, SerialInput, SerialOutput, VmmConfig,
};
use crate::devices::duplicate;
use crate::error::{Error, ErrorKind};

/// An object of the configuration and the key that leads to it.
struct Part<'py> {
    object: Bound<'py, PyAny>,
    key: &'static str,
}

impl<'py> Part<'py> {
    fn at(&self, name: &str) -> String {
        if self.key.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.key)
        }
    }

    fn get<T>(&self, name: &str) -> PyResult<T>
    where
        T: for<'a> FromPyObject<'a, 'py, Error: Into<PyErr>>,
    {
        let value = self.object.getattr(name)?;
        value
            .extract()
            .map_err(|e: <T as FromPyObject<'_, 'py>>::Error| {
                let error: PyErr = e.into();
                let reason = error.value(self.object.py()).to_string();
                bad(self.at(name), reason)
            })
    }

    fn part(&self, name: &'static str) -> PyResult<Self> {
        Ok(Self {
            object: self.object.getattr(name)?,
            key: name,
        })
    }

    fn has(&self, name: &str) -> PyResult<bool> {
        self.object.hasattr(name)
    }
}

fn bad(at: impl Into<String>, detail: impl Into<String>) -> PyErr {
    Error::new(ErrorKind::Config, at, detail).into()
}

/// The crate's configuration. Files are opened and descriptors duplicated here: the machine owns its own.
pub(super) fn from_python(config: &Bound<'_, PyAny>) -> PyResult<VmmConfig> {
    if config.get_type().name()? != "VmmConfig" {
        let class = config.get_type().name()?;
        return Err(bad("config", format!("a VmmConfig is needed, not {class}")));
    }
    let all = Part {
        object: config.clone(),
        key: "",
    };
    Ok(VmmConfig {
        memory: MemoryConfig {
            size_mib: all.part("memory")?.get("size_mib")?,
        },
        cpu: cpu(&all.part("cpu")?)?,
        boot: boot(&all.part("boot")?)?,
        serial: serial(&all.part("serial")?)?,
        exit_port: ExitPort(all.get("exit_port")?),
        irqchip: all.get("irqchip")?,
        pit: all.get("pit")?,
    })
}

fn cpu(part: &Part<'_>) -> PyResult<CpuConfig> {
    let template = match part.get::<String>("template")?.as_str() {
        "auto" => CpuTemplate::Auto,
        "host" => CpuTemplate::Host,
        "software-kvm" => CpuTemplate::SoftwareKvm,
        other => {
            let detail = format!("'{other}' is not one of auto, host, software-kvm");
            return Err(bad("cpu.template", detail));
        }
    };
    Ok(CpuConfig {
        vcpus: part.get("vcpus")?,
        hide: part.get("hide")?,
        template,
    })
}

fn boot(part: &Part<'_>) -> PyResult<Boot> {
    if part.has("kernel")? {
        return Ok(Boot::Linux(LinuxBoot {
            kernel: part.get("kernel")?,
            initrd: part.get("initrd")?,
            cmdline: part.get("cmdline")?,
            load_address: part.get("load_address")?,
        }));
    }
    if part.has("code")? {
        return Ok(Boot::Flat(flat(part)?));
    }
    if part.object.get_type().name()? == "EmbeddedBoot" {
        return Ok(Boot::Embedded);
    }
    Err(bad(
        "boot",
        "an EmbeddedBoot, FlatBoot or LinuxBoot is needed",
    ))
}

fn flat(part: &Part<'_>) -> PyResult<FlatBoot> {
    let code: Vec<u8> = part.get("code")?;
    let path: Option<PathBuf> = part.get("path")?;
    let code = match path {
        Some(_) if !code.is_empty() => {
            return Err(bad("boot.path", "code is given too: one of them is enough"));
        }
        Some(path) => Code::File(path),
        None => Code::Bytes(code),
    };
    let mode = match part.get::<String>("mode")?.as_str() {
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
        address: part.get("address")?,
        entry: part.get("entry")?,
        mode,
    })
}

/// What `pyvmm.streams.endpoint` makes of a stream.
#[derive(FromPyObject)]
enum Endpoint {
    Fd(RawFd),
    Path(String),
}

fn serial(part: &Part<'_>) -> PyResult<SerialConfig> {
    let output = match endpoint(part, "output")? {
        None => None,
        Some(None) => Some(SerialOutput::Subscriber),
        Some(Some(Endpoint::Fd(fd))) => Some(SerialOutput::Fd(duplicate(fd, "serial.output")?)),
        Some(Some(Endpoint::Path(path))) => Some(SerialOutput::File(path.into())),
    };
    let input = match endpoint(part, "input")? {
        None => None,
        Some(None) => Some(SerialInput::Subscriber),
        Some(Some(Endpoint::Fd(fd))) => Some(SerialInput::Fd(duplicate(fd, "serial.input")?)),
        Some(Some(Endpoint::Path(path))) => {
            let file =
                File::open(&path).map_err(|e| bad("serial.input", format!("{path}: {e}")))?;
            Some(SerialInput::Fd(file.into()))
        }
    };
    Ok(SerialConfig {
        output,
        input,
        input_eof: part.get("input_eof")?,
    })
}

/// None: no stream. An inner none: a Python object, which `pyvmm.streams` connects.
fn endpoint(part: &Part<'_>, name: &str) -> PyResult<Option<Option<Endpoint>>> {
    let value = part.object.getattr(name)?;
    if value.is_none() {
        return Ok(None);
    }
    let streams = part.object.py().import("pyvmm.streams")?;
    let found = streams.call_method1("endpoint", (&value, part.at(name)))?;
    Ok(Some(found.extract()?))
}
