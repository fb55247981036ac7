//! The event loop: the wrapped `event_manager::EventManager`, its epoll set, and timers.

mod calls;
mod epoll_set;
mod errors;
mod inner;
mod manager;
mod poll;
mod timer;
mod turns;
mod waits;

#[cfg(feature = "python")]
pub(crate) use poll::{is_blocking, read_count};
pub(crate) use poll::{take_count, wait_for_either};

pub use calls::Calls;
pub use manager::{BoxedSubscriber, EventManager};
pub use timer::{Expiry, TimerFd};
