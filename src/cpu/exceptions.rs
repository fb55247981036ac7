//! The exceptions of an ELF program: descriptors and code that end the run with what the processor
//! says of them, and that in turn. Pure data; `vcpu` makes an exit of it.

use super::gdt::selector;
use crate::error::Result;
use crate::layout;
use crate::memory::GuestMemory;
use crate::x86::PAGE_FAULT;

/// Exceptions have the first 32 of the interrupt numbers.
const COUNT: u64 = 32;
/// The limit of the interrupt descriptors.
pub const IDT_LIMIT: u16 = 16 * 32 - 1;
const HANDLERS: u64 = layout::EXCEPTION_PAGE + 0x200;
const HANDLER_SIZE: u64 = 16;
/// `hlt`, which ring 3 cannot execute, and a jump back to it.
const HANDLER: [u8; 3] = [0xf4, 0xeb, 0xfd];
/// The offset in a TSS of the first stack that a descriptor may name.
const TSS_IST1: u64 = 36;
const INTERRUPT_GATE: u64 = 0x8e00;
const IST1: u64 = 1;
const RING_3: u64 = 3 << 13;
/// Breakpoint and overflow, which ring 3 may raise by an instruction.
const FOR_RING_3: [u64; 2] = [3, 4];
const WITH_ERROR_CODE: [u8; 10] = [8, 10, 11, 12, 13, 14, 17, 21, 29, 30];

/// What the processor has put on the stack: the state that the exception has interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// The number of the exception.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u64>,
    /// The instruction: the one that failed, or after a trap the next one.
    pub rip: u64,
    /// The code segment, whose last two bits are the ring.
    pub cs: u64,
    /// The flags.
    pub rflags: u64,
    /// The stack pointer.
    pub rsp: u64,
    /// The stack segment.
    pub ss: u64,
}

/// Write descriptors, code, and the stack's address.
///
/// # Errors
/// If guest memory is too small.
pub fn write(memory: &GuestMemory) -> Result<()> {
    for vector in 0..COUNT {
        let [low, high] = gate(vector);
        let at = layout::EXCEPTION_PAGE + vector * 16;
        memory.write(at, &low.to_le_bytes())?;
        memory.write(at + 8, &high.to_le_bytes())?;
        memory.write(handler(vector), &HANDLER)?;
    }
    let top = layout::EXCEPTION_STACK + layout::PAGE;
    memory.write(layout::TSS + TSS_IST1, &top.to_le_bytes())
}

fn handler(vector: u64) -> u64 {
    HANDLERS + vector * HANDLER_SIZE
}

/// The interrupt descriptor of an exception.
fn gate(vector: u64) -> [u64; 2] {
    let handler = handler(vector);
    let ring = if FOR_RING_3.contains(&vector) { RING_3 } else { 0 };
    let low = handler & 0xffff
        | u64::from(selector::CODE) << 16
        | (IST1 | INTERRUPT_GATE | ring) << 32
        | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Whether memory still has these descriptors, and this code. `read` reads the word at an address.
#[must_use]
pub fn are_intact(read: impl Fn(u64) -> Option<u64>) -> bool {
    const CODE: u64 = (1 << (8 * HANDLER.len())) - 1;
    let halts = u64::from_le_bytes([HANDLER[0], HANDLER[1], HANDLER[2], 0, 0, 0, 0, 0]);
    (0..COUNT).all(|vector| {
        let at = layout::EXCEPTION_PAGE + vector * 16;
        [read(at), read(at + 8)] == gate(vector).map(Some)
            && read(handler(vector)).is_some_and(|code| code & CODE == halts)
    })
}

/// Whether an instruction is where the code of exceptions is, which has no other code beside it.
#[must_use]
pub fn is_here(rip: u64) -> bool {
    rip / layout::PAGE == layout::EXCEPTION_PAGE / layout::PAGE
}

/// The number of the exception whose code has halted with the next instruction here.
#[must_use]
pub fn halted_at(rip: u64) -> Option<u8> {
    let offset = rip.checked_sub(HANDLERS + 1)?;
    let vector = offset / HANDLER_SIZE;
    let is_halt = offset.is_multiple_of(HANDLER_SIZE) && vector < COUNT;
    is_halt.then_some(vector).and_then(|vector| u8::try_from(vector).ok())
}

/// What an exception's code finds at its stack pointer.
#[must_use]
pub fn interrupted(vector: u8, rsp: u64, read: impl Fn(u64) -> Option<u64>) -> Option<Interrupted> {
    let has_code = WITH_ERROR_CODE.contains(&vector);
    let frame = rsp.checked_add(if has_code { 8 } else { 0 })?;
    let word = |n: u64| read(frame.checked_add(8 * n)?);
    Some(Interrupted {
        vector,
        error_code: if has_code { Some(read(rsp)?) } else { None },
        rip: word(0)?,
        cs: word(1)?,
        rflags: word(2)?,
        rsp: word(3)?,
        ss: word(4)?,
    })
}

impl Interrupted {
    /// Whether CR2 has the address that could not be reached.
    #[must_use]
    pub fn is_page_fault(&self) -> bool {
        self.vector == PAGE_FAULT
    }

    /// The exception and what its error code says, in words.
    #[must_use]
    pub fn describe(&self, cr2: u64) -> String {
        let name = name(self.vector);
        match self.error_code {
            Some(code) if self.is_page_fault() => {
                format!("{name}: {} {cr2:#x}{}", access(code), why(code))
            }
            Some(code) => format!("{name}, error code {code:#x}"),
            None => name.into(),
        }
    }
}

/// Intel SDM volume 3, section 4.7: the error code of a page fault.
fn access(code: u64) -> &'static str {
    match (code & 1 << 4 != 0, code & 1 << 1 != 0) {
        (true, _) => "executing",
        (false, true) => "writing",
        (false, false) => "reading",
    }
}

