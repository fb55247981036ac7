//! The physical limit of the loop: each pattern in pure Rust on event-manager, as dispatches a second.
//! Arguments: the number of registered eventfds, how many are ready at once, and how many dispatches.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

struct Link {
    fd: Rc<EventFd>,
    count: Rc<Cell<usize>>,
}

impl MutEventSubscriber for Link {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.fd.read().unwrap();
        self.fd.write(1).unwrap();
        self.count.set(self.count.get() + 1);
    }

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&*self.fd, EventSet::IN)).unwrap();
    }
}

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    let (registered, ready, dispatches) = (arguments[0], arguments[1], arguments[2]);
    let fds: Vec<Rc<EventFd>> =
        (0..registered).map(|_| Rc::new(EventFd::new(EFD_NONBLOCK).unwrap())).collect();
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
    let count = Rc::new(Cell::new(0));
    for fd in &fds {
        manager.add_subscriber(Box::new(Link { fd: Rc::clone(fd), count: Rc::clone(&count) }));
    }
    fds.iter().take(ready).for_each(|fd| fd.write(1).unwrap());
    let start = Instant::now();
    while count.get() < dispatches {
        manager.run().unwrap();
    }
    println!("{}", dispatches as f64 / start.elapsed().as_secs_f64());
}
