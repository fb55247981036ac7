//! One vCPU: its state machine, its thread's loop, the one match over KVM's exits, and the kick.

mod fault;
mod kick;
mod run;
mod run_page;
mod state;
mod thread;

pub use kick::kick_signal;
pub use state::{RunState, VmRunState};
pub(crate) use thread::{Handle, Shared, Vcpu};
