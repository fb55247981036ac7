//! Looking into a guest: its page tables.

mod translate;

pub use translate::Paging;
