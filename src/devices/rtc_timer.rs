//! The timer of the real-time clock's interrupts, as a subscriber of the event manager. Runs on the
//! loop's thread.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId};

use super::rtc::Rtc;
use crate::event::EventManager;

/// Have the clock raise its interrupts from this loop. Returns the subscriber, if the clock has an
/// interrupt line.
pub(super) fn connect(rtc: &Arc<Rtc>, manager: &EventManager) -> Option<SubscriberId> {
    rtc.timer()?;
    Some(manager.add_subscriber(Box::new(RtcTimer(Arc::clone(rtc)))))
}

struct RtcTimer(Arc<Rtc>);

impl MutEventSubscriber for RtcTimer {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.0.expire();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Some(timer) = self.0.timer() {
            let _ = ops.add(Events::new_raw(timer.as_raw_fd(), EventSet::IN));
        }
    }
}
