//! The initial state of a vCPU: CPUID, MSRs, registers, and the tables in guest memory. `vcpu` runs
//! it; here on the thread that makes the machine.

mod config;
pub mod cpuid;
mod entries;
pub mod exceptions;
mod features;
pub mod gdt;
mod level;
pub mod msrs;
pub mod paging;
pub mod regs;
pub mod tables;
mod template;
mod topology;
pub(crate) mod xstate;

pub use config::{Arguments, CpuConfig, CpuMode, Start};
pub use features::{Feature, Register, feature, feature_names, names_in};
pub use template::{BaseTemplate, CpuTemplate, Level, RegisterBits};
pub use topology::Topology;
