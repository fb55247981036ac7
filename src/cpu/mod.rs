//! The initial state of a vCPU: CPUID, MSRs, registers, and the tables in guest memory. `vcpu` runs
//! it; here on the thread that makes the machine.

mod config;
pub mod cpuid;
pub mod exceptions;
mod features;
pub mod gdt;
pub mod msrs;
pub mod paging;
pub mod regs;
pub mod tables;
mod topology;

pub use config::{Arguments, CpuConfig, CpuMode, CpuTemplate, Start};
pub use features::{Feature, Register, feature, feature_names};
