//! One KVM virtual machine, `KvmVm`: its VM file descriptor, memory slots, interrupt controller and
//! vCPUs, which are created, started, quiesced and stopped together. `vcpu` has what a single vCPU
//! does; `vmm` adds devices and the event loop. Any thread may call this room. Each vCPU runs on
//! its own thread.

mod at_rest;
mod build;
mod device_calls;
mod halted;
mod interrupts;
mod kvm_vm;
mod life;
mod noapic;
mod quiesce;
mod spec;
mod start;
mod vcpus;

pub(crate) use build::claim_platform;
pub use interrupts::{IRQ_LINES, IoEvent};
pub use kvm_vm::KvmVm;
pub use spec::MachineSpec;
