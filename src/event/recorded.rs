//! Records the events that a loop dispatches in traces. Runs on the loop's thread.

use std::time::Instant;

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::subscriber::BoxedSubscriber;
use crate::trace::{Value, is_recorded, record};

/// A subscriber whose events are recorded.
pub(crate) struct Recorded(pub(crate) BoxedSubscriber);

impl MutEventSubscriber for Recorded {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if !is_recorded() {
            return self.0.process(events, ops);
        }
        let began = Instant::now();
        self.0.process(events, ops);
        record_event(events, (began, Instant::now()));
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.0.init(ops);
    }
}

/// Record the dispatch of a file descriptor's event to its subscriber.
pub(crate) fn record_event(events: Events, times: (Instant, Instant)) {
    let fd = events.fd().unsigned_abs();
    let values = [
        ("fd", Value::Number(u64::from(fd))),
        ("events", Value::Hex(u64::from(events.event_set().bits()))),
    ];
    record("event", &format!("fd {fd}"), times, &values);
}
