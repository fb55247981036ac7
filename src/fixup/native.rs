//! Runs one vector or floating-point instruction on the host's processor, with the guest's state.
//! `vector.rs` chooses the instructions, and makes sure that none can fault or touch anything but
//! this state. On the vCPU's thread.

use std::arch::asm;
use std::collections::HashMap;

use super::area::{HEADER, HEADER_END, area_end, in_use, put};
use super::stop::{Done, Stop};

/// The memory for instructions, and for each of them: at most 15 bytes, and a return.
const MEMORY: usize = 16 << 10;
const SLOT: usize = 16;
/// The size of the state, as KVM_GET_XSAVE gives it.
pub(super) const STATE: usize = 4096;
/// The longest memory operand, that of FNSAVE, and more.
pub(super) const OPERAND: usize = 128;
/// x87, SSE, AVX, and the three components of AVX-512.
const COMPONENTS: u64 = 0xe7;

/// The extended state in the standard format of XSAVE.
#[repr(C, align(64))]
struct Area([u8; STATE]);

/// What an instruction works on, besides the extended state: RAX, RCX, RDX, R8, R9, the flags, and
/// a memory operand at RDI.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    pub(super) memory: [u8; OPERAND],
    pub(super) registers: [u64; 5],
    pub(super) flags: u64,
}

/// Memory that contains instructions to run. It is mapped when the first one needs it.
#[derive(Debug, Default)]
pub(crate) struct NativeCode {
    memory: Option<Executable>,
    /// The slot of each instruction.
    slots: HashMap<Vec<u8>, usize>,
}

impl NativeCode {
    /// Run an instruction. `state` and `operands` change as it changes them. Returns an error if
    /// the host does not allow it, and nothing has changed.
    pub(super) fn run(
        &mut self,
        code: &[u8],
        state: &mut [u8],
        operands: &mut Operands,
    ) -> Done<()> {
        let components = components().ok_or(Stop::Unknown)?;
        let entry = self.place(code).ok_or(Stop::Unknown)?;
        let mut guest = Area([0; STATE]);
        guest.0.get_mut(..state.len()).ok_or(Stop::Unknown)?.copy_from_slice(state);
        let used = in_use(&guest.0)? & components;
        put(&mut guest.0, HEADER, 8, used)?;
        // XRSTOR faults if these are not zero.
        guest.0.get_mut(HEADER + 8..HEADER_END).ok_or(Stop::Unknown)?.fill(0);
        // SAFETY: `components` are enabled in XCR0, and all of them lie in the area. The guest's
        // header is valid, and its MXCSR, which `vector.rs` has set, too. At `entry` are an
        // instruction that `vector.rs` has chosen, and a return.
        unsafe { switch(entry, components, &mut guest, operands) };
        let kept = in_use(state)? & !components;
        let length = state.len();
        state.copy_from_slice(guest.0.get(..length).ok_or(Stop::Unknown)?);
        let now = in_use(state)?;
        put(state, HEADER, 8, now | kept)
    }

    /// The address of an instruction that is followed by a return.
    fn place(&mut self, code: &[u8]) -> Option<*const u8> {
        if self.memory.is_none() {
            self.memory = Executable::new();
        }
        let memory = self.memory.as_ref()?;
        if let Some(slot) = self.slots.get(code) {
            return memory.at(slot * SLOT);
        }
        if self.slots.len() * SLOT >= MEMORY {
            self.slots.clear();
        }
        let slot = self.slots.len();
        let mut bytes = [RETURN; SLOT];
        bytes.get_mut(..code.len()).filter(|_| code.len() < SLOT)?.copy_from_slice(code);
        if memory.write(slot * SLOT, &bytes).is_none() {
            // It may be writable still, and not executable.
            (self.memory, self.slots) = (None, HashMap::new());
            return None;
        }
        self.slots.insert(code.to_vec(), slot);
        memory.at(slot * SLOT)
    }
}

/// Load the guest's state, call an instruction, and save and restore the states.
///
/// # Safety
/// The state can be loaded with `components`. At `entry` are an instruction and a return. The
/// instruction reads and writes only the extended state, the registers that are loaded and stored
/// here, the flags of arithmetic, and the operand at RDI, which it does not exceed.
// Long because of the list of registers.
unsafe fn switch(entry: *const u8, components: u64, guest: &mut Area, operands: &mut Operands) {
    let mut host = Area([0; STATE]);
    // SAFETY: as the caller has promised. The areas are aligned, and the host's state at the end is
    // as it was.
    unsafe {
        asm!(
            "xsave64 [r14]",
            "xrstor64 [r13]",
            "lea rdi, [r12 + {memory}]",
            "push qword ptr [r12 + {flags}]",
            "popfq",
            "mov rax, [r12 + {registers}]",
            "mov rcx, [r12 + {registers} + 8]",
            "mov rdx, [r12 + {registers} + 16]",
            "mov r8, [r12 + {registers} + 24]",
            "mov r9, [r12 + {registers} + 32]",
            "call r15",
            "mov [r12 + {registers}], rax",
            "mov [r12 + {registers} + 8], rcx",
            "mov [r12 + {registers} + 16], rdx",
            "mov [r12 + {registers} + 24], r8",
            "mov [r12 + {registers} + 32], r9",
            "pushfq",
            "pop qword ptr [r12 + {flags}]",
            "mov rax, r10",
            "xor edx, edx",
            "xsave64 [r13]",
            "xrstor64 [r14]",
            memory = const std::mem::offset_of!(Operands, memory),
            registers = const std::mem::offset_of!(Operands, registers),
            flags = const std::mem::offset_of!(Operands, flags),
            in("r10") components,
            in("r12") std::ptr::from_mut(operands),
            in("r13") std::ptr::from_mut(guest),
            in("r14") &raw mut host,
            in("r15") entry,
            inout("rax") components => _,
            inout("rdx") 0_u64 => _,
            out("rcx") _,
            out("rdi") _,
            out("r8") _,
            out("r9") _,
        );
    }
}

