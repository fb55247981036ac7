//! A processor with memory for the unit tests of this room.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::cpu::{Cpu, Done, Platform};
use super::execute::perform;
use super::native::NativeCode;
use crate::debug::{bitness, decode};

/// Memory from address 0 on, and a little other state.
pub(crate) struct Ram {
    pub(crate) bytes: Vec<u8>,
    pub(crate) xsave: Vec<u8>,
    pub(crate) native: NativeCode,
    /// The value of each register of CPUID.
    pub(crate) cpuid: u32,
    /// Each model-specific register contains its number, with these bits.
    pub(crate) msr_mask: u64,
}

impl Ram {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            bytes: vec![0; size],
            xsave: vec![0; 4096],
            native: NativeCode::default(),
            cpuid: u32::MAX,
            msr_mask: u64::MAX,
        }
    }

    pub(crate) fn put(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn range(&self, address: u64, length: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(address).ok()?;
        let end = start.checked_add(length)?;
        (end <= self.bytes.len()).then_some(start..end)
    }
}

impl Platform for Ram {
    fn read(&mut self, address: u64, data: &mut [u8]) -> bool {
        let Some(range) = self.range(address, data.len()) else { return false };
        data.copy_from_slice(&self.bytes[range]);
        true
    }

    fn is_writable(&self, address: u64, length: usize) -> bool {
        self.range(address, length).is_some()
    }

    fn write(&mut self, address: u64, data: &[u8]) -> bool {
        let Some(range) = self.range(address, data.len()) else { return false };
        self.bytes[range].copy_from_slice(data);
        true
    }

    fn set_bits(&mut self, address: u64, size: u64, old: u64, bits: u64) -> bool {
        let size = usize::try_from(size).unwrap();
        let mut now = [0; 8];
        self.read(address, &mut now[..size])
            && u64::from_le_bytes(now) == old
            && self.write(address, &(old | bits).to_le_bytes()[..size])
    }

    fn msr(&mut self, index: u32) -> Option<u64> {
        (index != 0xda0).then_some(u64::from(index) & self.msr_mask)
    }

    fn cpuid(&mut self, _: u32) -> Option<[u32; 4]> {
        Some([self.cpuid; 4])
    }

    fn xcr0(&mut self) -> Option<u64> {
        Some(0xe7)
    }

    fn xsave(&mut self) -> Option<Vec<u8>> {
        Some(self.xsave.clone())
    }

    fn set_xsave(&mut self, image: &[u8]) -> bool {
        self.xsave = image.to_vec();
        true
    }

    fn exchange(&mut self, address: u64, old: u128, new: u128) -> Option<u128> {
        let mut found = [0; 16];
        self.read(address, &mut found).then_some(())?;
        let found = u128::from_le_bytes(found);
        if found == old {
            self.write(address, &new.to_le_bytes()).then_some(())?;
        }
        Some(found)
    }

    fn native(&mut self) -> Option<&mut NativeCode> {
        Some(&mut self.native)
    }

    fn flush_translations(&mut self) -> bool {
        true
    }
}

pub(crate) fn flat(dpl: u8, type_: u8, selector: u16) -> kvm_segment {
    kvm_segment {
        selector,
        limit: u32::MAX,
        type_,
        dpl,
        db: 1,
        present: 1,
        s: 1,
        ..Default::default()
    }
}

/// Protected mode of 32 bits without paging, in a ring.
pub(crate) fn protected(ring: u8) -> kvm_sregs {
    let data = flat(ring, 3, 0x20 | u16::from(ring));
    kvm_sregs {
        cs: flat(ring, 11, 0x18 | u16::from(ring)),
        ss: data,
        ds: data,
        es: data,
        cr0: 0x33,
        ..Default::default()
    }
}

/// Execute some bytes at 0x1000. Returns the registers after it.
pub(crate) fn run(
    ram: &mut Ram,
    regs: kvm_regs,
    sregs: kvm_sregs,
    code: &[u8],
) -> Done<(kvm_regs, kvm_sregs)> {
    let regs = kvm_regs { rip: 0x1000, ..regs };
    let instruction = decode(code, bitness(&sregs), regs.rip).unwrap();
    let mut cpu = Cpu::new(regs, sregs, ram);
    perform(&mut cpu, &instruction)?;
    Ok((cpu.regs, cpu.sregs))
}
