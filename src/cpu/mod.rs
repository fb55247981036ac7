//! What a vCPU is before its first instruction: CPUID, MSRs, registers, tables in guest memory.

pub mod cpuid;
pub mod msrs;
pub mod regs;
pub mod tables;
mod topology;
