//! One vCPU: its descriptor and registers, the thread that runs it, the one match over KVM's exits,
//! and the kick that brings it out of its guest. `vm` has the set of a machine's vCPUs, `devices`
//! its devices. Each vCPU runs on its own thread, `vcpu_{id}`. Other threads kick and command it,
//! and access it while it is *at rest*: out of its guest, and not entering again by itself.

mod access;
mod answer;
mod commands;
#[cfg(all(test, loom))]
mod commands_model;
mod current;
mod enter;
mod entry;
mod exception;
mod exit;
mod fault;
mod fixup;
mod guest_debug;
mod halted;
mod handle;
mod host_access;
mod kick;
mod msr;
mod own_thread;
mod pending;
mod registers;
mod report;
mod rest;
mod retry;
mod router;
mod run;
mod run_here;
mod run_once;
mod run_page;
mod signal;
mod stack;
mod state;
mod state_id;
mod stats;
mod string_io;
mod thread;
mod thread_id;
mod tick;
mod ticked;
#[cfg(feature = "python")]
mod timing;
pub(crate) mod unjoined;
#[allow(clippy::module_inception, reason = "it is where `Vcpu` is")]
mod vcpu;
mod whole_state;

pub use answer::{Answer, AnsweredBy};
pub use current::current;
pub(crate) use current::is_thread_of;
#[cfg_attr(not(feature = "python"), allow(unused_imports, reason = "for the binding"))]
pub(crate) use current::with_vcpu_in_callback;
pub use exit::{Data, ExitKind, VcpuExit};
pub use guest_debug::{DebugOwner, DebugRequest};
pub use handle::VcpuHandle;
pub use registers::RegisterClass;
pub use router::{AnsweredExit, ExitHook, ExitRouter, HookPriority, Observer, Reply};
pub(crate) use run_here::{HereRun, LeaveReason, begin as begin_here};
#[cfg_attr(not(feature = "python"), allow(unused_imports, reason = "for the binding"))]
pub(crate) use run_page::keep_run_page;
pub use signal::{kick_signal, use_signal};
pub use stack::set_stack_size;
pub(crate) use stack::spawn;
#[cfg(feature = "python")]
pub(crate) use stack::stack_limit;
pub use state::{RunState, VmRunState};
pub(crate) use state_id::StateId;
pub use stats::{Count, ExitKey, Stats, VcpuTime};
pub(crate) use thread::{Shared, create, hand_over, start};
pub(crate) use tick::can_tick;
pub use vcpu::Vcpu;
pub(crate) use vcpu::VcpuName;
