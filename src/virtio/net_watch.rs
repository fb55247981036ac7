//! Which descriptors of a backend the loop watches. Those that nobody acts on are not watched, not
//! even for errors, so that the loop never spins. On the loop's thread.

use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};

use crate::net::Watched;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// At most two, without empty sets.
    current: Vec<(RawFd, EventSet)>,
}

impl Watch {
    /// Watch for frames, and for room.
    pub(super) fn set(
        &mut self,
        watched: Watched,
        (receive, send): (bool, bool),
        ops: &mut EventOps<'_>,
    ) {
        let mut wanted: Vec<(RawFd, EventSet)> = Vec::with_capacity(2);
        for (fd, set, is_wanted) in
            [(watched.receive, EventSet::IN, receive), (watched.send, EventSet::OUT, send)]
        {
            match wanted.iter_mut().find(|(other, _)| *other == fd) {
                _ if !is_wanted || fd < 0 => {}
                Some((_, sets)) => *sets |= set,
                None => wanted.push((fd, set)),
            }
        }
        if wanted == self.current {
            return;
        }
        // None of these fails for a descriptor that the backend keeps open; without memory, frames
        // wait for the next notification.
        for (fd, set) in &self.current {
            match wanted.iter().find(|(other, _)| other == fd) {
                Some((_, sets)) if sets != set => drop(ops.modify(Events::new_raw(*fd, *sets))),
                Some(_) => {}
                None => drop(ops.remove(Events::new_raw(*fd, *set))),
            }
        }
        for (fd, set) in &wanted {
            if !self.current.iter().any(|(other, _)| other == fd) {
                let _ = ops.add(Events::new_raw(*fd, *set));
            }
        }
        self.current = wanted;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.current.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventManager;
    use event_manager::MutEventSubscriber;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;
    use std::sync::Arc;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    /// Watches what is wanted next, each time that its eventfd is written.
    struct Subscriber {
        watch: Watch,
        watched: Watched,
        go: Arc<EventFd>,
        wanted: Vec<(bool, bool)>,
        seen: Arc<crate::sync::Mutex<Vec<(RawFd, EventSet)>, crate::sync::rank::Test>>,
    }

    impl MutEventSubscriber for Subscriber {
        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&*self.go, EventSet::IN)).unwrap();
        }

        fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
            if events.fd() == self.go.as_raw_fd() {
                self.go.read().unwrap();
                let wanted = self.wanted.remove(0);
                self.watch.set(self.watched, wanted, ops);
                assert_eq!(self.watch.is_empty(), wanted == (false, false));
            } else {
                self.seen.lock().push((events.fd(), events.event_set()));
                self.watch.set(self.watched, (false, false), ops);
            }
        }
    }

    #[test]
    fn one_descriptor_is_watched_for_what_is_wanted_of_it() {
        let (socket, peer) = UnixDatagram::pair().unwrap();
        let fd = socket.as_raw_fd();
        let watched = Watched { receive: fd, send: fd };
        let go = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let seen = Arc::default();
        let wanted = vec![(true, false), (false, true), (true, true), (false, false)];
        let (manager, watch) = (EventManager::new().unwrap(), Watch::default());
        let (go_too, seen_too) = (Arc::clone(&go), Arc::clone(&seen));
        manager.add_subscriber(Box::new(Subscriber {
            watch,
            watched,
            go: go_too,
            wanted,
            seen: seen_too,
        }));
        let turns = |count: usize| {
            go.write(1).unwrap();
            for _ in 0..count {
                manager.run_with_timeout(0).unwrap();
            }
            std::mem::take(&mut *seen.lock())
        };
        assert_eq!(turns(3), [], "nothing to receive");
        assert_eq!(turns(3), [(fd, EventSet::OUT)]);
        peer.send(b"x").unwrap();
        assert_eq!(turns(3), [(fd, EventSet::IN | EventSet::OUT)]);
        assert_eq!(turns(3), []);
    }
}
