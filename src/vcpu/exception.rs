//! The exception of an ELF program: its handler has halted, which becomes an exit here. What a
//! handler consists of is in `cpu::exceptions`. On the thread that runs the vCPU.

use super::vcpu::Vcpu;
use crate::cpu::exceptions::{self, Interrupted};
use crate::cpu::regs;
use crate::debug::Symbols;
use crate::error::Result;
use crate::exit_handler::{Exception, Exit, ExitReason};
use crate::kvm::checked as kvm;
use crate::layout;

/// The exit of a vCPU that has executed HLT; none if that was not an exception's. The vCPU is back
/// in the state that the exception has interrupted.
pub(super) fn take(vcpu: &mut Vcpu) -> Option<Exit> {
    // Without symbols there is no ELF program, and the registers need not be read.
    symbols(vcpu, |_| ())?;
    let (at, cr2) = resume(vcpu).ok()??;
    let place = symbols(vcpu, |symbols| symbols.find(at.rip)).flatten();
    let mut what = at.describe(cr2);
    what += &match &place {
        Some((name, offset)) => format!(", at {:#x}, in {name}+{offset:#x}", at.rip),
        None => format!(", at {:#x}", at.rip),
    };
    let exception = Exception {
        vector: at.vector,
        error_code: at.error_code,
        cr2: at.is_page_fault().then_some(cr2),
        rip: at.rip,
        symbol: place.map(|(name, _)| name),
    };
    let (fault, exception) = (Some(what), Some(exception));
    Some(Exit { fault, exception, ..Exit::new(ExitReason::Exception) })
}

fn symbols<T>(vcpu: &Vcpu, look: impl FnOnce(&Symbols<'_>) -> T) -> Option<T> {
    let read = |at| vcpu.memory().load::<u64>(at).ok();
    Symbols::at(layout::SYMBOLS, &read).map(|symbols| look(&symbols))
}

/// Put the vCPU back; none if it has not halted in an exception's code.
fn resume(vcpu: &mut Vcpu) -> Result<Option<(Interrupted, u64)>> {
    let mut regs = vcpu.general()?;
    let Some(vector) = exceptions::halted_at(regs.rip) else { return Ok(None) };
    let mut sregs = kvm("KVM_GET_SREGS", vcpu.fd().get_sregs())?;
    if sregs.idt.base != layout::EXCEPTION_PAGE || sregs.cs.dpl != 0 {
        return Ok(None);
    }
    let read = |at| vcpu.memory().load::<u64>(at).ok();
    let Some(at) = exceptions::interrupted(vector, regs.rsp, read) else { return Ok(None) };
    regs::resume_program(&mut regs, &mut sregs, &at);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_general(&regs)?;
    Ok(Some((at, sregs.cr2)))
}
