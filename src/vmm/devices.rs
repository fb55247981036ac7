//! Adds devices of the program to a machine's buses and removes them. Any thread.

use std::sync::Arc;

use super::machine::Vmm;
use crate::config::PcPart;
use crate::devices::{self, Access, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::resources::{ResourceKind, Resources};

impl Vmm {
    /// Add a device to one of the buses. This is possible at any time. A part of a PC that the
    /// machine has only by default gives way to it.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the range is not on that bus, or overlaps something else.
    pub fn add_device(
        &self,
        access: Access,
        base: u64,
        length: u64,
        device: Arc<dyn Device>,
    ) -> Result<()> {
        let vm = self.vm()?;
        vm.check_process()?;
        if access == Access::Pio && base.saturating_add(length) > 0x1_0000 {
            let detail = "ports go from 0 to 0xffff";
            return Err(Error::new(ErrorKind::Config, format!("{base:#x}"), detail));
        }
        let resources = vm.memory().resources();
        self.give_way(resources, access, (base, length));
        devices::claim_range(resources, access, (base, length), device.name())?;
        self.router.buses.bus(access).add(base, length, device);
        Ok(())
    }

    /// Remove a device. An access that has found it already is still answered.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if no device starts at this address.
    pub fn remove_device(&self, access: Access, base: u64) -> Result<()> {
        let vm = self.vm()?;
        let removed = self.router.buses.bus(access).remove(base);
        drop(removed.map_err(|error| self.closed_or(error))?);
        vm.memory().resources().release(access.kind(), base);
        Ok(())
    }

    /// Take out the parts of a PC in this range, if all that is there may give way.
    fn give_way(&self, resources: &Resources, access: Access, range: (u64, u64)) {
        let there = resources.owners_in(access.kind(), range);
        if there.is_empty() {
            return;
        }
        let mut platform = self.platform.lock();
        let yielding = platform.yielding;
        let part_of = |name: &str| yielding.iter().find(|part| part.name() == name);
        let Some(mut parts) =
            there.iter().map(|owner| part_of(&owner.name)).collect::<Option<Vec<_>>>()
        else {
            return;
        };
        // PCI's ports have the reset control register.
        if parts.contains(&PcPart::Pci) && platform.parts.has(PcPart::ResetPorts) {
            if !yielding.has(PcPart::ResetPorts) {
                return;
            }
            parts.push(PcPart::ResetPorts);
        }
        for part in parts {
            platform.parts = platform.parts.without(part);
            platform.yielding = platform.yielding.without(part);
            self.take_out(resources, part);
        }
    }

    fn take_out(&self, resources: &Resources, part: PcPart) {
        for claim in resources.all().iter().filter(|claim| claim.name == part.name()) {
            let access = match claim.kind {
                ResourceKind::Pio => Access::Pio,
                ResourceKind::Mmio => Access::Mmio,
                ResourceKind::Memory | ResourceKind::Gsi => continue,
            };
            // Fails only if the machine is being closed, which takes all devices out.
            let _ = self.router.buses.bus(access).remove(claim.start);
            resources.release(claim.kind, claim.start);
        }
    }
}
