//! A device as a subscriber of its machine's loop: the notifications of its queues, and the file
//! descriptors that it watches. Runs on the loop's thread.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::device::VirtioDevice;
use super::queues::Queues;
use crate::trace::{Value, is_recorded, record};

pub(super) struct VirtioSubscriber {
    pub(super) device: Arc<dyn VirtioDevice>,
    pub(super) queues: Arc<Queues>,
}

impl VirtioSubscriber {
    fn queue_of(&self, events: Events) -> Option<usize> {
        self.queues.notify.iter().position(|event| event.as_raw_fd() == events.fd())
    }
}

impl MutEventSubscriber for VirtioSubscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for event in &self.queues.notify {
            // Fails only without memory: the queue is then never processed.
            let _ = ops.add(Events::new(event, EventSet::IN));
        }
        self.device.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let Some(queue) = self.queue_of(events) else {
            return self.device.process_event(&self.queues, events, ops);
        };
        let Some(event) = self.queues.notify.get(queue) else { return };
        // Fails if another thread has read it: then there is nothing to do.
        let _ = event.read();
        self.queues.counts.notifications.fetch_add(1, Ordering::Relaxed);
        let began = is_recorded().then(Instant::now);
        self.device.process_queue(&self.queues, queue, ops);
        if let Some(began) = began {
            let name = format!("{} queue {queue}", self.queues.name());
            let values = [("queue", Value::Number(queue as u64))];
            record("virtio", &name, (began, Instant::now()), &values);
        }
    }
}
