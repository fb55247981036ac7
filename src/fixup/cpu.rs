//! The processor of a fix-up: a copy of the registers, and other state through `Platform`. Changes
//! to the copy take effect only if the instruction completes.

use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::access::Access;
use super::native::NativeCode;
pub(crate) use super::stop::{Done, Fault, Flow, Stop, fault, fault_with};
use crate::x86::{CR0_PE, CR4_LA57, EFER_LMA, GP, SS, VM};

/// The rest of the processor: memory by guest-physical address, and rarely used state.
pub(crate) trait Platform {
    /// Read `data`. False if a part of the range is not memory.
    fn read(&mut self, address: u64, data: &mut [u8]) -> bool;
    /// Whether a whole range is memory that the guest may write. ROM is not.
    fn is_writable(&self, address: u64, length: usize) -> bool;
    /// Write `data`. If a part of the range is not writable memory, write nothing and return false.
    fn write(&mut self, address: u64, data: &[u8]) -> bool;
    /// Set bits of a page table entry if it is unchanged. False if it has changed. An entry in ROM
    /// keeps its bits.
    fn set_bits(&mut self, address: u64, size: u64, old: u64, bits: u64) -> bool;
    /// A model-specific register.
    fn msr(&mut self, index: u32) -> Option<u64>;
    /// EAX to EDX of a leaf of the guest's CPUID, its first one if it has several. Zero if there
    /// is none.
    fn cpuid(&mut self, leaf: u32) -> Option<[u32; 4]>;
    /// XCR0.
    fn xcr0(&mut self) -> Option<u64>;
    /// x87, SSE and what XCR0 enables, in the standard format of XSAVE.
    fn xsave(&mut self) -> Option<Vec<u8>>;
    /// Set the same state.
    fn set_xsave(&mut self, image: &[u8]) -> bool;
    /// Compare and exchange 16 bytes in one access. Returns the previous value. None if the address
    /// is not writable memory.
    fn exchange(&mut self, address: u64, old: u128, new: u128) -> Option<u128>;
    /// Memory for instructions to run on the host. None if there is none.
    fn native(&mut self) -> Option<&mut NativeCode>;
    /// Flush all translations.
    fn flush_translations(&mut self) -> bool;
}

/// The processor.
pub(crate) struct Cpu<'a> {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) platform: &'a mut dyn Platform,
    /// Whether the instruction ends the masking of non-maskable interrupts.
    pub(crate) unmasks_nmi: bool,
    /// Whether it has switched tasks: an exception is then raised in the new task.
    pub(super) has_switched: bool,
}

impl std::fmt::Debug for Cpu<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu").field("regs", &self.regs).finish_non_exhaustive()
    }
}

/// The number of a register relative to `first`, if it is one of the `count` registers from there.
fn number(register: Register, first: Register, count: usize) -> Option<usize> {
    (register as usize).checked_sub(first as usize).filter(|number| *number < count)
}

/// The size of a memory operand that is a number, in bytes. 0 if it is not a number.
fn memory_bytes(instruction: &Instruction) -> usize {
    match instruction.memory_size() {
        MemorySize::UInt8 | MemorySize::Int8 => 1,
        MemorySize::UInt16 | MemorySize::Int16 => 2,
        MemorySize::UInt32 | MemorySize::Int32 => 4,
        MemorySize::UInt64 | MemorySize::Int64 => 8,
        _ => 0,
    }
}

/// The bit mask for a width in bytes.
pub(crate) fn mask(size: usize) -> u64 {
    match size {
        0 => 0,
        1..8 => (1 << (size * 8)) - 1,
        _ => u64::MAX,
    }
}

impl<'a> Cpu<'a> {
    pub(crate) fn new(regs: kvm_regs, sregs: kvm_sregs, platform: &'a mut dyn Platform) -> Self {
        Self { regs, sregs, platform, unmasks_nmi: false, has_switched: false }
    }
}

