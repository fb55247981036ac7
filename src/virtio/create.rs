//! Makes devices: of a configuration, and like those of a snapshot. Runs on the thread that builds
//! the machine.

use std::sync::Arc;

use virtio_bindings::virtio_ids::{
    VIRTIO_ID_9P, VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET,
    VIRTIO_ID_RNG, VIRTIO_ID_VSOCK,
};

use super::balloon::Balloon;
use super::blk::Blk;
use super::console::Console;
use super::custom::{Custom, SPEC};
use super::device::{Frozen, VirtioDevice};
use super::fs9p::Fs9p;
use super::net::Net;
use super::net_link::parse_spec;
use super::rng::Rng;
use super::vsock::Vsock;
use crate::bytes::bad;
use crate::config::{NetConfig, VirtioConfig};
use crate::error::Result;

/// The device of a configuration.
///
/// # Errors
/// If what is behind the device cannot be used.
pub(crate) fn create(config: VirtioConfig) -> Result<Arc<dyn VirtioDevice>> {
    match config {
        VirtioConfig::Disk(config) => Ok(Arc::new(Blk::new(config)?)),
        VirtioConfig::Net(config) => Ok(Arc::new(Net::new(config)?)),
        VirtioConfig::Rng(config) => Ok(Arc::new(Rng::new(config))),
        VirtioConfig::Console(config) => Ok(Arc::new(Console::new(config)?)),
        VirtioConfig::Custom(config) => Ok(Arc::new(Custom::new(config)?)),
        VirtioConfig::Balloon(config) => Ok(Arc::new(Balloon::new(config)?)),
        VirtioConfig::Share(config) => Ok(Arc::new(Fs9p::new(config)?)),
        VirtioConfig::Vsock(config) => Ok(Arc::new(Vsock::new(&config)?)),
    }
}

/// The device of a configuration in place of a snapshot's, whose driver may be using it: what the
/// configuration leaves open stays.
///
/// # Errors
/// As for [`create`].
pub(crate) fn create_in_place(
    config: VirtioConfig,
    device_type: u32,
    spec: &[u8],
) -> Result<Arc<dyn VirtioDevice>> {
    match config {
        VirtioConfig::Net(net) if device_type == VIRTIO_ID_NET => {
            let mtu = net.mtu.or_else(|| parse_spec(spec).ok()?.1);
            create(VirtioConfig::Net(NetConfig { mtu, ..net }))
        }
        other => create(other),
    }
}

/// A device like one of a snapshot, from its type, its `spec` and what it has frozen. A snapshot
/// from a file has nothing frozen.
///
/// # Errors
/// If it cannot be made from these; the error says what the fork has to be given.
pub(crate) fn restored(
    name: &str,
    device_type: u32,
    spec: &[u8],
    frozen: Option<&Frozen>,
) -> Result<Arc<dyn VirtioDevice>> {
    if spec == SPEC {
        let detail =
            format!("the snapshot has a device of type {device_type} that is the program's");
        let hint = "give the fork one by its name: fork(virtio={\"virtio0\": device})";
        return Err(bad(name, detail).hint(hint));
    }
    match device_type {
        VIRTIO_ID_BLOCK => Ok(Arc::new(Blk::restored(name, spec, frozen)?)),
        VIRTIO_ID_NET => Ok(Arc::new(Net::from_spec(spec, frozen)?)),
        VIRTIO_ID_VSOCK => Ok(Arc::new(Vsock::from_spec(spec)?)),
        VIRTIO_ID_RNG => Ok(Arc::new(Rng::from_spec(spec)?)),
        VIRTIO_ID_CONSOLE => Ok(Arc::new(Console::from_spec(spec)?)),
        VIRTIO_ID_BALLOON => Ok(Arc::new(Balloon::from_spec(spec)?)),
        VIRTIO_ID_9P => Ok(Arc::new(Fs9p::restored(name, spec, frozen)?)),
        other => Err(bad(name, format!("this version of pyvmm has no devices of type {other}"))),
    }
}
