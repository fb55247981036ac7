//! Converts what a machine starts from Python. Errors name the key.

use std::path::PathBuf;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::sync::PyOnceLock;

use super::config_part::{Part, bad, unlike};
use super::ending::import;
use super::items::Items;
use crate::config::{
    Boot, Code, ElfBoot, FirmwareBoot, FlatBoot, KernelBoot, KernelProtocol, LinuxBoot,
    LinuxProtocol, Module,
};
use crate::cpu::CpuMode;

/// The classes of `pyvmm.boots`.
struct Classes {
    embedded: Py<PyAny>,
    flat: Py<PyAny>,
    elf: Py<PyAny>,
    linux: Py<PyAny>,
    kernel: Py<PyAny>,
    firmware: Py<PyAny>,
    module: Py<PyAny>,
}

fn classes(py: Python<'_>) -> PyResult<&'static Classes> {
    static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();
    CLASSES.get_or_try_init(py, || {
        let module = import(py, "pyvmm.boots")?;
        let class = |name: &str| module.getattr(name).map(Bound::unbind);
        Ok(Classes {
            embedded: class("EmbeddedBoot")?,
            flat: class("FlatBoot")?,
            elf: class("ElfBoot")?,
            linux: class("LinuxBoot")?,
            kernel: class("KernelBoot")?,
            firmware: class("FirmwareBoot")?,
            module: class("BootModule")?,
        })
    })
}

/// What the machine starts.
pub(super) fn from_python(part: &Part<'_>) -> PyResult<Boot> {
    let py = part.object.py();
    let classes = classes(py)?;
    let is = |class: &Py<PyAny>| part.object.is_instance(class.bind(py));
    if is(&classes.linux)? {
        return linux(part).map(Boot::Linux);
    }
    if is(&classes.kernel)? {
        return kernel(part, &classes.module).map(Boot::Kernel);
    }
    if is(&classes.flat)? {
        return flat(part).map(Boot::Flat);
    }
    if is(&classes.elf)? {
        return Ok(Boot::Elf(ElfBoot {
            path: part.get(intern!(py, "path"), "a path")?,
            stack_kib: part.get(intern!(py, "stack_kib"), "a number of KiB from 1")?,
        }));
    }
    if is(&classes.firmware)? {
        return Ok(Boot::Firmware(FirmwareBoot { path: part.get(intern!(py, "path"), "a path")? }));
    }
    if is(&classes.embedded)? {
        return Ok(Boot::Embedded);
    }
    let all = "an EmbeddedBoot, FlatBoot, ElfBoot, LinuxBoot, KernelBoot or FirmwareBoot";
    Err(bad("boot", unlike(&part.object, all)))
}

/// The value that has this name in Python.
fn chosen<T: Copy>(part: &Part<'_>, key: &str, values: &[(&str, T)]) -> PyResult<T> {
    let names: Vec<&str> = values.iter().map(|(name, _)| *name).collect();
    let names = names.join(", ");
    let name = pyo3::types::PyString::new(part.object.py(), key);
    let given: String = part.get(&name, &format!("one of {names}"))?;
    let found = values.iter().find(|(name, _)| *name == given);
    found
        .map(|(_, value)| *value)
        .ok_or_else(|| bad(part.at(key), format!("'{given}' is not one of {names}")))
}

fn linux(part: &Part<'_>) -> PyResult<LinuxBoot> {
    let py = part.object.py();
    let protocols = [
        ("auto", LinuxProtocol::Auto),
        ("64-bit", LinuxProtocol::Bits64),
        ("32-bit", LinuxProtocol::Bits32),
        ("pvh", LinuxProtocol::Pvh),
    ];
    Ok(LinuxBoot {
        kernel: part.get(intern!(py, "kernel"), "a path")?,
        initrd: initrd(part)?,
        cmdline: part.get(intern!(py, "cmdline"), "a str")?,
        load_address: part.get(intern!(py, "load_address"), "an address, or None")?,
        protocol: chosen(part, "protocol", &protocols)?,
        unpack: part.get(intern!(py, "unpack"), "True, False or None")?,
    })
}

/// One path, several, or none.
fn initrd(part: &Part<'_>) -> PyResult<Vec<PathBuf>> {
    let name = intern!(part.object.py(), "initrd");
    let value = part.object.getattr(name)?;
    if value.is_none() {
        return Ok(Vec::new());
    }
    if let Ok(path) = value.extract::<PathBuf>() {
        return Ok(vec![path]);
    }
    let paths: Items<PathBuf> = part.get(name, "a path, a sequence of paths, or None")?;
    Ok(paths.0)
}

fn kernel(part: &Part<'_>, module_class: &Py<PyAny>) -> PyResult<KernelBoot> {
    let py = part.object.py();
    let protocols = [
        ("auto", KernelProtocol::Auto),
        ("pvh", KernelProtocol::Pvh),
        ("multiboot", KernelProtocol::Multiboot),
        ("elf", KernelProtocol::Elf),
    ];
    let sequence = "a sequence of paths or BootModules";
    let given: Items<Bound<'_, PyAny>> = part.get(intern!(py, "modules"), sequence)?;
    let modules: PyResult<Vec<Module>> =
        given.0.into_iter().map(|object| module(object, module_class)).collect();
    Ok(KernelBoot {
        kernel: part.get(intern!(py, "kernel"), "a path")?,
        cmdline: part.get(intern!(py, "cmdline"), "a str")?,
        modules: modules?,
        protocol: chosen(part, "protocol", &protocols)?,
    })
}

fn module(object: Bound<'_, PyAny>, class: &Py<PyAny>) -> PyResult<Module> {
    let py = object.py();
    if !object.is_instance(class.bind(py))? {
        let needed = "paths or BootModules";
        let path = object.extract().map_err(|_| bad("boot.modules", unlike(&object, needed)))?;
        return Ok(Module { path, cmdline: String::new() });
    }
    let part = Part { object, key: "boot.modules" };
    Ok(Module {
        path: part.get(intern!(py, "path"), "a path")?,
        cmdline: part.get(intern!(py, "cmdline"), "a str")?,
    })
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
    let modes = [
        ("real16", CpuMode::Real16),
        ("protected32", CpuMode::Protected32),
        ("long64", CpuMode::Long64),
        ("user64", CpuMode::User64),
    ];
    Ok(FlatBoot {
        code,
        address: part.get(intern!(py, "address"), "an address from 0 to 2^64 - 1")?,
        entry: part.get(intern!(py, "entry"), "an address from 0 to 2^64 - 1, or None")?,
        mode: chosen(part, "mode", &modes)?,
    })
}
