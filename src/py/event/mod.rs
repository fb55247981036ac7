//! The event manager, its sources and exit handlers for Python. What Python code is called with, and
//! how it is entered, stands in the files beside this folder; what a machine does with its loop is
//! in `vmm_loop.rs` and `run.rs` there. Everything here runs on the thread that calls it; `run.rs`
//! and what stands below it on the thread that turns the loop.

mod call_later;
mod context;
mod delivery;
mod endpoint;
mod event_fd;
mod events;
mod exit_handler;
mod hosting;
mod loop_call;
mod manager;
mod owners;
mod queue;
mod reader;
mod registration;
mod run;
mod stats;
mod subscribers;
mod timer_fd;
mod timers;
mod turn_lock;

pub use endpoint::PyRemoteEndpoint;
pub use event_fd::PyEventFd;
pub use events::{PyEventOps, PyEvents, PySubscriberId};
pub(super) use exit_handler::call_kick;
pub use exit_handler::{PyVmmExitHandler, PyWrappedExitHandler};
pub use manager::PyEventManager;
pub(super) use owners::Ownership;
pub(super) use run::turn;
pub use timer_fd::PyTimerFd;
