//! Guest-physical addresses that no memory may have, because something else answers there.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::layout;

/// The guest-physical addresses at which devices answer.
pub(crate) trait DeviceWindows: Send + Sync + std::fmt::Debug {
    /// Start and bytes of each window.
    fn windows(&self) -> Vec<(u64, u64)>;
}

/// What a machine has besides memory.
#[derive(Debug, Default)]
pub(crate) struct Reserved {
    /// An in-kernel I/O APIC and local APICs.
    pub(crate) irqchip: bool,
    /// Its devices; none for a machine that has no bus.
    pub(crate) devices: Option<Arc<dyn DeviceWindows>>,
}

impl Reserved {
    /// Check that memory can be at these addresses.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] with what is there instead.
    pub(super) fn check(&self, start: u64, size: u64) -> Result<()> {
        let end = start.saturating_add(size);
        let overlaps =
            |(from, length): (u64, u64)| start < from.saturating_add(length) && from < end;
        let refuse = |(from, length): (u64, u64), what: &str| {
            let detail =
                format!("{size:#x} bytes there overlap {what}, {length:#x} bytes at {from:#x}");
            Err(Error::new(ErrorKind::Memory, format!("{start:#x}"), detail)
                .hint("leave that range out: add memory below and above it"))
        };
        let mut of_kvm = layout::kernel_addresses(self.irqchip);
        if let Some((range, what)) = of_kvm.find(|(range, _)| overlaps(*range)) {
            return refuse(range, what);
        }
        let devices = self.devices.iter().flat_map(|devices| devices.windows());
        match devices.into_iter().find(|range| overlaps(*range)) {
            Some(range) => refuse(range, "a device"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beside_the_chips_is_accepted_and_over_them_is_refused() {
        let reserved = Reserved { irqchip: true, devices: None };
        for (start, size) in
            [(0xfee0_0000, 0x1000), (0xfedf_f000, 0x2000), (0xfec0_0000, 0x1000), (0, 1 << 33)]
        {
            let error = reserved.check(start, size).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Memory);
            Reserved::default().check(start, size.min(0x2000)).unwrap();
        }
        for (start, size) in [(0xfee0_1000, 0x1000), (0xfec0_1000, 0x1f_f000), (0, 0xfec0_0000)] {
            reserved.check(start, size).unwrap();
        }
        assert!(Reserved::default().check(layout::KVM_IDENTITY_MAP - 0x1000, 0x2000).is_err());
    }
}
