//! Executes instructions that KVM's emulator refuses, as the processor would. A fix-up works on a
//! copy of the registers, and accesses other state through `Platform`. `vcpu/fixup.rs` applies the
//! result or the fault when the instruction has ended. Nothing here calls KVM. Runs on the vCPU's
//! thread.

mod access;
mod bits;
mod counts;
mod cpu;
mod descriptor;
mod execute;
mod interrupt;
mod sse;
mod stack;
mod system;
#[cfg(test)]
mod testing;
mod walk;
mod x87;
mod xsave;

pub use counts::Counts;
pub(crate) use cpu::{Cpu, Fault, Flow, Platform, Stop};
pub(crate) use execute::execute;
