//! Where the devices of a machine are: their registers and interrupt lines, which are claimed
//! before boot data names them. Pure data.

use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::resources::{ResourceKind, Resources};

/// Where a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The guest-physical address of its registers.
    pub base: u64,
    /// Its interrupt line; None in a machine without an interrupt controller.
    pub line: Option<u32>,
}

impl Place {
    /// Claim a free place.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if there is none: a machine has room for about 16 devices.
    pub fn claim(resources: &Resources, name: &str, irqchip: bool) -> Result<Self> {
        let full = |what: &str| {
            let detail = format!("no {what} is free for it");
            Error::new(ErrorKind::Config, name, detail)
        };
        let size = (layout::VIRTIO_SIZE, layout::VIRTIO_SIZE);
        let base = resources
            .allocate(ResourceKind::Mmio, layout::VIRTIO..=layout::VIRTIO_LAST, size, name)
            .ok_or_else(|| full("address"))?;
        let free = |line: &u32| {
            let line = u64::from(*line);
            resources.allocate(ResourceKind::Gsi, line..=line, (1, 1), name).is_some()
        };
        let line = match irqchip {
            true => Some(
                layout::VIRTIO_LINES
                    .into_iter()
                    .find(free)
                    .ok_or_else(|| full("interrupt line"))?,
            ),
            false => None,
        };
        Ok(Self { base, line })
    }

    /// Whether a machine can have a device there.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        let is_there = (layout::VIRTIO..=layout::VIRTIO_LAST).contains(&self.base);
        let has_line = self.line.is_none_or(|line| layout::VIRTIO_LINES.contains(&line));
        is_there && self.base.is_multiple_of(layout::VIRTIO_SIZE) && has_line
    }

    /// Claim exactly this place, for a device of a snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with the owner of a part of it.
    pub fn claim_again(&self, resources: &Resources, name: &str) -> Result<()> {
        let taken = |other| {
            let detail = format!("its place in the snapshot overlaps {other}");
            Error::new(ErrorKind::Config, name, detail)
        };
        let range = (self.base, layout::VIRTIO_SIZE);
        resources.claim(ResourceKind::Mmio, range, name).map_err(taken)?;
        if let Some(line) = self.line {
            resources.claim(ResourceKind::Gsi, (u64::from(line), 1), name).map_err(taken)?;
        }
        Ok(())
    }
}
