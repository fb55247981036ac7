//! What is behind a network device that has no network, such as that of a fork until it is given
//! one. Any thread.

use std::any::Any;
use std::sync::Arc;

use super::backend::{Frame, NetBackend, Watched};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Disconnected;

impl NetBackend for Disconnected {
    fn watched(&self) -> Watched {
        Watched { receive: -1, send: -1 }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        frames.len()
    }

    fn receive(&self, _budget: usize, _into: &mut dyn FnMut(Frame<'_>) -> bool) {}

    fn failure(&self) -> Option<String> {
        Some("not connected to a network".into())
    }

    fn describe(&self) -> String {
        "none".into()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_nothing_takes_everything_and_says_why() {
        assert_eq!(Disconnected.send(&[Frame::complete(&[0; 14])]), 1);
        Disconnected.receive(9, &mut |_| panic!("it has no frames"));
        assert_eq!(Disconnected.watched(), Watched { receive: -1, send: -1 });
        assert_eq!(Disconnected.failure().unwrap(), "not connected to a network");
    }
}