fn why(code: u64) -> &'static str {
    if code & 1 == 0 { ", where no page is mapped" } else { ", which its page forbids" }
}

/// Intel SDM volume 3, table 6-1.
fn name(vector: u8) -> &'static str {
    match vector {
        0 => "divide error (#DE)",
        1 => "debug exception (#DB)",
        2 => "non-maskable interrupt",
        3 => "breakpoint (#BP)",
        4 => "overflow (#OF)",
        5 => "bound range exceeded (#BR)",
        6 => "invalid opcode (#UD)",
        7 => "device not available (#NM)",
        8 => "double fault (#DF)",
        10 => "invalid TSS (#TS)",
        11 => "segment not present (#NP)",
        12 => "stack fault (#SS)",
        13 => "general protection fault (#GP)",
        14 => "page fault (#PF)",
        16 => "x87 error (#MF)",
        17 => "alignment check (#AC)",
        18 => "machine check (#MC)",
        19 => "SIMD error (#XM)",
        20 => "virtualization exception (#VE)",
        21 => "control protection exception (#CP)",
        _ => "exception without a name",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_handler_is_a_halt_that_says_its_number() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        write(&memory).unwrap();
        for vector in 0..32u8 {
            let gate = layout::EXCEPTION_PAGE + u64::from(vector) * 16;
            let low = memory.load::<u64>(gate).unwrap();
            let handler = low & 0xffff | low >> 48 << 16;
            assert_eq!(memory.load::<u8>(handler).unwrap(), 0xf4);
            assert_eq!(halted_at(handler + 1), Some(vector));
            assert_eq!(halted_at(handler), None);
            assert_eq!(low >> 45 & 3, if [3, 4].contains(&vector) { 3 } else { 0 });
            assert_eq!(low >> 32 & 7, 1, "it has a stack of its own");
        }
        let read = |at| memory.load::<u64>(at).ok();
        assert!(are_intact(read) && is_here(HANDLERS) && !is_here(layout::PROGRAM_TABLES));
        for at in [layout::EXCEPTION_PAGE + 31 * 16, HANDLERS + 16, HANDLERS + 2] {
            let was = memory.load::<u8>(at).unwrap();
            memory.write(at, &[was ^ 1]).unwrap();
            assert!(!are_intact(read), "{at:#x}");
            memory.write(at, &[was]).unwrap();
        }
        assert_eq!(halted_at(0), None);
        assert_eq!(halted_at(u64::MAX), None);
        assert_eq!(halted_at(HANDLERS + 32 * 16 + 1), None);
    }

    #[test]
    fn a_frame_has_an_error_code_where_the_exception_has_one() {
        let read = |at: u64| Some(at);
        let fault = interrupted(14, 0x100, read).unwrap();
        assert_eq!((fault.error_code, fault.rip, fault.ss), (Some(0x100), 0x108, 0x128));
        let error = interrupted(0, 0x100, read).unwrap();
        assert_eq!((error.error_code, error.rip, error.ss), (None, 0x100, 0x120));
        assert_eq!(interrupted(0, u64::MAX, |_| Some(0)), None);
        assert_eq!(interrupted(0, 0x100, |_| None), None);
    }

    #[test]
    fn an_exception_is_put_in_words() {
        let fault = Interrupted { error_code: Some(6), ..interrupted(14, 0, Some).unwrap() };
        assert_eq!(fault.describe(16), "page fault (#PF): writing 0x10, where no page is mapped");
        let fault = Interrupted { error_code: Some(0x15), ..fault };
        assert_eq!(fault.describe(0), "page fault (#PF): executing 0x0, which its page forbids");
        let fault = Interrupted { error_code: Some(0), vector: 13, ..fault };
        assert_eq!(fault.describe(0), "general protection fault (#GP), error code 0x0");
        for vector in 0..=255 {
            let fault = Interrupted { error_code: None, vector, ..fault };
            assert!(!fault.describe(0).is_empty());
        }
    }
}
