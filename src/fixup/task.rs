//! Switches tasks of 32 bits as the processor does (Intel SDM volume 3, section 8.3). Tasks of 16
//! bits, of virtual-8086 mode and with a debug trap are not supported, and the exit is reported.

use super::access::Access;
use super::cpu::{Cpu, Done, Stop, fault_with, mask};
use super::descriptor::{Descriptor, segment_of};
use crate::x86::{CR0_PG, CR0_TS, GP, NP, NT, RFLAGS_RESERVED, SS, TS, VM};
use kvm_bindings::kvm_segment;

const BUSY: u8 = 2;
/// Types of descriptors.
const AVAILABLE_TSS: u8 = 9;
const BUSY_TSS: u8 = 11;
const LDT: u8 = 2;
/// The last byte of a TSS of 32 bits, without an I/O bitmap.
const LAST: u32 = 0x67;
/// Fields of a TSS: CR3, EIP, EFLAGS, the general registers, the segments from ES to GS, the LDT,
/// and the flag of the debug trap.
const CR3: usize = 0x1c;
const EIP: usize = 0x20;
const EFLAGS: usize = 0x24;
const GENERAL: usize = 0x28;
const SEGMENTS: usize = 0x48;
const LOCAL: usize = 0x60;
const DEBUG: usize = 0x64;

/// What switches tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Jump,
    Call,
    /// An interrupt or exception, through a task gate.
    Gate,
    /// IRET.
    Return,
}

impl Reason {
    fn is_nested(self) -> bool {
        matches!(self, Self::Call | Self::Gate)
    }
}

fn field(image: &[u8], at: usize) -> u64 {
    let bytes = image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    u64::from(bytes.map_or(0, u32::from_le_bytes))
}

fn selector(image: &[u8], at: usize) -> u16 {
    u16::try_from(field(image, at) & mask(2)).unwrap_or(0)
}

