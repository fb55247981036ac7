//! The event loop: the wrapped `event_manager::EventManager`, its epoll set, and timers.

mod epoll_set;
mod manager;
mod timer;

pub use manager::{BoxedSubscriber, EventManager};
pub use timer::{Expiry, TimerFd};
