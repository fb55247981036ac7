//! Converts the Python configuration of virtio devices.

use std::path::PathBuf;
use std::time::Duration;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use super::config_disk::disk;
use super::config_net;
use super::config_part::{Part, bad, unlike};
use super::ending::import;
use super::virtio_custom;
use crate::config::{
    BalloonConfig, ConsoleConfig, ConsolePort, NetConfig, RngConfig, ShareConfig, VirtioConfig,
    VsockConfig,
};
use crate::share::Options;
use crate::snapshot::Snapshot;

/// The devices of a machine, in the order of their addresses.
pub(super) fn devices(all: &Part<'_>) -> PyResult<Vec<VirtioConfig>> {
    let py = all.object.py();
    let mut devices = Vec::new();
    for part in all.object.getattr("disks")?.try_iter()? {
        devices.push(device(&part?, "disks")?);
    }
    let nets: Vec<Bound<'_, PyAny>> = all.get(intern!(py, "nets"), "a sequence of Net")?;
    for (number, net) in nets.into_iter().enumerate() {
        devices.push(VirtioConfig::Net(self::net(net, number)?));
    }
    for key in ["console", "rng", "balloon", "vsock"] {
        let part = all.object.getattr(key)?;
        if !part.is_none() {
            devices.push(device(&part, key)?);
        }
    }
    for part in all.object.getattr("shares")?.try_iter()? {
        devices.push(device(&part?, "shares")?);
    }
    let custom: Vec<Bound<'_, PyAny>> =
        all.get(intern!(all.object.py(), "virtio"), "a sequence of virtio devices in Python")?;
    for object in &custom {
        devices.push(VirtioConfig::Custom(virtio_custom::from_python(object)?));
    }
    Ok(devices)
}

/// The configurations that a fork is given for devices of its snapshot, by name.
pub(super) fn given(
    devices: Option<&Bound<'_, PyDict>>,
    snapshot: &Snapshot,
) -> PyResult<Vec<(String, VirtioConfig)>> {
    let one = |(name, config): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
        let expected = "names of devices, such as \"disk0\"";
        let name: String = name.extract().map_err(|_| bad("virtio", unlike(&name, expected)))?;
        snapshot.virtio_device(&name)?;
        let number = name.strip_prefix("net").and_then(|number| number.parse().ok());
        let config = match number {
            Some(number) => VirtioConfig::Net(net(config, number)?),
            None => device(&config, "virtio")?,
        };
        Ok((name, config))
    };
    devices.map_or_else(|| Ok(Vec::new()), |devices| devices.iter().map(one).collect())
}

fn net(object: Bound<'_, PyAny>, number: usize) -> PyResult<NetConfig> {
    let class = import(object.py(), "pyvmm.nets")?.getattr(intern!(object.py(), "Net"))?;
    if !object.is_instance(&class)? {
        return Err(bad(format!("nets[{number}]"), unlike(&object, "a Net")));
    }
    config_net::net(&Part { object, key: "nets" }, number)
}

/// The configuration of one device, by its class.
fn device(object: &Bound<'_, PyAny>, key: &'static str) -> PyResult<VirtioConfig> {
    let py = object.py();
    let module = import(py, "pyvmm.config")?;
    let is = |class: &Bound<'_, PyString>| object.is_instance(&module.getattr(class)?);
    let part = Part { object: object.clone(), key };
    if is(intern!(py, "Disk"))? {
        return Ok(VirtioConfig::Disk(disk(&part)?));
    }
    if is(intern!(py, "Rng"))? {
        let seed = part.get(intern!(py, "seed"), "a number from 0 to 2**64 - 1, or None")?;
        return Ok(VirtioConfig::Rng(RngConfig { seed }));
    }
    if is(intern!(py, "VirtioConsole"))? {
        return Ok(VirtioConfig::Console(console(&part)?));
    }
    if is(intern!(py, "Balloon"))? {
        return Ok(VirtioConfig::Balloon(balloon(&part)?));
    }
    if is(intern!(py, "Share"))? {
        return Ok(VirtioConfig::Share(share(&part)?));
    }
    if is(intern!(py, "Vsock"))? {
        let cid = part.get(intern!(py, "cid"), "a number from 3 to 2**32 - 2")?;
        let uds_path = part.get(intern!(py, "uds_path"), "a path or None")?;
        return Ok(VirtioConfig::Vsock(VsockConfig { cid, uds_path }));
    }
    if object.hasattr(intern!(py, "process"))? {
        return Ok(VirtioConfig::Custom(virtio_custom::from_python(object)?));
    }
    Err(bad(key, unlike(object, "the configuration of a virtio device")))
}

/// A port: its name, or a `ConsolePort`.
fn console_port(port: &Bound<'_, PyAny>) -> PyResult<ConsolePort> {
    if let Ok(name) = port.extract() {
        return Ok(ConsolePort { name, path: None });
    }
    let py = port.py();
    let class = import(py, "pyvmm.config")?.getattr(intern!(py, "ConsolePort"))?;
    if !port.is_instance(&class)? {
        return Err(bad("console.ports", unlike(port, "a name or a ConsolePort")));
    }
    let part = Part { object: port.clone(), key: "console.ports" };
    let name = part.get(intern!(py, "name"), "a name")?;
    Ok(ConsolePort { name, path: part.get(intern!(py, "path"), "a path, or None")? })
}

fn console(part: &Part<'_>) -> PyResult<ConsoleConfig> {
    let py = part.object.py();
    let all: Vec<Bound<'_, PyAny>> = part.get(intern!(py, "ports"), "a sequence of ports")?;
    let ports = all.iter().map(console_port).collect::<PyResult<_>>()?;
    let characters = "a number from 0 to 65535";
    let columns = part.get(intern!(py, "columns"), characters)?;
    Ok(ConsoleConfig { ports, size: (columns, part.get(intern!(py, "rows"), characters)?) })
}

fn balloon(part: &Part<'_>) -> PyResult<BalloonConfig> {
    let py = part.object.py();
    let seconds: Option<f64> =
        part.get(intern!(py, "statistics_s"), "a number of seconds from 0.01 on, or None")?;
    let statistics = match seconds {
        None => None,
        Some(seconds) => Some(
            Duration::try_from_secs_f64(seconds)
                .ok()
                .filter(|period| (SHORTEST..LONGEST).contains(period))
                .ok_or_else(|| {
                    let detail = format!("{seconds} is not from 0.01 to 1000000 seconds");
                    bad(part.at("statistics_s"), detail)
                })?,
        ),
    };
    Ok(BalloonConfig {
        target_mib: part.get(intern!(py, "target_mib"), "a number of MiB from 0 to 2**32 - 1")?,
        deflate_on_oom: part.get(intern!(py, "deflate_on_oom"), "True or False")?,
        reporting: part.get(intern!(py, "reporting"), "True or False")?,
        statistics,
    })
}

const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(1_000_001);

fn share(part: &Part<'_>) -> PyResult<ShareConfig> {
    let py = part.object.py();
    let options = Options {
        read_only: part.get(intern!(py, "read_only"), "True or False")?,
        owner: part
            .get(intern!(py, "owner"), "two numbers from 0 to 2**32 - 1, a user and a group")?,
    };
    let path: PathBuf = part.get(intern!(py, "path"), "the path of a directory")?;
    let tag = part.get(intern!(py, "tag"), "a str")?;
    let config = ShareConfig { path, tag, options };
    config.check()?;
    Ok(config)
}
