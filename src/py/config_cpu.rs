//! Converts a `CpuConfig` of Python, and its template, to the crate's. Errors name the key.

use pyo3::intern;
use pyo3::prelude::*;

use super::config_part::{Part, bad, unlike};
use super::ending::import;
use super::items::Items;
use crate::cpu::{BaseTemplate, CpuConfig, CpuTemplate, Register, RegisterBits};

const NAMES: &str = "a sequence of names, as in [\"avx2\"]";

pub(super) fn cpu(part: &Part<'_>) -> PyResult<CpuConfig> {
    let py = part.object.py();
    let count = "a number from 1";
    Ok(CpuConfig {
        vcpus: part.get(intern!(py, "vcpus"), "a number from 1 to 4096")?,
        sockets: part.get(intern!(py, "sockets"), count)?,
        threads: part.get(intern!(py, "threads"), count)?,
        hide: part.get::<Items<_>>(intern!(py, "hide"), NAMES)?.0,
        expose: part.get::<Items<_>>(intern!(py, "expose"), NAMES)?.0,
        template: template(&part.object.getattr(intern!(py, "template"))?)?,
        fixups: part.get(intern!(py, "fixups"), "True or False")?,
    })
}

/// A template by name, in a file or as an object.
fn template(value: &Bound<'_, PyAny>) -> PyResult<CpuTemplate> {
    let py = value.py();
    let named = value.extract::<&str>().ok().and_then(BaseTemplate::named);
    if let Some(base) = named {
        return Ok(base.into());
    }
    let object = import(py, "pyvmm.cpu_template")?.call_method1("resolve", (value,))?;
    let part = Part { object, key: "cpu.template" };
    let base: String = part.get(intern!(py, "base"), "the name of a template")?;
    let Some(base) = BaseTemplate::named(&base) else {
        let names = BaseTemplate::ALL.map(BaseTemplate::name).join(", ");
        return Err(bad("cpu.template.base", format!("'{base}' is not one of {names}")));
    };
    let bits: Items<Bound<'_, PyAny>> =
        part.get(intern!(py, "bits"), "a sequence of RegisterBits")?;
    Ok(CpuTemplate {
        base,
        hide: part.get::<Items<_>>(intern!(py, "hide"), NAMES)?.0,
        expose: part.get::<Items<_>>(intern!(py, "expose"), NAMES)?.0,
        bits: bits.0.into_iter().map(register_bits).collect::<PyResult<_>>()?,
    })
}

fn register_bits(object: Bound<'_, PyAny>) -> PyResult<RegisterBits> {
    let py = object.py();
    if !object.hasattr(intern!(py, "subleaf"))? {
        return Err(bad("cpu.template.bits", unlike(&object, "a RegisterBits")));
    }
    let part = Part { object, key: "cpu.template.bits" };
    let number = "a number of 32 bits";
    let registers = "one of eax, ebx, ecx, edx";
    let register = match part.get::<String>(intern!(py, "register"), registers)?.as_str() {
        "eax" => Register::Eax,
        "ebx" => Register::Ebx,
        "ecx" => Register::Ecx,
        "edx" => Register::Edx,
        other => {
            let detail = format!("'{other}' is not {registers}");
            return Err(bad("cpu.template.bits.register", detail));
        }
    };
    Ok(RegisterBits {
        leaf: (part.get(intern!(py, "leaf"), number)?, part.get(intern!(py, "subleaf"), number)?),
        register,
        clear: part.get(intern!(py, "clear"), number)?,
        set: part.get(intern!(py, "set"), number)?,
    })
}
