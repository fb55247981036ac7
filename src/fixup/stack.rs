//! The stack for the frame of an interrupt: the current one, or the one in the task-state segment
//! for the new level. Intel SDM volume 3, 7.12 and 9.

use kvm_bindings::kvm_segment;

use super::access::Access;
use super::cpu::{Cpu, Done, Stop, fault_with, mask};
use super::descriptor::segment_of;
use crate::x86::{SS, TS};

/// A stack for a frame. The vCPU switches to it only at the end.
pub(super) struct Stack {
    pub(super) segment: kvm_segment,
    pub(super) pointer: u64,
}

impl Cpu<'_> {
    /// The stack for a level in the TSS of protected mode.
    pub(super) fn inner_stack(&mut self, level: u8) -> Done<Stack> {
        // Types 9 and 11 are a 32-bit TSS, 1 and 3 a 16-bit one.
        let (pointer, selector) = if self.sregs.tr.type_ & 8 != 0 {
            let at = 4 + u32::from(level) * 8;
            (self.task_field(at, 4)?, self.task_field(at + 4, 2)?)
        } else {
            let at = 2 + u32::from(level) * 4;
            (self.task_field(at, 2)?, self.task_field(at + 2, 2)?)
        };
        let selector = u16::try_from(selector).unwrap_or(0);
        let code = u32::from(selector & !3);
        if code == 0 {
            return fault_with(TS, 0);
        }
        let Some(descriptor) = self.descriptor(selector)? else { return fault_with(TS, code) };
        let is_right = u16::from(level) == selector & 3
            && descriptor.dpl() == level
            && descriptor.is_writable_data();
        if !is_right {
            return fault_with(TS, code);
        }
        if !descriptor.is_present() {
            return fault_with(SS, code);
        }
        self.mark_accessed(&descriptor)?;
        Ok(Stack { segment: segment_of(selector, &descriptor, level), pointer })
    }

    /// A field of the TSS.
    pub(super) fn task_field(&mut self, at: u32, size: usize) -> Done<u64> {
        let task = self.sregs.tr;
        let last = at + u32::try_from(size).unwrap_or(8) - 1;
        if task.unusable != 0 || last > task.limit {
            return fault_with(TS, u32::from(task.selector & !3));
        }
        let mut bytes = [0; 8];
        let data = bytes.get_mut(..size).ok_or(Stop::Unknown)?;
        self.read_linear(task.base.wrapping_add(u64::from(at)), data, Access::implicit(false))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The bits of the stack pointer that the current stack uses.
    pub(super) fn stack_mask(&self) -> u64 {
        match (self.is_64_bit(), self.sregs.ss.db) {
            (true, _) => u64::MAX,
            (false, 0) => mask(2),
            (false, _) => mask(4),
        }
    }

    /// Fault at the first word, from the highest address down, that cannot be pushed.
    fn check_push(&mut self, linear: u64, bytes: &[u8], width: usize, cpl: u8) -> Done<()> {
        let step = u64::try_from(width).unwrap_or(8);
        let words = u64::try_from(bytes.len() / width.max(1)).unwrap_or(0);
        for n in (0..words).rev() {
            self.pieces(linear.wrapping_add(n * step), width, Access::frame(cpl))?;
        }
        Ok(())
    }

    /// Push a frame with the permissions of the new level, the first word at the highest address.
    pub(super) fn push(
        &mut self,
        stack: &mut Stack,
        frame: &[u64],
        width: usize,
        cpl: u8,
    ) -> Done<()> {
        let bytes: Vec<u8> = frame
            .iter()
            .rev()
            .flat_map(|word| word.to_le_bytes().into_iter().take(width))
            .collect();
        let length = u64::try_from(bytes.len()).unwrap_or(0);
        if width == 8 {
            let pointer = stack.pointer.wrapping_sub(length);
            if !self.is_canonical(pointer) {
                return fault_with(SS, 0);
            }
            self.check_push(pointer, &bytes, width, cpl)?;
            self.write_linear(pointer, &bytes, Access::frame(cpl))?;
            stack.pointer = pointer;
            return Ok(());
        }
        // A 16-bit stack wraps within its 64 KiB and does not change the upper half of ESP.
        let wrap = mask(if stack.segment.db != 0 { 4 } else { 2 });
        let pointer = stack.pointer.wrapping_sub(length) & wrap;
        if pointer.checked_add(length).is_none_or(|end| end > wrap + 1) {
            return Err(Stop::Unknown);
        }
        let old = std::mem::replace(&mut self.sregs.ss, stack.segment);
        let linear = self.linear(iced_x86::Register::SS, pointer, bytes.len(), true);
        self.sregs.ss = old;
        let linear = linear?;
        self.check_push(linear, &bytes, width, cpl)?;
        self.write_linear(linear, &bytes, Access::frame(cpl))?;
        stack.pointer = stack.pointer & !wrap | pointer;
        Ok(())
    }
}

/// SS after a change of privilege in long mode.
pub(super) fn null_stack(level: u8) -> kvm_segment {
    kvm_segment {
        selector: u16::from(level),
        limit: u32::MAX,
        type_: 3,
        present: 1,
        s: 1,
        dpl: level,
        db: 1,
        g: 1,
        ..Default::default()
    }
}
