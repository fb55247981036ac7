//! Which sockets the machine's loop watches. On the loop's thread.
//!
//! A connection is watched edge-triggered for input: the loop is woken when something arrives, and
//! not again while the guest has no room for it. It is watched for room to write only while the
//! host has not taken all data.

use event_manager::{EventOps, EventSet, Events};

use super::hosts::UnixSocket;
use super::mux::{Mux, UNIX};
use super::socket::HostSocket;

impl Mux {
    /// Bring what the loop watches up to date, and close the sockets that are done with. After each
    /// other call.
    pub fn update_watches(&mut self, ops: &mut EventOps<'_>) {
        for socket in self.retired.drain(..).filter(|socket| socket.watched.is_some()) {
            // Fails only if it is not watched.
            let _ = ops.remove(Events::empty(&socket));
        }
        for id in self.changed.drain(..) {
            if let Some(connection) = self.connections.get_mut(&id) {
                let wants_room = connection.wants_room();
                connection.socket.iter_mut().for_each(|socket| watch(ops, socket, id, wants_room));
            } else if let Some(socket) = self.handshakes.get_mut(&id) {
                watch(ops, socket, id, false);
            }
        }
        let has_room = !self.is_full() && !self.is_exhausted;
        self.hosts.unix.iter_mut().for_each(|unix| watch_unix(ops, unix, has_room));
    }
}

fn watch(ops: &mut EventOps<'_>, socket: &mut HostSocket, id: u32, wants_room: bool) {
    if socket.watched == Some(wants_room) {
        return;
    }
    let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    events.set(EventSet::OUT, wants_room);
    let events = Events::with_data(socket, id, events);
    let changed = if socket.watched.is_some() { ops.modify(events) } else { ops.add(events) };
    // Fails only if the kernel has no memory for it; the next change tries again.
    if changed.is_ok() {
        socket.watched = Some(wants_room);
    }
}

fn watch_unix(ops: &mut EventOps<'_>, unix: &mut UnixSocket, is_wanted: bool) {
    if is_wanted == unix.is_watched {
        return;
    }
    let events = Events::with_data(unix, UNIX, EventSet::IN);
    let changed = if is_wanted { ops.add(events) } else { ops.remove(events) };
    if changed.is_ok() {
        unix.is_watched = is_wanted;
    }
}
