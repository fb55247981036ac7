//! Loads the code or kernel that the machine starts into guest memory. There is no KVM here; `vm`
//! sets the registers. On the thread that makes the machine, which may wait for files.

mod acpi;
mod area;
mod bzimage;
mod cpio;
mod dsdt;
mod elf;
mod embedded;
mod fields;
mod files;
mod firmware;
mod flat;
mod fw_cfg;
mod identify;
mod initrd;
mod kernel;
mod kernel_file;
mod kind;
mod linux;
mod load;
mod memory_map;
mod modules;
mod mptable;
mod multiboot;
mod notes;
mod payload;
mod program;
mod program_headers;
mod pvh;
mod relocations;
mod setup_header;
mod symbols;
mod tree;
mod virtio_mmio;
mod zero_page;

pub use embedded::embedded_guest;
pub use fw_cfg::fw_cfg_files;
pub use kind::{Kind, kind_of_file};
pub use load::load;
