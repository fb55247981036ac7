//! The thread of a share: takes a request from the queue, serves it without an access to the
//! queues, because the host's file system may take any time, and gives the reply. A request that a
//! snapshot finds served and not replied to is in its state with the reply: the restored device
//! takes the chain again and gives the same reply, so that nothing is made or removed twice.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffers::{ChainReader, ChainWriter};
use super::queues::Queues;
use crate::bytes::Reader;
use crate::error::{Error, ErrorKind, Result};
use crate::share::{LEAST_ROOM, MOST_BYTES, Server};
use crate::sync::{Condvar, Mutex, rank};

/// How long a snapshot waits for a request that is being served.
const PATIENCE: Duration = Duration::from_secs(5);

/// A request and its reply.
type Served = (Vec<u8>, Vec<u8>);

#[derive(Debug)]
struct State {
    /// None while the thread serves a request, and when the machine is closed.
    server: Option<Server>,
    /// The request that is not replied to yet.
    served: Option<Served>,
    queues: Option<Arc<Queues>>,
    is_notified: bool,
    is_closed: bool,
    /// How many have quiesced the device.
    holds: usize,
    /// Resets by the driver. A request from before one is void.
    resets: u64,
}

/// What the device and its thread share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State, rank::VirtioDevice>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(server: Server) -> Self {
        let state = State {
            server: Some(server),
            served: None,
            queues: None,
            is_notified: false,
            is_closed: false,
            holds: 0,
            resets: 0,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The driver has notified the device.
    pub(super) fn notify(&self, queues: &Arc<Queues>) {
        let mut state = self.state.lock();
        state.is_notified = true;
        if state.queues.is_none() && !state.is_closed {
            state.queues = Some(Arc::clone(queues));
        }
        self.changed.notify_all();
    }

    /// The driver has reset the device: its session ends.
    pub(super) fn reset(&self) {
        let mut state = self.state.lock();
        state.resets += 1;
        state.served = None;
        if let Some(server) = &mut state.server {
            server.reset();
        }
        self.changed.notify_all();
    }

    /// Serve nothing until `resume`. Fails if a request is being served that does not end.
    pub(super) fn quiesce(&self) -> std::result::Result<(), ()> {
        let mut state = self.state.lock();
        state.holds += 1;
        let until = Instant::now() + PATIENCE;
        while state.server.is_none() && !state.is_closed {
            if self.changed.wait_until(&mut state, until) {
                state.holds -= 1;
                self.changed.notify_all();
                return Err(());
            }
        }
        Ok(())
    }

    pub(super) fn resume(&self) {
        let mut state = self.state.lock();
        state.holds = state.holds.saturating_sub(1);
        self.changed.notify_all();
    }

    /// End the thread. Returns whether it is idle.
    pub(super) fn close(&self) -> bool {
        let mut state = self.state.lock();
        let was_closed = std::mem::replace(&mut state.is_closed, true);
        state.queues = None;
        let server = state.server.take();
        self.changed.notify_all();
        drop(state);
        was_closed || server.is_some()
    }

    /// The session, without the lock: it asks the host where its files are.
    fn with_server<T>(&self, with: impl FnOnce(&mut Server) -> T) -> Result<T> {
        let taken = self.state.lock().server.take();
        let mut server = taken.ok_or_else(|| {
            Error::new(ErrorKind::State, "share", "a request is being served, or it is closed")
        })?;
        let result = with(&mut server);
        self.state.lock().server = Some(server);
        Ok(result)
    }

    pub(super) fn save(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let (request, reply) = self.state.lock().served.clone().unwrap_or_default();
        for part in [&request, &reply] {
            bytes.extend(u32::try_from(part.len()).unwrap_or(0).to_le_bytes());
            bytes.extend(part);
        }
        bytes.extend(self.with_server(|server| server.save())?);
        Ok(bytes)
    }

    pub(super) fn restore(&self, bytes: &[u8]) -> Result<()> {
        let mut reader = Reader::new("share", bytes);
        let mut part = || {
            let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
            reader.bytes(length).map(<[u8]>::to_vec)
        };
        let served = (part()?, part()?);
        self.with_server(|server| server.restore(reader.rest()))??;
        self.state.lock().served = Some(served).filter(|(request, _)| !request.is_empty());
        Ok(())
    }

    /// The thread.
    pub(super) fn run(&self) {
        while let Some(queues) = self.next_work() {
            while self.serve(&queues) {}
        }
    }

    fn next_work(&self) -> Option<Arc<Queues>> {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if std::mem::take(&mut state.is_notified) && state.queues.is_some() {
                return state.queues.clone();
            }
            self.changed.wait(&mut state);
        }
    }

    /// Serve a request, if there is one.
    fn serve(&self, queues: &Queues) -> bool {
        let Some(access) = queues.access() else { return false };
        let Some(chain) = access.pop(0) else { return false };
        let room = usize::try_from(chain.writable_len()).unwrap_or(MOST_BYTES).min(MOST_BYTES);
        if room < LEAST_ROOM {
            access.fail("a request has no room for its reply");
            return false;
        }
        // What is longer is not as long as it says.
        let message = ChainReader::new(&access, &chain).read_vec(MOST_BYTES);
        // No reset is between this and the access's end.
        let (epoch, resets) = (access.epoch(), self.state.lock().resets);
        drop(access);
        let Some(reply) = self.reply(resets, message, room) else { return true };
        if let Some(access) = queues.access_after(epoch) {
            let mut writer = ChainWriter::new(&access, &chain);
            // Fails only if memory has been removed.
            let _ = writer.write_all(&reply);
            let written = writer.written();
            // Within the access, so that no snapshot is between the two.
            self.state.lock().served = None;
            access.complete(chain, written);
        }
        true
    }

    /// The reply to a request; None if the device was reset or closed meanwhile.
    fn reply(&self, resets: u64, message: Vec<u8>, room: usize) -> Option<Vec<u8>> {
        let mut state = self.state.lock();
        while state.holds > 0 && state.resets == resets && !state.is_closed {
            self.changed.wait(&mut state);
        }
        if state.resets != resets || state.is_closed {
            return None;
        }
        if let Some((_, reply)) = state.served.as_ref().filter(|(served, _)| *served == message) {
            return Some(reply.clone());
        }
        let mut server = state.server.take()?;
        drop(state);
        let reply = server.answer(&message, room);
        let mut state = self.state.lock();
        let is_void = state.resets != resets;
        if is_void {
            server.reset();
        }
        if !state.is_closed {
            state.server = Some(server);
        }
        state.served = (!is_void).then(|| (message, reply.clone()));
        self.changed.notify_all();
        (!is_void).then_some(reply)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::share::{Directory, Options};

    fn folder() -> TempDir {
        TempDir::new_with_prefix(std::env::temp_dir().join("pyvmm-fs9p-")).unwrap()
    }

    fn share(folder: &TempDir) -> Shared {
        let directory = Directory::open(folder.as_path(), Options::default()).unwrap();
        Shared::new(Server::new(Arc::new(directory)))
    }

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(7 + body.len()).unwrap();
        [&size.to_le_bytes()[..], &[kind, 1, 0], body].concat()
    }

    /// Attaches to the root as number 0.
    fn attach() -> Vec<u8> {
        message(104, &[&[0; 4][..], &[0xff; 4], &[0; 8]].concat())
    }

    /// Makes the directory `d`.
    fn make_directory() -> Vec<u8> {
        message(72, &[&[0; 4][..], &[1, 0], b"d", &[0xed, 1, 0, 0], &[0; 4]].concat())
    }

    #[test]
    fn what_a_snapshot_finds_served_is_not_served_again() {
        let folder = folder();
        let original = share(&folder);
        assert_eq!(original.reply(0, attach(), 100).unwrap()[4], 105);
        let reply = original.reply(0, make_directory(), 100).unwrap();
        assert_eq!(reply[4], 73);
        original.quiesce().unwrap();
        let saved = original.save().unwrap();
        let copy = share(&folder);
        copy.restore(&saved).unwrap();
        assert_eq!(copy.reply(0, make_directory(), 100), Some(reply));
        // Another one is served: the directory is there.
        copy.state.lock().served = None;
        let refused = copy.reply(0, make_directory(), 100).unwrap();
        assert_eq!(refused[7..], libc::EEXIST.to_le_bytes());
    }

    #[test]
    fn a_request_waits_while_the_device_is_quiesced_and_a_reset_makes_it_void() {
        let folder = folder();
        let share = Arc::new(share(&folder));
        share.quiesce().unwrap();
        let other = Arc::clone(&share);
        let waiting = std::thread::spawn(move || other.reply(0, attach(), 100));
        share.reset();
        assert_eq!(waiting.join().unwrap(), None);
        let other = Arc::clone(&share);
        let waiting = std::thread::spawn(move || other.reply(1, attach(), 100));
        share.resume();
        assert_eq!(waiting.join().unwrap().unwrap()[4], 105);
        assert_eq!(share.reply(0, attach(), 100), None);
    }

    #[test]
    fn a_snapshot_does_not_wait_for_ever_for_a_request_and_close_not_at_all() {
        let folder = folder();
        let share = share(&folder);
        let server = share.state.lock().server.take();
        assert_eq!(share.quiesce(), Err(()));
        assert_eq!(share.state.lock().holds, 0);
        assert_eq!(share.save().unwrap_err().kind, ErrorKind::State);
        assert!(!share.close());
        drop(server);
        assert_eq!(share.quiesce(), Ok(()), "a closed device is still");
    }

    proptest! {
        #[test]
        fn no_saved_bytes_make_it_panic(state in prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..80)) {
            let _ = share(&folder()).restore(&state);
        }
    }
}
