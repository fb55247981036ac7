//! Interrupt lines and messages, NMIs, eventfds in the kernel, and the filter of model-specific
//! registers. From any thread.

use std::sync::{Arc, Weak};

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap, kvm_msi};
use kvm_ioctls::{
    Cap, IoEventAddress, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange,
    MsrFilterRangeFlags, NoDatamatch, VmFd,
};
use vmm_sys_util::eventfd::EventFd;

use super::KvmVm;
use crate::devices::{Access, Doorbell, InterruptLine};
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::ExitHandler;
use crate::layout;
use crate::limit::Limit;
use crate::resources::ResourceKind;

/// The pins of the I/O APIC. The first sixteen are also connected to the PICs.
pub const IRQ_LINES: u32 = 24;

/// MSI data of a non-maskable interrupt (Intel SDM volume 3, 11.11.2).
const NMI_DELIVERY: u32 = 4 << 8;

/// The guest writes that signal an ioeventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEvent {
    /// Which bus.
    pub access: Access,
    /// The port or guest-physical address.
    pub address: u64,
    /// The size of the writes that match: 1, 2, 4 or 8 bytes; 0 for any size.
    pub length: usize,
    /// The only value that matches; `None` for any value.
    pub datamatch: Option<u64>,
}

impl IoEvent {
    fn check(&self) -> Result<()> {
        let at = || format!("{:#x}", self.address);
        let bad = |detail: String| Err(Error::new(ErrorKind::Config, at(), detail));
        let widest = if self.access == Access::Pio { 4 } else { 8 };
        if ![0, 1, 2, 4, 8].contains(&self.length) || self.length > widest {
            return bad(format!("this bus has no writes of {} bytes", self.length));
        }
        if self.access == Access::Pio && self.address > 0xffff {
            return bad("there is no such port".into());
        }
        match self.datamatch {
            Some(_) if self.length == 0 => bad("datamatch needs a length".into()),
            None if self.length != 0 => bad("a length needs a datamatch".into()),
            Some(value) if self.length < 8 && value >> (8 * self.length) != 0 => {
                bad(format!("{value:#x} does not fit into {} bytes", self.length))
            }
            _ => Ok(()),
        }
    }
}

/// A line to a machine's interrupt controllers. It does not keep the machine open.
#[derive(Debug)]
struct Line {
    fd: Weak<VmFd>,
    number: u32,
}

impl InterruptLine for Line {
    fn set(&self, is_high: bool) {
        // Fails only in a forked child, where the machine cannot be used.
        let _ = self.fd.upgrade().map(|fd| fd.set_irq_line(self.number, is_high));
    }
}

/// Registers ioeventfds. It does not keep the machine open.
#[derive(Debug)]
struct MmioDoorbell(Weak<VmFd>);

impl Doorbell for MmioDoorbell {
    fn connect(&self, event: &EventFd, address: u64, value: u32) {
        let Some(fd) = self.0.upgrade() else { return };
        // Fails in a forked child, where the machine cannot be used, and if KVM has no room for
        // more.
        let _ = fd.register_ioevent(event, &IoEventAddress::Mmio(address), value);
    }
}

