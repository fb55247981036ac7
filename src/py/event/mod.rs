//! `EventManager`, its sources, endpoints and exit handlers for Python. `run.rs` and `delivery.rs`
//! run on the thread that runs the loop, everything else on the caller's. `../enter.rs` enters
//! Python; `../vmm/event_loop.rs` and `../vmm/run.rs` are a machine's use of its loop.

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
mod private_numbers;
mod queue;
mod reader;
mod registration;
mod run;
mod stats;
mod subscribers;
mod timer_fd;
mod timers;

pub use endpoint::PyRemoteEndpoint;
pub use event_fd::PyEventFd;
pub use events::{PyEventOps, PyEvents, PySubscriberId};
pub(super) use exit_handler::call_kick;
pub use exit_handler::{PyVmmExitHandler, PyWrappedExitHandler};
pub use manager::PyEventManager;
pub(super) use owners::Ownership;
pub(super) use reader::Reader;
pub(super) use run::turn;
pub use timer_fd::PyTimerFd;
