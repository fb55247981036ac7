//! Finds the private epoll set of `event_manager`, shares it, and purges it of stale registrations.
//!
//! With the set's fd, a thread can wait outside the manager's lock, another loop can host this one,
//! and a stale registration, whose fd number was closed, can be removed. The crate does not expose
//! the fd. To find it, this module registers an eventfd and looks for the epoll set that knows it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::subscriber::BoxedSubscriber;
use crate::error::{Error, ErrorKind, Result};
use crate::poll::wait_for_either;

/// The manager's epoll set.
#[derive(Debug)]
pub(super) struct EpollSet {
    /// The fd that the manager itself uses. It stays open for the life of the manager.
    number: RawFd,
    /// An epoll set for other loops to wait on. It watches the manager's set, and stays the same
    /// file for the life of the manager. Created on demand, because it adds a step to each event.
    host: OnceLock<Epoll>,
    /// Written to wake a waiter.
    wake: Arc<EventFd>,
    /// Whether `Waker` has drained it since `take_woken` was called.
    woken: Arc<AtomicBool>,
}

/// Drains wake-ups inside the manager, so that they are not counted as events.
struct Waker {
    wake: Arc<EventFd>,
    woken: Arc<AtomicBool>,
}

impl MutEventSubscriber for Waker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.wake.read();
        self.woken.store(true, Ordering::Relaxed);
    }

    fn init(&mut self, _ops: &mut EventOps) {}
}

impl EpollSet {
    /// Find the set of a new manager.
    pub(super) fn of(upstream: &mut EventManager<BoxedSubscriber>) -> Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(|e| os("eventfd", &e))?);
        let woken = Arc::new(AtomicBool::new(false));
        let waker = Waker { wake: Arc::clone(&wake), woken: Arc::clone(&woken) };
        let id: SubscriberId = upstream.add_subscriber(Box::new(waker));
        let register = |upstream: &mut EventManager<BoxedSubscriber>| {
            upstream.event_ops(id)?.add(Events::new(&*wake, EventSet::IN))
        };
        register(upstream).map_err(|e| Error::new(ErrorKind::Event, "epoll", e.to_string()))?;
        let number = find_set_with(&wake).map_err(|e| {
            os("/proc/self/fd", &e).hint("pyvmm's event manager needs /proc mounted")
        })?;
        Ok(Self { number, host: OnceLock::new(), wake, woken })
    }

    /// The fd for other loops to wait on. The caller holds the manager's lock.
    pub(super) fn host_number(&self) -> Result<RawFd> {
        if let Some(host) = self.host.get() {
            return Ok(host.as_raw_fd());
        }
        let host = Epoll::new().map_err(|e| os("epoll_create1", &e))?;
        self.watch_from(&host)?;
        Ok(self.host.get_or_init(|| host).as_raw_fd())
    }

    fn watch_from(&self, host: &Epoll) -> Result<()> {
        let event = EpollEvent::new(EventSet::IN, 0);
        host.ctl(ControlOperation::Add, self.number, event).map_err(|e| os("epoll_ctl", &e))
    }

    /// Wait until an event is ready. False if the deadline passed, a signal arrived, or only
    /// `interrupt` is readable.
    pub(super) fn wait(&self, deadline: Option<Instant>, interrupt: Option<RawFd>) -> Result<bool> {
        let [is_ready, _] = wait_for_either([self.number, interrupt.unwrap_or(-1)], deadline)
            .map_err(|e| os("ppoll", &e))?;
        Ok(is_ready)
    }

    /// Wake the thread that waits on this set. Not counted as an event.
    pub(super) fn wake(&self) -> Result<()> {
        match self.wake.write(1) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(os("eventfd", &e)),
            // A full counter also wakes the thread.
            _ => Ok(()),
        }
    }

    /// Whether the last dispatch drained a wake-up. The caller holds the manager's lock.
    pub(super) fn take_woken(&self) -> bool {
        // Relaxed: the dispatch writes it under the same lock. Loaded before the swap, which is
        // cheaper and happens at each dispatch.
        self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::Relaxed)
    }

    /// Whether epoll watches the file that now has this number.
    pub(super) fn watches(&self, fd: RawFd) -> bool {
        // Epoll refuses to add a watched file again. If the add succeeds, it is undone.
        match self.control(ControlOperation::Add, fd) {
            Ok(()) => {
                let _ = self.control(ControlOperation::Delete, fd);
                false
            }
            Err(e) => e.raw_os_error() == Some(libc::EEXIST),
        }
    }

    /// Register `fd` without events, so that upstream can delete it.
    pub(super) fn add_placeholder(&self, fd: RawFd) -> io::Result<()> {
        self.control(ControlOperation::Add, fd)
    }

    /// Remove a number's registration. False if epoll has none for the file that now has the
    /// number.
    pub(super) fn forget(&self, fd: RawFd) -> bool {
        self.control(ControlOperation::Delete, fd).is_ok()
    }

    /// Remove stale registrations under these numbers. The caller holds the manager's lock.
    ///
    /// Epoll identifies a registration by file and number. If the number was closed but a duplicate
    /// keeps the file open, no call can name the registration. The set is therefore rebuilt without
    /// it and replaces the old one at the same number, so that the manager does not notice.
    pub(super) fn drop_stale(&self, fds: &[RawFd]) -> Result<()> {
        if !fds.iter().any(|fd| may_watch(self.number, *fd)) {
            return Ok(());
        }
        let registered = entries(self.number).map_err(|e| os("/proc/self/fdinfo", &e))?;
        if !registered.iter().any(|r| fds.contains(&r.fd)) {
            return Ok(());
        }
        let fresh = Epoll::new().map_err(|e| os("epoll_create1", &e))?;
        for r in registered.iter().filter(|r| !fds.contains(&r.fd)) {
            let event = EpollEvent::new(EventSet::from_bits_truncate(r.events), r.data);
            // If the number was closed meanwhile, the registration is stale too and is not copied.
            let _ = fresh.ctl(ControlOperation::Add, r.fd, event);
        }
        if let Some(host) = self.host.get() {
            // A waiting thread keeps the old set alive. It must no longer make the host readable.
            let _ = host.ctl(ControlOperation::Delete, self.number, EpollEvent::default());
        }
        // SAFETY: the number is open and keeps its owner. dup3 replaces its file atomically, so no
        // other thread can get the number in between.
        let swapped = unsafe { libc::dup3(fresh.as_raw_fd(), self.number, libc::O_CLOEXEC) };
        let swapped =
            if swapped < 0 { Err(os("dup3", &io::Error::last_os_error())) } else { Ok(()) };
        if let Some(host) = self.host.get() {
            self.watch_from(host)?;
        }
        swapped?;
        // A thread that waits on the old set would miss registrations added from now on.
        self.wake()
    }

    fn control(&self, operation: ControlOperation, fd: RawFd) -> io::Result<()> {
        let data = u64::try_from(fd).unwrap_or_default();
        // Without events, and one-shot: only an error could be reported, and only once.
        let event = EpollEvent::new(EventSet::ONE_SHOT, data);
        let mut event = libc::epoll_event { events: event.events(), u64: event.data() };
        // SAFETY: a valid epoll fd, and an event that lives through the call.
        let result = unsafe { libc::epoll_ctl(self.number, operation as i32, fd, &raw mut event) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// `struct kcmp_epoll_slot` of the kernel.
#[repr(C)]
struct KcmpEpollSlot {
    epoll: u32,
    target: u32,
    offset: u32,
}

const KCMP_EPOLL_TFD: libc::c_long = 7;

/// Whether a set may have a registration under this number, whichever file the number has now. This
/// needs no descriptor and is cheaper than reading the list. If the kernel does not support it, the
/// list must be read.
fn may_watch(epoll: RawFd, fd: RawFd) -> bool {
    let (Ok(set), Ok(target)) = (u32::try_from(epoll), u32::try_from(fd)) else { return false };
    let slot = KcmpEpollSlot { epoll: set, target, offset: 0 };
    // SAFETY: kcmp reads the slot, which lives through the call, and compares two files of this
    // process.
    let compared = unsafe {
        let this = libc::c_long::from(libc::getpid());
        let with = &raw const slot;
        libc::syscall(libc::SYS_kcmp, this, this, KCMP_EPOLL_TFD, libc::c_long::from(epoll), with)
    };
    compared >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOENT)
}

/// One line of an epoll set's fdinfo.
struct EpollEntry {
    fd: RawFd,
    events: u32,
    data: u64,
}

fn entries(epoll: RawFd) -> io::Result<Vec<EpollEntry>> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{epoll}"))?;
    Ok(text.lines().filter_map(parse_entry).collect())
}