impl<EH: ExitHandler + Send + Sync + 'static> KvmVm<EH> {
    /// What registers the ioeventfds of a device.
    #[must_use]
    pub fn doorbell(&self) -> Box<dyn Doorbell> {
        Box::new(MmioDoorbell(Arc::downgrade(&self.fd)))
    }

    fn check_irqchip(&self, at: &str) -> Result<()> {
        self.check_process()?;
        if self.irqchip {
            return Ok(());
        }
        let error = Error::new(ErrorKind::State, at, "the machine has no interrupt controller");
        Err(error.hint("make it with irqchip=True"))
    }

    /// Check that the machine has an interrupt line.
    ///
    /// # Errors
    /// [`ErrorKind::State`] without an interrupt controller; [`ErrorKind::Config`] if there is no
    /// such line.
    pub fn check_irq_line(&self, line: u32) -> Result<()> {
        self.check_irqchip("irq")?;
        if line < IRQ_LINES {
            return Ok(());
        }
        let detail = format!("{line} is not from 0 to {}", IRQ_LINES - 1);
        Err(Error::new(ErrorKind::Config, "irq", detail))
    }

    /// An interrupt line for a device of this machine; `None` without an interrupt controller.
    #[must_use]
    pub fn irq(&self, line: u32) -> Option<Box<dyn InterruptLine>> {
        let line = Line { fd: Arc::downgrade(&self.fd), number: line };
        self.irqchip.then(|| Box::new(line) as Box<dyn InterruptLine>)
    }

    /// Set the level of an interrupt line: KVM_IRQ_LINE.
    ///
    /// # Errors
    /// [`ErrorKind::State`] without an interrupt controller; [`ErrorKind::Config`] if there is no
    /// such line.
    pub fn set_irq_line(&self, line: u32, is_high: bool) -> Result<()> {
        self.check_irq_line(line)?;
        let mut lines = self.lines.lock();
        self.fd.set_irq_line(line, is_high).map_err(|e| Error::kvm("KVM_IRQ_LINE", e))?;
        *lines = *lines & !(1 << line) | u32::from(is_high) << line;
        Ok(())
    }

    /// Send a message-signalled interrupt: KVM_SIGNAL_MSI. Returns whether a vCPU accepted it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] without an interrupt controller. If KVM refuses it.
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<bool> {
        self.check_irqchip("msi")?;
        let [low, high] = [address, address >> 32]
            .map(|half| u32::try_from(half & 0xffff_ffff).unwrap_or_default());
        let msi = kvm_msi { address_lo: low, address_hi: high, data, ..Default::default() };
        let delivered = self.fd.signal_msi(msi).map_err(|e| Error::kvm("KVM_SIGNAL_MSI", e))?;
        Ok(delivered > 0)
    }

    /// Send a vCPU a non-maskable interrupt.
    ///
    /// # Errors
    /// If there is no such vCPU, or KVM refuses.
    pub fn nmi(&self, vcpu: u64, limit: &Limit<'_>) -> Result<()> {
        self.check_process()?;
        let found = self.handles().into_iter().find(|handle| handle.id() == vcpu);
        let Some(handle) = found else {
            let detail = format!("the machine has no vCPU {vcpu}");
            return Err(Error::new(ErrorKind::Config, "nmi", detail));
        };
        if self.irqchip {
            return self.signal_msi(msi_address(vcpu), NMI_DELIVERY).map(drop);
        }
        // Without an interrupt controller, KVM takes an NMI only by a vCPU ioctl: the vCPU must be
        // at rest.
        let _quiesced = self.quiesce("nmi", limit)?;
        handle.with_vcpu(|vcpu| vcpu.fd().nmi().map_err(|e| Error::kvm("KVM_NMI", e)))
    }

    /// Have each write of an eventfd pulse an interrupt line, in the kernel: KVM_IRQFD.
    ///
    /// # Errors
    /// As for [`Self::set_irq_line`]. If KVM refuses it, for example because the eventfd already
    /// has a line.
    pub fn add_irqfd(&self, event: &EventFd, line: u32) -> Result<()> {
        self.check_irq_line(line)?;
        self.fd.register_irqfd(event, line).map_err(|e| Error::kvm("KVM_IRQFD", e))?;
        self.memory.resources().share(ResourceKind::Gsi, (u64::from(line), 1), "irqfd");
        Ok(())
    }

    /// Undo [`Self::add_irqfd`].
    ///
    /// # Errors
    /// As for [`Self::add_irqfd`].
    pub fn remove_irqfd(&self, event: &EventFd, line: u32) -> Result<()> {
        self.check_irq_line(line)?;
        self.fd.unregister_irqfd(event, line).map_err(|e| Error::kvm("KVM_IRQFD", e))?;
        self.memory.resources().release_shared(ResourceKind::Gsi, u64::from(line), "irqfd");
        Ok(())
    }

    /// Have the kernel signal an eventfd for these guest writes, instead of an exit: KVM_IOEVENTFD.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for writes that cannot exist. If KVM refuses it, for example because
    /// another eventfd has these writes.
    pub fn add_ioeventfd(&self, event: &EventFd, on: &IoEvent) -> Result<()> {
        self.ioeventfd(event, on, true)
    }

    /// Undo [`Self::add_ioeventfd`].
    ///
    /// # Errors
    /// As for [`Self::add_ioeventfd`].
    pub fn remove_ioeventfd(&self, event: &EventFd, on: &IoEvent) -> Result<()> {
        self.ioeventfd(event, on, false)
    }

    fn ioeventfd(&self, event: &EventFd, on: &IoEvent, is_added: bool) -> Result<()> {
        self.check_process()?;
        on.check()?;
        let value = on.datamatch.unwrap_or(0);
        let result = match on.length {
            0 => self.tell_ioeventfd(event, on, is_added, NoDatamatch),
            1 => self.tell_ioeventfd(event, on, is_added, u8::try_from(value).unwrap_or(0)),
            2 => self.tell_ioeventfd(event, on, is_added, u16::try_from(value).unwrap_or(0)),
            4 => self.tell_ioeventfd(event, on, is_added, u32::try_from(value).unwrap_or(0)),
            _ => self.tell_ioeventfd(event, on, is_added, value),
        };
        result.map_err(|e| Error::kvm("KVM_IOEVENTFD", e))?;
        let (kind, resources) = (on.access.kind(), self.memory.resources());
        if is_added {
            let length = u64::try_from(on.length).unwrap_or(u64::MAX).max(1);
            resources.share(kind, (on.address, length), "ioeventfd");
        } else {
            resources.release_shared(kind, on.address, "ioeventfd");
        }
        Ok(())
    }

    fn tell_ioeventfd<T: Into<u64>>(
        &self,
        event: &EventFd,
        on: &IoEvent,
        is_added: bool,
        datamatch: T,
    ) -> std::result::Result<(), kvm_ioctls::Error> {
        let address = match on.access {
            Access::Pio => IoEventAddress::Pio(on.address),
            Access::Mmio => IoEventAddress::Mmio(on.address),
        };
        if is_added {
            self.fd.register_ioevent(event, &address, datamatch)
        } else {
            self.fd.unregister_ioevent(event, &address, datamatch)
        }
    }

    /// Have accesses to these model-specific registers exit, besides those to registers unknown to
    /// KVM: KVM_CAP_X86_USER_SPACE_MSR and KVM_X86_SET_MSR_FILTER.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for more ranges than KVM can filter; [`ErrorKind::Unavailable`] if it
    /// has no filter.
    pub fn filter_msrs(&self, msrs: &[u32]) -> Result<()> {
        self.check_process()?;
        let has = |cap| self.fd.check_extension(cap);
        if !has(Cap::X86UserSpaceMsr) || !has(Cap::X86MsrFilter) {
            let detail = "this KVM has no KVM_CAP_X86_USER_SPACE_MSR and KVM_CAP_X86_MSR_FILTER";
            return Err(Error::new(ErrorKind::Unavailable, "msrs", detail));
        }
        let blocks = blocks(msrs)?;
        let reasons = MsrExitReason::Unknown | MsrExitReason::Inval | MsrExitReason::Filter;
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        cap.args[0] = u64::from(reasons.bits());
        self.fd.enable_cap(&cap).map_err(|e| Error::kvm("KVM_ENABLE_CAP", e))?;
        let ranges: Vec<MsrFilterRange<'_>> = blocks
            .iter()
            .map(|block| MsrFilterRange {
                flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
                base: block.base,
                msr_count: BLOCK,
                bitmap: &block.allowed,
            })
            .collect();
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .map_err(|e| Error::kvm("KVM_X86_SET_MSR_FILTER", e))
    }
}

