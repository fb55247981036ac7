//! The physical limit of the loop: each pattern in pure Rust on event-manager, as dispatches a
//! second. Arguments: the number of registered eventfds, how many are ready at once, and how many
//! dispatches; then "read" for a loop that writes nothing: what a dispatch costs that leaves the
//! writing to somebody else.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

struct Link {
    fd: Rc<EventFd>,
    count: Rc<Cell<usize>>,
    writes: bool,
}

impl MutEventSubscriber for Link {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.fd.read().unwrap();
        if self.writes {
            self.fd.write(1).unwrap();
        }
        self.count.set(self.count.get() + 1);
    }

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&*self.fd, EventSet::IN)).unwrap();
    }
}

fn main() {
    let numbers = std::env::args().skip(1).take(3).map(|a| a.parse().unwrap());
    let [registered, ready, dispatches]: [usize; 3] =
        numbers.collect::<Vec<_>>().try_into().unwrap();
    let writes = std::env::args().nth(4).is_none();
    // Without writes each read takes one of many.
    let (flags, initial) = if writes { (0, 1) } else { (EFD_SEMAPHORE, 1 << 40) };
    let new = || Rc::new(EventFd::new(EFD_NONBLOCK | flags).unwrap());
    let fds: Vec<Rc<EventFd>> = (0..registered).map(|_| new()).collect();
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
    let count = Rc::new(Cell::new(0));
    for fd in &fds {
        let link = Link { fd: Rc::clone(fd), count: Rc::clone(&count), writes };
        manager.add_subscriber(Box::new(link));
    }
    fds.iter().take(ready).for_each(|fd| fd.write(initial).unwrap());
    let start = Instant::now();
    while count.get() < dispatches {
        manager.run().unwrap();
    }
    println!("{}", dispatches as f64 / start.elapsed().as_secs_f64());
}
