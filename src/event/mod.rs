//! The event loop without Python: the wrapped `event_manager::EventManager`, its epoll set, timers,
//! and the requests of other threads to the loop's. `src/py/event/` is its Python binding. The loop
//! runs on its caller's thread; registrations and requests come from any thread.

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
mod turn_lock;

pub use calls::Calls;
pub use manager::EventManager;
#[cfg(feature = "python")]
pub(crate) use recorded::record_event;
pub use subscriber::BoxedSubscriber;
pub use timer::{Expiry, TimerFd};
pub use turn_lock::NextTurn;
