//! Inspects a guest: its page tables and instructions.

mod disassemble;
mod translate;

pub use disassemble::{bitness, decode, disassemble};
pub use translate::Paging;
