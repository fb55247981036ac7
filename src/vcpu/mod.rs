//! One vCPU: its state machine, its thread's loop, the one match over KVM's exits, and the kick.

mod cell;
mod exit;
mod fault;
mod fixup;
mod kick;
mod registers;
mod run;
mod run_page;
mod signal;
mod state;
mod thread;

pub use cell::Cell;
pub use exit::VcpuExit;
pub use registers::{RegisterClass, Vcpu};
pub use signal::{kick_signal, use_signal};
pub use state::{RunState, VmRunState};
pub(crate) use thread::{Handle, Shared};
