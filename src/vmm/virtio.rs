//! The virtio devices of a machine: makes and attaches them, and those of a snapshot. Runs on the
//! thread that builds the machine.

use std::sync::Arc;

use super::parts::Vm;
use crate::config::{VirtioConfig, VmmConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::resources::Resources;
use crate::snapshot::{VirtioDeviceState, given_key};
use crate::vcpu::ExitRouter;
use crate::virtio::{self, Attached, Board, DeviceStats, Place};

/// Claim a place for each device of a configuration.
///
/// # Errors
/// If there is no room for one.
pub(super) fn places(config: &VmmConfig, resources: &Resources) -> Result<Vec<Place>> {
    let names = VirtioConfig::names(&config.virtio);
    names.iter().map(|name| Place::claim(resources, name, config.has_irqchip())).collect()
}

/// Make and attach the devices of a configuration.
///
/// # Errors
/// If what is behind one of them cannot be used.
pub(super) fn attach_all(
    configs: Vec<VirtioConfig>,
    places: &[Place],
    vm: &Vm,
    router: &ExitRouter,
) -> Result<Vec<Attached>> {
    let names = VirtioConfig::names(&configs);
    let attach = |((name, config), place): ((String, VirtioConfig), &Place)| {
        attach(vm, router, &name, *place, virtio::create(config)?)
    };
    names.into_iter().zip(configs).zip(places).map(attach).collect()
}

/// The devices of a snapshot, at their places. Those that `given` has a configuration for are made
/// from it.
///
/// # Errors
/// If one cannot be made.
pub(super) fn attach_saved(
    saved: &[VirtioDeviceState],
    mut given: Vec<(String, VirtioConfig)>,
    vm: &Vm,
    router: &ExitRouter,
) -> Result<Vec<Attached>> {
    let mut all = Vec::new();
    for VirtioDeviceState { name, device_type, place, spec, frozen } in saved {
        place.claim_again(vm.memory().resources(), name)?;
        let device = match given.iter().position(|(other, _)| other == name) {
            Some(at) => replacement(name, (*device_type, spec), given.remove(at).1)?,
            None => virtio::restored(name, *device_type, spec, frozen.as_ref())?,
        };
        all.push(attach(vm, router, name, *place, device)?);
    }
    Ok(all)
}

/// The device that a fork is given for one of its snapshot.
fn replacement(
    name: &str,
    (device_type, spec): (u32, &[u8]),
    config: VirtioConfig,
) -> Result<Arc<dyn virtio::VirtioDevice>> {
    let device = virtio::create_in_place(config, device_type, spec)?;
    let given = device.device_type();
    if given != device_type {
        let detail = format!("it is a device of type {given}, the snapshot's is of {device_type}");
        return Err(Error::new(ErrorKind::Config, given_key(name), detail));
    }
    Ok(device)
}

fn attach(
    vm: &Vm,
    router: &ExitRouter,
    name: &str,
    place: Place,
    device: Arc<dyn virtio::VirtioDevice>,
) -> Result<Attached> {
    let board = Board {
        buses: &router.buses,
        memory: vm.memory(),
        line: &|line| vm.irq(line),
        doorbell: &|| Some(vm.doorbell()),
    };
    virtio::attach(&board, name, place, device)
}

/// What the machine's counters have of its devices.
pub(super) fn stats_of(devices: &[Attached]) -> DeviceStats {
    DeviceStats::new(devices.iter().map(|attached| {
        let counts = &attached.transport.queues().counts;
        (attached.name().to_owned(), Arc::clone(counts))
    }))
}

/// What a snapshot keeps of each device, besides its state. They are quiesced.
///
/// # Errors
/// If one cannot be frozen.
pub(super) fn freeze_all(devices: &[Attached]) -> Result<Vec<VirtioDeviceState>> {
    let freeze = |attached: &Attached| {
        let device = attached.transport.device();
        Ok(VirtioDeviceState {
            name: attached.name().to_owned(),
            device_type: device.device_type(),
            place: attached.place,
            spec: device.spec(),
            frozen: device.freeze()?,
        })
    };
    devices.iter().map(freeze).collect()
}

/// Go back to what a snapshot has frozen. They are quiesced.
///
/// # Errors
/// If one of them cannot.
pub(super) fn thaw_all(devices: &[Attached], saved: &[VirtioDeviceState]) -> Result<()> {
    for state in saved {
        let found = devices.iter().find(|device| device.place == state.place);
        if let (Some(device), Some(frozen)) = (found, &state.frozen) {
            device.transport.device().thaw(frozen)?;
        }
    }
    Ok(())
}
