//! Loads the code or kernel that the machine starts into guest memory. There is no KVM here; `vm`
//! sets the registers. On the thread that makes the machine, which may wait for files.

mod elf;
mod embedded;
mod files;
mod firmware;
mod flat;
mod initrd;
mod kernel;
mod linux;
mod load;
mod mptable;
mod program;
mod program_headers;
mod symbols;

pub use embedded::embedded_guest;
pub use load::load;
