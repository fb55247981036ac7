//! One KVM virtual machine, `KvmVm`: its VM file descriptor, memory slots, interrupt controller and
//! vCPUs, and how they are made, started, quiesced and stopped together. What one vCPU does is in
//! `vcpu`, devices and the loop are added by `vmm`. Any thread may call it; each vCPU's guest is
//! entered on its own thread.

mod build;
mod interrupts;
mod kvm_vm;
mod life;
mod quiesce;
mod restore;
mod shape;
mod start;
mod vcpus;

pub(crate) use build::claim_platform;
pub use interrupts::{IRQ_LINES, IoEvent};
pub use kvm_vm::KvmVm;
pub use shape::Shape;
