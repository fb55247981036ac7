//! Inspects a guest: translation by its page tables, its instructions as text, and its symbols.
//! Pure functions of registers and bytes, which `vcpu` provides. Any thread.

mod disassemble;
pub mod symbols;
mod translate;

pub use disassemble::{bitness, decode, disassemble};
pub use symbols::{Symbol, Symbols};
pub use translate::Paging;
