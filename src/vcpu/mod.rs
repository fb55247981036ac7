//! One vCPU: its state machine, its thread's loop, the one match over KVM's exits, and the kick.

mod access;
mod cell;
mod dispatch;
mod exit;
mod fault;
mod fixup;
mod kick;
pub(crate) mod left;
mod registers;
mod retry;
mod run;
mod run_page;
mod signal;
mod stack;
mod state;
mod stats;
mod string_io;
mod thread;

pub(crate) use cell::is_thread_of;
pub use cell::{Cell, current};
pub use dispatch::{Dispatch, ExitHook, Observer, Reply, Seen};
pub use exit::{Data, ExitKind, VcpuExit};
pub use registers::{RegisterClass, Vcpu};
pub use signal::{kick_signal, use_signal};
pub use stack::set_stack_size;
#[cfg_attr(not(feature = "python"), allow(unused_imports, reason = "for the binding"))]
pub(crate) use stack::spawn;
pub use state::{RunState, VmRunState};
pub use stats::{Count, Place, Stats, VcpuTime};
pub(crate) use thread::{Handle, Shared};
