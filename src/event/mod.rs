//! The event loop: the wrapped `event_manager::EventManager`, its epoll set, and timers.

mod calls;
mod epoll_set;
mod errors;
mod manager;
mod recorded;
mod registering;
mod registrations;
mod run;
mod subscriber;
mod timer;
mod waits;

pub use calls::Calls;
pub use manager::EventManager;
#[cfg(feature = "python")]
pub(crate) use recorded::record_event;
pub use subscriber::BoxedSubscriber;
pub use timer::{Expiry, TimerFd};