impl Cpu<'_> {
    /// The privilege level.
    pub(crate) fn cpl(&self) -> u8 {
        match (self.is_protected(), self.regs.rflags & VM != 0) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => self.sregs.ss.dpl & 3,
        }
    }

    pub(crate) fn is_protected(&self) -> bool {
        self.sregs.cr0 & CR0_PE != 0
    }

    /// Whether the processor is in long mode, including compatibility mode.
    pub(crate) fn is_long(&self) -> bool {
        self.sregs.efer & EFER_LMA != 0
    }

    pub(crate) fn is_64_bit(&self) -> bool {
        self.is_long() && self.sregs.cs.l != 0
    }

    /// Whether an address is canonical.
    pub(crate) fn is_canonical(&self, address: u64) -> bool {
        let top = if self.sregs.cr4 & CR4_LA57 != 0 { 56 } else { 47 };
        let sign = address >> top;
        sign == 0 || sign == u64::MAX >> top
    }

    /// One of the sixteen registers, in full width.
    pub(crate) fn general(&mut self, number: usize) -> Option<&mut u64> {
        let r = &mut self.regs;
        Some(match number {
            0 => &mut r.rax,
            1 => &mut r.rcx,
            2 => &mut r.rdx,
            3 => &mut r.rbx,
            4 => &mut r.rsp,
            5 => &mut r.rbp,
            6 => &mut r.rsi,
            7 => &mut r.rdi,
            8 => &mut r.r8,
            9 => &mut r.r9,
            10 => &mut r.r10,
            11 => &mut r.r11,
            12 => &mut r.r12,
            13 => &mut r.r13,
            14 => &mut r.r14,
            15 => &mut r.r15,
            _ => return None,
        })
    }

    pub(crate) fn segment(&self, register: Register) -> Option<&kvm_segment> {
        let s = &self.sregs;
        Some(match register {
            Register::ES => &s.es,
            Register::CS => &s.cs,
            Register::SS => &s.ss,
            Register::DS => &s.ds,
            Register::FS => &s.fs,
            Register::GS => &s.gs,
            _ => return None,
        })
    }

    /// The value of a general register of 8 to 64 bits, and its width in bytes.
    pub(crate) fn register(&mut self, register: Register) -> Done<(u64, usize)> {
        let (number, size, is_high) = place(register)?;
        let whole = *self.general(number).ok_or(Stop::Unknown)?;
        let value = if is_high { whole >> 8 } else { whole };
        Ok((value & mask(size), size))
    }

    /// Set a general register. Writing 32 bits clears the upper half; narrower writes keep it.
    pub(crate) fn set_register(&mut self, register: Register, value: u64) -> Done<()> {
        let (number, size, is_high) = place(register)?;
        let whole = self.general(number).ok_or(Stop::Unknown)?;
        *whole = match (size, is_high) {
            (8, _) => value,
            (4, _) => value & mask(4),
            (_, true) => *whole & !0xff00 | (value & 0xff) << 8,
            _ => *whole & !mask(size) | value & mask(size),
        };
        Ok(())
    }

    /// The offset of a memory operand in its segment.
    pub(crate) fn offset(&mut self, instruction: &Instruction, operand: u32) -> Done<u64> {
        instruction
            .virtual_address(operand, 0, |register, _, _| match self.segment(register) {
                Some(_) => Some(0),
                None => self.register(register).ok().map(|(value, _)| value),
            })
            .ok_or(Stop::Unknown)
    }

    /// Load a register or memory operand, zero-extended.
    pub(crate) fn load(&mut self, instruction: &Instruction, operand: u32) -> Done<(u64, usize)> {
        match instruction.op_kind(operand) {
            OpKind::Register => self.register(instruction.op_register(operand)),
            OpKind::Memory => {
                let size = memory_bytes(instruction);
                let mut bytes = [0; 8];
                let data = bytes.get_mut(..size).filter(|data| !data.is_empty());
                let data = data.ok_or(Stop::Unknown)?;
                self.read_operand(instruction, operand, data)?;
                Ok((u64::from_le_bytes(bytes), size))
            }
            _ => Err(Stop::Unknown),
        }
    }

    /// Store a register or memory operand.
    pub(crate) fn store(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        value: u64,
    ) -> Done<()> {
        match instruction.op_kind(operand) {
            OpKind::Register => self.set_register(instruction.op_register(operand), value),
            OpKind::Memory => {
                let size = memory_bytes(instruction);
                let bytes = value.to_le_bytes();
                let data = bytes.get(..size).filter(|data| !data.is_empty());
                let data = data.ok_or(Stop::Unknown)?;
                self.write_operand(instruction, operand, data)
            }
            _ => Err(Stop::Unknown),
        }
    }

    /// Read a memory operand with the guest's privilege.
    pub(crate) fn read_operand(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        data: &mut [u8],
    ) -> Done<()> {
        let offset = self.offset(instruction, operand)?;
        let linear = self.linear(instruction.memory_segment(), offset, data.len(), false)?;
        self.read_linear(linear, data, Access::explicit(self.cpl(), false))
    }

    /// Fault as a write of a memory operand would, before it is read.
    pub(crate) fn check_write(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        length: usize,
    ) -> Done<()> {
        let offset = self.offset(instruction, operand)?;
        let linear = self.linear(instruction.memory_segment(), offset, length, true)?;
        self.pieces(linear, length, Access::explicit(self.cpl(), true)).map(drop)
    }

    /// Write a memory operand with the guest's privilege.
    pub(crate) fn write_operand(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        data: &[u8],
    ) -> Done<()> {
        let offset = self.offset(instruction, operand)?;
        let linear = self.linear(instruction.memory_segment(), offset, data.len(), true)?;
        self.write_linear(linear, data, Access::explicit(self.cpl(), true))
    }

    /// The linear address of `length` bytes of a segment, if the segment allows the access (Intel
    /// SDM volume 3, section 5.3; AMD APM volume 2, section 4.12).
    pub(crate) fn linear(
        &self,
        register: Register,
        offset: u64,
        length: usize,
        is_write: bool,
    ) -> Done<u64> {
        let segment = *self.segment(register).ok_or(Stop::Unknown)?;
        let vector = if register == Register::SS { SS } else { GP };
        let last = u64::try_from(length.saturating_sub(1)).unwrap_or(u64::MAX);
        if self.is_64_bit() {
            let has_base = matches!(register, Register::FS | Register::GS);
            let linear = offset.wrapping_add(if has_base { segment.base } else { 0 });
            return match self.is_canonical(linear) && self.is_canonical(linear.wrapping_add(last)) {
                true => Ok(linear),
                false => fault_with(vector, 0),
            };
        }
        if !allows(&segment, offset, last, is_write, self.is_protected()) {
            return fault_with(vector, 0);
        }
        Ok(segment.base.wrapping_add(offset) & mask(4))
    }
}