const RETURN: u8 = 0xc3;

/// The components of the extended state that are loaded and saved. None if the host does not have
/// XSAVE, or places a component where KVM does not.
fn components() -> Option<u64> {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return None;
    }
    // SAFETY: XSAVE, which has just been detected, includes XGETBV.
    let enabled = unsafe { std::arch::x86_64::_xgetbv(0) } & COMPONENTS;
    (area_end(enabled, false) <= STATE).then_some(enabled)
}

/// Memory that can be executed, and is writable only while it is written.
#[derive(Debug)]
struct Executable(std::ptr::NonNull<u8>);

// SAFETY: the mapping belongs to this value alone, and no thread is tied to it.
unsafe impl Send for Executable {}
// SAFETY: a shared reference gives out addresses only; `write` is called by the owner, which
// `NativeCode::run` borrows mutably.
unsafe impl Sync for Executable {}

impl Executable {
    fn new() -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new private mapping, which overlaps nothing.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_EXEC,
                flags,
                -1,
                0,
            )
        };
        let is_mapped = at != libc::MAP_FAILED;
        is_mapped.then(|| std::ptr::NonNull::new(at.cast()).map(Self)).flatten()
    }

    fn protect(&self, protection: i32) -> bool {
        // SAFETY: the whole mapping, which belongs to this value. Nothing in it is running: the
        // vCPU's thread is here.
        unsafe { libc::mprotect(self.0.as_ptr().cast(), MEMORY, protection) == 0 }
    }

    fn at(&self, offset: usize) -> Option<*const u8> {
        (offset < MEMORY).then(|| self.0.as_ptr().wrapping_add(offset).cast_const())
    }

    fn write(&self, offset: usize, bytes: &[u8; SLOT]) -> Option<()> {
        if offset.checked_add(SLOT)? > MEMORY || !self.protect(libc::PROT_READ | libc::PROT_WRITE) {
            return None;
        }
        // SAFETY: the range is in the mapping, which is writable now, and which no reference
        // points to.
        unsafe { self.0.as_ptr().add(offset).cast::<[u8; SLOT]>().write(*bytes) };
        self.protect(libc::PROT_READ | libc::PROT_EXEC).then_some(())
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and this value, its only user, ends.
        unsafe { libc::munmap(self.0.as_ptr().cast(), MEMORY) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operands() -> Operands {
        Operands { memory: [0; OPERAND], registers: [1, 2, 3, 4, 5], flags: 2 }
    }

    fn state() -> Vec<u8> {
        let mut state = vec![0; STATE];
        put(&mut state, 24, 4, 0x1f80).unwrap();
        put(&mut state, 0, 2, 0x37f).unwrap();
        state
    }

    #[test]
    fn an_instruction_changes_its_operands_and_nothing_else() {
        let mut native = NativeCode::default();
        let (mut state, mut operands) = (state(), operands());
        native.run(&[0x66, 0x48, 0x0f, 0x6e, 0xc1], &mut state, &mut operands).unwrap(); // movq xmm0, rcx
        native.run(&[0xf3, 0x0f, 0x7f, 0x07], &mut state, &mut operands).unwrap(); // movdqu [rdi], xmm0
        native.run(&[0x66, 0x4c, 0x0f, 0x7e, 0xc0], &mut state, &mut operands).unwrap(); // movq rax, xmm8
        assert_eq!(operands.memory[..16], 2_u128.to_le_bytes());
        assert_eq!(operands.registers, [0, 2, 3, 4, 5]);
        assert_eq!(state[160..176], 2_u128.to_le_bytes());
    }

    #[test]
    fn full_memory_starts_again() {
        let mut native = NativeCode::default();
        let (mut state, mut operands) = (state(), operands());
        for number in 0..3000_u32 {
            let [low, high, ..] = number.to_le_bytes();
            let code = [0xb8, low, high, 0, 0]; // mov eax, number
            native.run(&code, &mut state, &mut operands).unwrap();
            assert_eq!(operands.registers[0], u64::from(number));
        }
    }
}
