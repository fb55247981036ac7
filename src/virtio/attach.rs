//! Attaches devices to a machine's memory bus and its loop. Runs on the thread that builds the
//! machine.

use std::sync::Arc;

use event_manager::SubscriberId;

use super::device::VirtioDevice;
use super::doorbells::Doorbells;
use super::place::Place;
use super::queues::Queues;
use super::registers::QUEUE_NOTIFY;
use super::subscriber::VirtioSubscriber;
use super::transport::Transport;
use crate::devices::{Buses, Doorbell, InterruptLine};
use crate::error::Result;
use crate::event::EventManager;
use crate::layout;
use crate::memory::GuestMemory;

/// What a device needs of its machine.
pub(crate) struct Board<'a> {
    pub(crate) buses: &'a Buses,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) line: &'a dyn Fn(u32) -> Option<Box<dyn InterruptLine>>,
    pub(crate) doorbell: &'a dyn Fn() -> Option<Box<dyn Doorbell>>,
}

/// A device of a machine.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Where it is.
    pub place: Place,
    /// The device behind its transport.
    pub transport: Arc<Transport>,
}

impl Attached {
    /// Its name, such as "disk0".
    #[must_use]
    pub fn name(&self) -> &str {
        self.transport.queues().name()
    }

    /// Connect it to the machine's loop, unless the program serves it.
    pub(crate) fn connect(&self, manager: &EventManager) -> Option<SubscriberId> {
        if self.transport.device().is_served_by_program() {
            return None;
        }
        let (device, queues) = (self.transport.device(), self.transport.queues());
        let (device, queues) = (Arc::clone(device), Arc::clone(queues));
        // Recorded by itself, with its name.
        Some(manager.add_unrecorded(Box::new(VirtioSubscriber { device, queues })))
    }

    /// The machine is closed.
    pub(crate) fn close(&self) {
        self.transport.queues().stop();
        self.transport.device().close();
    }
}

/// Attach a device to the memory bus, at a place that was claimed for it.
///
/// # Errors
/// If the process is out of descriptors.
pub(crate) fn attach(
    board: &Board<'_>,
    name: &str,
    place: Place,
    device: Arc<dyn VirtioDevice>,
) -> Result<Attached> {
    let line = place.line.and_then(board.line);
    let sizes = device.queue_sizes();
    let queues = Arc::new(Queues::new(name, sizes, board.memory.clone(), line)?);
    let doorbells = Doorbells::new((board.doorbell)(), place.base + QUEUE_NOTIFY, sizes.len());
    let transport = Arc::new(Transport::new(device, queues, doorbells));
    let on_bus = Arc::clone(&transport) as Arc<dyn crate::devices::Device>;
    board.buses.mmio.add(place.base, layout::VIRTIO_SIZE, on_bus);
    Ok(Attached { place, transport })
}