/// The address of a message for one vCPU. The bits of its id above the first 8 are those of the
/// upper half: KVM_CAP_X2APIC_API.
fn msi_address(vcpu: u64) -> u64 {
    u64::from(layout::LAPIC) | (vcpu & 0xff) << 12 | vcpu >> 8 << 40
}

/// How many registers one range of the filter spans, and the bytes of its bitmap.
const BLOCK: u32 = 0x2000;
const BLOCK_BYTES: usize = 0x400;

/// A range of the filter.
struct Block {
    base: u32,
    /// One bit per register; zero if accesses to it exit.
    allowed: Vec<u8>,
}

fn blocks(msrs: &[u32]) -> Result<Vec<Block>> {
    let mut blocks: Vec<Block> = Vec::new();
    for msr in msrs {
        let base = msr & !(BLOCK - 1);
        let at = match blocks.iter().position(|block| block.base == base) {
            Some(at) => at,
            None => {
                blocks.push(Block { base, allowed: vec![0xff; BLOCK_BYTES] });
                blocks.len() - 1
            }
        };
        let bit = msr - base;
        let byte = usize::try_from(bit / 8).unwrap_or(0);
        if let Some(allowed) = blocks.get_mut(at).and_then(|block| block.allowed.get_mut(byte)) {
            *allowed &= !(1 << (bit % 8));
        }
    }
    let most = usize::try_from(kvm_bindings::KVM_MSR_FILTER_MAX_RANGES).unwrap_or(0);
    if blocks.len() > most {
        let detail = format!("{} ranges of registers are more than KVM's {most}", blocks.len());
        return Err(Error::new(ErrorKind::Config, "msrs", detail));
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(access: Access, address: u64, length: usize, datamatch: Option<u64>) -> Result<()> {
        IoEvent { access, address, length, datamatch }.check()
    }

    #[test]
    fn impossible_writes_are_refused() {
        on(Access::Pio, 0x10, 0, None).unwrap();
        on(Access::Pio, 0xffff, 4, Some(0xffff_ffff)).unwrap();
        on(Access::Mmio, u64::MAX, 8, Some(u64::MAX)).unwrap();
        assert!(on(Access::Pio, 0x1_0000, 0, None).is_err());
        assert!(on(Access::Pio, 0x10, 8, Some(1)).is_err());
        assert!(on(Access::Mmio, 0x10, 3, Some(1)).is_err());
        assert!(on(Access::Mmio, 0x10, 1, Some(0x100)).is_err());
        assert!(on(Access::Mmio, 0x10, 0, Some(1)).is_err());
        assert!(on(Access::Mmio, 0x10, 1, None).is_err());
    }

    #[test]
    fn a_message_has_the_whole_id() {
        assert_eq!(msi_address(3), 0xfee0_3000);
        assert_eq!(msi_address(0x1ff), 0x0000_0100_feef_f000);
    }

    #[test]
    fn registers_share_a_range_where_they_are_near() {
        let found = blocks(&[0x10, 0x11, 0xc000_0080]).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].allowed[2], 0b1111_1100);
        assert_eq!((found[1].base, found[1].allowed[0x10]), (0xc000_0000, 0xfe));
        let far: Vec<u32> = (0..17).map(|number| number << 16).collect();
        assert!(blocks(&far).is_err());
    }
}
