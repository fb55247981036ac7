//! A KVM virtual machine monitor for Python.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("pyvmm needs Linux on x86-64");

pub mod boot;
pub mod config;
pub mod cpu;
pub mod devices;
pub mod error;
pub mod event;
pub mod exit_handler;
mod process;
pub mod vcpu;
pub mod vm;
pub mod vmm;
