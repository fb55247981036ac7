//! Delivers exceptions and software interrupts, and what is raised on the way to their handlers:
//! the next exception, a double fault, or a shutdown (Intel SDM volume 3, sections 6.13 and 6.15).
//! `interrupt.rs` enters the handler itself.

use super::cpu::{Cpu, Done, Fault, Flow, Stop};
use crate::x86::{DB, DE, DOUBLE_FAULT, GP, NP, PAGE_FAULT, RF, SS, TS};

/// In an error code: the event is not the program's own interrupt.
const CODE_EXTERNAL: u32 = 1;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// INT n, INT3 and INTO, whose gate must be open to the program.
    Software,
    /// INT1.
    Privileged,
    /// An exception after an instruction.
    Trap,
    /// An exception at an instruction.
    Fault,
}

/// An interrupt or exception.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub(super) vector: u8,
    pub(super) code: Option<u32>,
    pub(super) source: Source,
    /// The address that the handler returns to.
    pub(super) next: u64,
}

impl Event {
    /// RFLAGS in the frame. RF is set for a fault, so that the instruction is not stopped by the
    /// same breakpoint again.
    pub(super) fn flags(&self, cpu: &Cpu<'_>) -> u64 {
        match self.source {
            Source::Fault => cpu.regs.rflags | RF,
            _ => cpu.regs.rflags & !RF,
        }
    }
}

/// Whether an exception makes a double fault with one that is raised while it is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    Page,
    Double,
}

fn class(vector: u8) -> Class {
    match vector {
        DOUBLE_FAULT => Class::Double,
        PAGE_FAULT => Class::Page,
        DE | TS | NP | SS | GP => Class::Contributory,
        _ => Class::Benign,
    }
}

/// What is delivered if `second` is raised while `first` is delivered.
fn combined(first: Class, second: Fault) -> Done<Fault> {
    match (first, class(second.vector)) {
        (Class::Double, _) => Err(Stop::Shutdown),
        (Class::Contributory, Class::Contributory)
        | (Class::Page, Class::Contributory | Class::Page) => {
            Ok(Fault { vector: DOUBLE_FAULT, code: Some(0), address: None })
        }
        _ => Ok(second),
    }
}

impl Cpu<'_> {
    /// Deliver a software interrupt from an instruction that ends at `next`.
    pub(super) fn interrupt(&mut self, vector: u8, source: Source, next: u64) -> Done<Flow> {
        self.attempt(&Event { vector, code: None, source, next })
    }

    /// Raise an exception: enter its handler, or that of the exception that this raises.
    pub(super) fn raise(&mut self, first: Fault, source: Source) -> Done<Flow> {
        let (mut fault, mut source) = (first, source);
        if let Some(address) = first.address {
            self.sregs.cr2 = address;
        }
        loop {
            // Real mode has no error codes.
            let code = fault.code.filter(|_| self.is_protected());
            let event = Event { vector: fault.vector, code, source, next: self.regs.rip };
            let second = match self.attempt(&event) {
                Err(Stop::Fault(second)) => second,
                other => return other,
            };
            // Also if it becomes a double fault.
            if let Some(address) = second.address {
                self.sregs.cr2 = address;
            }
            fault = combined(class(fault.vector), second)?;
            source = Source::Fault;
        }
    }

    /// Enter a handler once. An error code says whether the event was the program's own.
    fn attempt(&mut self, event: &Event) -> Done<Flow> {
        self.enter(event).map_err(|stop| match stop {
            Stop::Fault(Fault {
                vector: vector @ (TS | NP | SS | GP),
                code: Some(code),
                address,
            }) if event.source != Source::Software => {
                Stop::Fault(Fault { vector, code: Some(code | CODE_EXTERNAL), address })
            }
            stop => stop,
        })
    }
}

/// The debug exception of a single step.
pub(super) const STEP: Fault = Fault { vector: DB, code: None, address: None };
