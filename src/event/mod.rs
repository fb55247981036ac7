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

pub(crate) use poll::wait_for_either;

pub use calls::Calls;
pub use manager::{BoxedSubscriber, EventManager};
pub use timer::{Expiry, TimerFd};