/// Whether a segment outside 64-bit mode allows an access.
fn allows(s: &kvm_segment, offset: u64, last: u64, is_write: bool, is_protected: bool) -> bool {
    let (is_code, second_bit) = (s.type_ & 8 != 0, s.type_ & 2 != 0);
    if is_protected {
        // The second bit: a code segment can be read, a data segment can be written.
        let is_refused = if is_write { is_code || !second_bit } else { is_code && !second_bit };
        if s.unusable != 0 || s.present == 0 || is_refused {
            return false;
        }
    }
    let Some(end) = offset.checked_add(last) else { return false };
    let limit = u64::from(s.limit);
    let is_expand_down = is_protected && !is_code && s.type_ & 4 != 0;
    if is_expand_down {
        let top = if s.db != 0 { mask(4) } else { mask(2) };
        return offset > limit && end <= top;
    }
    end <= limit
}

/// The number of a general register, its bytes, and whether it is the second byte (AH to BH).
fn place(register: Register) -> Done<(usize, usize, bool)> {
    let among = |first, count| number(register, first, count);
    if let Some(number) = among(Register::RAX, 16) {
        return Ok((number, 8, false));
    }
    if let Some(number) = among(Register::EAX, 16) {
        return Ok((number, 4, false));
    }
    if let Some(number) = among(Register::AX, 16) {
        return Ok((number, 2, false));
    }
    // AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, SIL, DIL, R8L to R15L.
    match among(Register::AL, 20) {
        Some(number @ 0..4) => Ok((number, 1, false)),
        Some(number @ 4..8) => Ok((number - 4, 1, true)),
        Some(number) => Ok((number - 4, 1, false)),
        None => Err(Stop::Unknown),
    }
}

/// The name of an instruction in a room's table of those that it executes.
pub(super) fn named(
    table: &[(Mnemonic, &'static str)],
    mnemonic: Mnemonic,
) -> Option<&'static str> {
    table.iter().find(|(known, _)| *known == mnemonic).map(|(_, name)| *name)
}
