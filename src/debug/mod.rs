//! Inspects a guest: translation by its page tables, and its instructions as text. Pure functions
//! of registers and bytes, which `vcpu` provides. Any thread.

mod disassemble;
mod translate;

pub use disassemble::{bitness, decode, disassemble};
pub use translate::Paging;
