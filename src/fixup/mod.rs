//! Executes instructions that KVM's emulator refuses, as the processor would. A fix-up works on a
//! copy of the registers, and accesses other state through `Platform`. `vcpu/fixup.rs` applies the
//! result or the fault when the instruction has ended. Nothing here calls KVM. Runs on the vCPU's
//! thread.

mod access;
mod area;
mod bits;
mod counts;
mod cpu;
mod deliver;
mod descriptor;
mod execute;
mod feature;
mod interrupt;
mod legacy;
mod native;
mod rewrite;
mod stack;
mod stop;
mod system;
mod task;
#[cfg(test)]
mod testing;
mod transfer;
mod unit;
mod vector;
mod walk;
mod x87;
mod xsave;

pub use counts::Counts;
pub(crate) use cpu::{Cpu, Fault, Platform};
pub(crate) use execute::{Outcome, execute, undefined};
pub(crate) use native::NativeCode;
pub(crate) use unit::is_vector;
