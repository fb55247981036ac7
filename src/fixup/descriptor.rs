//! Segment descriptors of the GDT and the LDT, and segment registers loaded from them (Intel SDM
//! volume 3, section 3.4.5).

use kvm_bindings::kvm_segment;

use super::access::Access;
use super::cpu::{Cpu, Done};

const ACCESSED: u64 = 1 << 40;

/// The eight bytes of a descriptor, and their address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) raw: u64,
    linear: u64,
}

impl Descriptor {
    fn field(&self, shift: u32, bits: u32) -> u64 {
        self.raw >> shift & ((1 << bits) - 1)
    }

    fn byte(&self, shift: u32, bits: u32) -> u8 {
        u8::try_from(self.field(shift, bits)).unwrap_or(0)
    }

    pub(crate) fn kind(&self) -> u8 {
        self.byte(40, 4)
    }

    pub(crate) fn is_system(&self) -> bool {
        self.field(44, 1) == 0
    }

    pub(crate) fn dpl(&self) -> u8 {
        self.byte(45, 2)
    }

    pub(crate) fn is_present(&self) -> bool {
        self.field(47, 1) != 0
    }

    pub(crate) fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }

    pub(crate) fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    /// Whether it is a data segment or a readable code segment.
    pub(crate) fn is_readable(&self) -> bool {
        !self.is_system() && (!self.is_code() || self.kind() & 2 != 0)
    }

    pub(crate) fn is_writable_data(&self) -> bool {
        !self.is_system() && !self.is_code() && self.kind() & 2 != 0
    }

    /// Whether L is set and D is clear.
    pub(crate) fn is_64_bit(&self) -> bool {
        self.field(53, 2) == 1
    }

    /// The selector in a gate.
    pub(crate) fn gate_selector(&self) -> u16 {
        u16::try_from(self.field(16, 16)).unwrap_or(0)
    }

    /// The offset in a gate whose frames have values of this many bytes.
    pub(crate) fn gate_offset(&self, width: usize) -> u64 {
        let high = if width == 2 { 0 } else { self.field(48, 16) << 16 };
        self.field(0, 16) | high
    }

    /// The number of parameters that a call gate copies.
    pub(crate) fn gate_count(&self) -> u64 {
        self.field(32, 5)
    }

    /// The last valid offset, in bytes.
    pub(crate) fn limit(&self) -> u32 {
        let pages = self.field(0, 16) | self.field(48, 4) << 16;
        let limit = if self.field(55, 1) != 0 { pages << 12 | 0xfff } else { pages };
        u32::try_from(limit).unwrap_or(u32::MAX)
    }
}

/// The segment register for a descriptor. `level`: the privilege level of the selector.
pub(crate) fn segment_of(selector: u16, d: &Descriptor, level: u8) -> kvm_segment {
    kvm_segment {
        base: d.field(16, 24) | d.field(56, 8) << 24,
        limit: d.limit(),
        selector: selector & !3 | u16::from(level),
        type_: d.kind() | 1,
        present: d.byte(47, 1),
        dpl: d.dpl(),
        db: d.byte(54, 1),
        s: d.byte(44, 1),
        l: d.byte(53, 1),
        g: d.byte(55, 1),
        avl: d.byte(52, 1),
        unusable: 0,
        padding: 0,
    }
}

impl Cpu<'_> {
    /// The descriptor of a selector. None if its table does not contain it.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Done<Option<Descriptor>> {
        let (base, limit) = if selector & 4 == 0 {
            (self.sregs.gdt.base, u32::from(self.sregs.gdt.limit))
        } else if self.sregs.ldt.unusable != 0 {
            return Ok(None);
        } else {
            (self.sregs.ldt.base, self.sregs.ldt.limit)
        };
        let at = u32::from(selector & !7);
        if at + 7 > limit {
            return Ok(None);
        }
        let linear = base.wrapping_add(u64::from(at));
        let mut bytes = [0; 8];
        self.read_linear(linear, &mut bytes, Access::implicit(false))?;
        Ok(Some(Descriptor { raw: u64::from_le_bytes(bytes), linear }))
    }

    /// Set the accessed bit of a descriptor that a segment register is loaded with.
    pub(crate) fn mark_accessed(&mut self, descriptor: &Descriptor) -> Done<()> {
        if descriptor.raw & ACCESSED != 0 {
            return Ok(());
        }
        let raw = descriptor.raw | ACCESSED;
        let [.., access, _, _] = raw.to_le_bytes();
        self.write_linear(descriptor.linear.wrapping_add(5), &[access], Access::implicit(true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(raw: u64) -> Descriptor {
        Descriptor { raw, linear: 0 }
    }

    #[test]
    fn fields_stand_where_the_manual_has_them() {
        let code = of(0x12af_9a34_5678_ffff);
        assert!(code.is_code() && code.is_present() && code.is_64_bit() && code.is_readable());
        assert!(!code.is_conforming() && !code.is_writable_data() && !code.is_system());
        assert_eq!((code.dpl(), code.limit()), (0, u32::MAX));
        let segment = segment_of(0x10, &code, 0);
        assert_eq!((segment.base, segment.type_, segment.l), (0x1234_5678, 0xb, 1));
        let data = of(0x0040_f200_0000_0fff);
        assert!(data.is_writable_data() && data.dpl() == 3 && data.limit() == 0xfff);
        let segment = segment_of(0x18, &data, 3);
        assert_eq!((segment.selector, segment.db, segment.g), (0x1b, 1, 0));
    }
}