fn set_field(image: &mut [u8], at: usize, value: u64) {
    if let Some(place) = image.get_mut(at..at + 4) {
        place.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
}

impl Cpu<'_> {
    /// Switch to the task of a TSS. `next` and `flags` are the old task's EIP and EFLAGS.
    pub(super) fn switch_task(
        &mut self,
        new: u16,
        reason: Reason,
        next: u64,
        flags: u64,
    ) -> Done<()> {
        let descriptor = self.task_descriptor(new, reason)?;
        let old = self.sregs.tr;
        if old.type_ != BUSY_TSS || old.unusable != 0 || old.limit < LAST {
            return Err(Stop::Unknown);
        }
        let segment = segment_of(new, &descriptor, 0);
        let mut image = [0; 0x68];
        self.read_linear(segment.base, &mut image, Access::implicit(false))?;
        if field(&image, DEBUG) & 1 != 0 || field(&image, EFLAGS) & VM != 0 {
            return Err(Stop::Unknown);
        }
        self.save_task(&old, next, flags)?;
        if !reason.is_nested() {
            self.set_busy(old.selector, false)?;
        }
        if reason.is_nested() {
            self.write_linear(segment.base, &old.selector.to_le_bytes(), Access::implicit(true))?;
        }
        if reason != Reason::Return {
            self.set_busy(new, true)?;
        }
        self.sregs.tr = kvm_segment { selector: new & !3, type_: BUSY_TSS, ..segment };
        self.sregs.cr0 |= CR0_TS;
        self.has_switched = true;
        self.load_task(&image, reason)
    }

    fn task_descriptor(&mut self, new: u16, reason: Reason) -> Done<Descriptor> {
        let (error, vector) = (u32::from(new & !3), if reason == Reason::Return { TS } else { GP });
        if new & 4 != 0 || error == 0 {
            return fault_with(vector, error);
        }
        let Some(descriptor) = self.descriptor(new)? else { return fault_with(vector, error) };
        let kind = if reason == Reason::Return { BUSY_TSS } else { AVAILABLE_TSS };
        if descriptor.is_system() && descriptor.kind() & !8 == kind & !8 {
            // A task of 16 bits.
            if descriptor.kind() & 8 == 0 {
                return Err(Stop::Unknown);
            }
        } else {
            return fault_with(vector, error);
        }
        if !descriptor.is_present() {
            return fault_with(NP, error);
        }
        if descriptor.limit() < LAST {
            return fault_with(TS, error);
        }
        Ok(descriptor)
    }

    fn save_task(&mut self, old: &kvm_segment, next: u64, flags: u64) -> Done<()> {
        let mut saved = [0; SEGMENTS + 24 - EIP];
        set_field(&mut saved, 0, next);
        set_field(&mut saved, EFLAGS - EIP, flags);
        for number in 0..8 {
            let value = self.general(number).map_or(0, |value| *value);
            set_field(&mut saved, GENERAL - EIP + 4 * number, value);
        }
        let s = &self.sregs;
        for (number, segment) in [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].iter().enumerate() {
            set_field(&mut saved, SEGMENTS - EIP + 4 * number, u64::from(segment.selector));
        }
        let at = old.base.wrapping_add(u64::try_from(EIP).unwrap_or(0));
        self.write_linear(at, &saved, Access::implicit(true))
    }

    fn set_busy(&mut self, task: u16, is_busy: bool) -> Done<()> {
        let at = self.sregs.gdt.base.wrapping_add(u64::from(task & !7) + 5);
        let mut access = [0];
        self.read_linear(at, &mut access, Access::implicit(false))?;
        let [byte] = access;
        let new = if is_busy { byte | BUSY } else { byte & !BUSY };
        self.write_linear(at, &[new], Access::implicit(true))
    }

    fn load_task(&mut self, image: &[u8], reason: Reason) -> Done<()> {
        if self.sregs.cr0 & CR0_PG != 0 {
            self.sregs.cr3 = field(image, CR3);
        }
        for number in 0..8 {
            if let Some(register) = self.general(number) {
                *register = field(image, GENERAL + 4 * number);
            }
        }
        self.regs.rip = field(image, EIP);
        let nested = if reason.is_nested() { NT } else { 0 };
        self.regs.rflags = field(image, EFLAGS) & 0x3f_ffff | RFLAGS_RESERVED | nested;
        self.load_local(selector(image, LOCAL))?;
        let code = selector(image, SEGMENTS + 4);
        let cpl = u8::try_from(code & 3).unwrap_or(3);
        self.sregs.cs = self.task_code(code)?;
        self.sregs.ss = self.task_stack(selector(image, SEGMENTS + 8), cpl)?;
        self.sregs.es = self.task_data(selector(image, SEGMENTS), cpl)?;
        self.sregs.ds = self.task_data(selector(image, SEGMENTS + 12), cpl)?;
        self.sregs.fs = self.task_data(selector(image, SEGMENTS + 16), cpl)?;
        self.sregs.gs = self.task_data(selector(image, SEGMENTS + 20), cpl)?;
        if self.regs.rip > u64::from(self.sregs.cs.limit) {
            return fault_with(GP, 0);
        }
        Ok(())
    }

    fn load_local(&mut self, selector: u16) -> Done<()> {
        let error = u32::from(selector & !3);
        if error == 0 {
            self.sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
            return Ok(());
        }
        match if selector & 4 == 0 { self.descriptor(selector)? } else { None } {
            Some(d) if d.is_system() && d.kind() == LDT && d.is_present() => {
                self.sregs.ldt = kvm_segment { type_: LDT, ..segment_of(selector, &d, 0) };
                Ok(())
            }
            _ => fault_with(TS, error),
        }
    }

    fn task_code(&mut self, selector: u16) -> Done<kvm_segment> {
        let (error, rpl) = (u32::from(selector & !3), u8::try_from(selector & 3).unwrap_or(3));
        let Some(code) = self.descriptor(selector)?.filter(|_| error != 0) else {
            return fault_with(TS, error);
        };
        let is_level_right =
            if code.is_conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
        if !code.is_code() || !is_level_right {
            return fault_with(TS, error);
        }
        self.loaded(selector, &code, rpl, NP)
    }

    fn task_stack(&mut self, selector: u16, cpl: u8) -> Done<kvm_segment> {
        let error = u32::from(selector & !3);
        let Some(data) = self.descriptor(selector)?.filter(|_| error != 0) else {
            return fault_with(TS, error);
        };
        let is_level_right = selector & 3 == u16::from(cpl) && data.dpl() == cpl;
        if !data.is_writable_data() || !is_level_right {
            return fault_with(TS, error);
        }
        self.loaded(selector, &data, cpl, SS)
    }

    fn task_data(&mut self, selector: u16, cpl: u8) -> Done<kvm_segment> {
        let (error, rpl) = (u32::from(selector & !3), u8::try_from(selector & 3).unwrap_or(3));
        if error == 0 {
            return Ok(kvm_segment { selector, unusable: 1, ..Default::default() });
        }
        let Some(data) = self.descriptor(selector)? else { return fault_with(TS, error) };
        let has_privilege = data.is_conforming() || data.dpl() >= cpl.max(rpl);
        if !data.is_readable() || !has_privilege {
            return fault_with(TS, error);
        }
        self.loaded(selector, &data, rpl, NP)
    }

    /// A segment register with a descriptor. `vector`: the fault if it is not present.
    fn loaded(&mut self, selector: u16, d: &Descriptor, rpl: u8, vector: u8) -> Done<kvm_segment> {
        if !d.is_present() {
            return fault_with(vector, u32::from(selector & !3));
        }
        self.mark_accessed(d)?;
        Ok(segment_of(selector, d, rpl))
    }
}
