//! A subscriber as the event manager owns it.

use event_manager::MutEventSubscriber;

/// Owned by the manager until it is removed.
pub type BoxedSubscriber = Box<dyn MutEventSubscriber + Send>;
