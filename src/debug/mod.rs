//! Looking into a guest: its page tables, its instructions.

mod disassemble;
mod translate;

pub use disassemble::{bitness, decode, disassemble};
pub use translate::Paging;
