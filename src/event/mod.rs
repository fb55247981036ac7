//! The event loop: the wrapped `event_manager::EventManager` and its epoll set.

mod epoll_set;
mod manager;

pub use manager::{BoxedSubscriber, EventManager};