/// `tfd: 5 events: 19 data: 5  pos:0 ino:.. sdev:..`, as proc(5) has it: events and data in hex.
fn parse_entry(line: &str) -> Option<EpollEntry> {
    let mut words = line.strip_prefix("tfd:")?.split_whitespace();
    let fd = words.next()?.parse().ok()?;
    let events = u32::from_str_radix(words.nth(1)?, 16).ok()?;
    let data = u64::from_str_radix(words.nth(1)?, 16).ok()?;
    Some(EpollEntry { fd, events, data })
}

fn find_set_with(member: &EventFd) -> io::Result<RawFd> {
    let number = member.as_raw_fd();
    // The set was created just before the member, so its number is probably slightly lower.
    if let Some(fd) = (1..=4).map(|below| number - below).find(|fd| is_set_with(*fd, member)) {
        return Ok(fd);
    }
    for entry in fs::read_dir("/proc/self/fd")? {
        let fd = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(fd) = fd.filter(|fd| is_set_with(*fd, member)) {
            return Ok(fd);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// Whether the number is an epoll set that watches the member. EPOLL_CTL_MOD succeeds only for that
/// set, and changes nothing.
fn is_set_with(fd: RawFd, member: &EventFd) -> bool {
    let event = Events::new(member, EventSet::IN).epoll_event();
    let mut event = libc::epoll_event { events: event.events(), u64: event.data() };
    // SAFETY: epoll_ctl checks both numbers; the event lives through the call.
    unsafe { libc::epoll_ctl(fd, libc::EPOLL_CTL_MOD, member.as_raw_fd(), &raw mut event) == 0 }
}

fn os(at: &str, error: &io::Error) -> Error {
    Error::os(ErrorKind::Event, at, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_is_read_from_its_line() {
        let line = "tfd:        5 events:     2019 data: 700000005  pos:0 ino:3 sdev:1";
        let r = parse_entry(line).unwrap();
        assert_eq!((r.fd, r.events, r.data), (5, 0x2019, 0x7_0000_0005));
        assert!(parse_entry("flags:\t02").is_none());
        assert!(parse_entry("tfd: x events: 1 data: 1").is_none());
    }

    #[test]
    fn the_set_is_found_among_others() {
        let _other = Epoll::new().unwrap();
        let mut upstream = EventManager::new().unwrap();
        let set = EpollSet::of(&mut upstream).unwrap();
        let listed = entries(set.number).unwrap();
        assert!(listed.iter().any(|r| r.fd == set.wake.as_raw_fd()));
        assert!(may_watch(set.number, set.wake.as_raw_fd()));
    }
}
