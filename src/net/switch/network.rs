//! A network and its ports, for any thread. One lock orders the frames of all senders; each port's
//! queue has its own. No call waits for a frame, a reader or a sender.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Weak};

use super::conditions::Conditions;
use super::counts::{PortCounts, QueueLimit};
use super::inbox::{Inbox, PortId};
use super::lane::Nanos;
use super::parcel::Parcel;
use super::state::{Direction, FrozenSwitch, Switch, is_length};
use crate::error::{Error, ErrorKind, Result};
use crate::net::{Capture, Frame};
use crate::sync::{Mutex, rank};

/// A switch that joins ports.
#[derive(Debug)]
pub struct Network {
    seed: u64,
    switch: Mutex<Switch, rank::Network>,
    /// In the order in which they were made.
    ports: Mutex<Vec<Weak<Port>>, rank::NetworkPorts>,
}

/// A place where a machine or a program is connected to a network. It is closed when it is dropped.
#[derive(Debug)]
pub struct Port {
    network: Arc<Network>,
    id: PortId,
    name: String,
    inbox: Arc<Inbox>,
}

/// A network at one instant, with the frames on their way.
#[derive(Clone, Debug)]
pub struct FrozenNetwork(Arc<FrozenSwitch>);

/// Now, of CLOCK_MONOTONIC.
fn now() -> Nanos {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a timespec that lives through the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let part = |value| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec) * 1_000_000_000 + part(time.tv_nsec)
}

fn no_descriptor(error: &std::io::Error) -> Error {
    Error::os(ErrorKind::Io, "network port", error)
}

impl Network {
    /// A network without ports. Its links decide by the seed.
    #[must_use]
    pub fn new(seed: u64) -> Arc<Self> {
        Self::of(seed, Switch::new(seed))
    }

    fn of(seed: u64, switch: Switch) -> Arc<Self> {
        let (switch, ports) = (Mutex::new(switch), Mutex::new(Vec::new()));
        Arc::new(Self { seed, switch, ports })
    }

    /// The seed of its links' decisions.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The ports that are open, in the order in which they were made.
    #[must_use]
    pub fn ports(&self) -> Vec<Arc<Port>> {
        let mut ports = self.ports.lock();
        ports.retain(|port| port.strong_count() > 0);
        let all: Vec<_> = ports.iter().filter_map(Weak::upgrade).collect();
        // Before any of them is dropped, which takes locks.
        drop(ports);
        all.into_iter().filter(|port| !port.is_closed()).collect()
    }

    /// Hand out a port that the switch has.
    fn connect(self: &Arc<Self>, id: PortId, name: String, inbox: Arc<Inbox>) -> Arc<Port> {
        let port = Arc::new(Port { network: Arc::clone(self), id, name, inbox });
        let mut ports = self.ports.lock();
        ports.retain(|port| port.strong_count() > 0);
        ports.push(Arc::downgrade(&port));
        port
    }

    /// A new port. Without a name it is called by its number, such as "port0".
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the network has a port of this name or the limit is zero, and
    /// [`ErrorKind::Io`] if the process has no file descriptor left.
    pub fn port(self: &Arc<Self>, name: Option<String>, limit: QueueLimit) -> Result<Arc<Port>> {
        if limit.frames == 0 || limit.bytes < Frame::LONGEST {
            let detail = "the queue of a port has room for at least one frame";
            return Err(Error::new(ErrorKind::Config, "queue", detail));
        }
        let inbox = Arc::new(Inbox::new(limit).map_err(|e| no_descriptor(&e))?);
        let mut switch = self.switch.lock();
        let id = switch.add(name, Arc::clone(&inbox))?;
        let name = switch.name(id).to_owned();
        drop(switch);
        Ok(self.connect(id, name, inbox))
    }

    fn ids(self: &Arc<Self>, ports: &[&Port]) -> Result<Vec<PortId>> {
        let is_ours = |port: &&&Port| Arc::ptr_eq(&port.network, self);
        if let Some(port) = ports.iter().find(|port| !is_ours(port)) {
            let detail = format!("the port {:?} is of another network", port.name);
            return Err(Error::new(ErrorKind::Config, "port", detail));
        }
        Ok(ports.iter().map(|port| port.id).collect())
    }

    fn ends(self: &Arc<Self>, from: &Port, to: &Port) -> Result<(PortId, PortId)> {
        self.ids(&[from, to])?;
        if from.id == to.id {
            let detail = format!("{:?} has no link to itself", from.name);
            return Err(Error::new(ErrorKind::Config, "port", detail));
        }
        Ok((from.id, to.id))
    }

    /// Change the conditions of the frames from one port to another.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if a value is out of range or a port is of another network, and
    /// [`ErrorKind::Closed`] if it is closed.
    pub fn set_link(
        self: &Arc<Self>,
        from: &Port,
        to: &Port,
        change: impl Fn(&mut Conditions),
    ) -> Result<()> {
        let ends = self.ends(from, to)?;
        self.switch.lock().set_link(ends, change)
    }

    /// The conditions of the frames from one port to another, and whether a partition separates
    /// them.
    ///
    /// # Errors
    /// As for [`Self::set_link`].
    pub fn link(self: &Arc<Self>, from: &Port, to: &Port) -> Result<(Conditions, bool)> {
        let ends = self.ends(from, to)?;
        let switch = self.switch.lock();
        Ok((switch.link_conditions(ends), switch.is_cut(ends)))
    }

    /// Separate the ports of each group from those of the others. Frames between them that have not
    /// arrived are dropped. Ports in no group, and earlier partitions, stay as they are.
    ///
    /// # Errors
    /// As for [`Self::set_link`], and [`ErrorKind::Config`] if a port is in two groups.
    pub fn partition(self: &Arc<Self>, groups: &[Vec<&Port>]) -> Result<()> {
        self.cut(groups, true)
    }

    /// Join the ports of each group with those of the others.
    ///
    /// # Errors
    /// As for [`Self::partition`].
    pub fn join(self: &Arc<Self>, groups: &[Vec<&Port>]) -> Result<()> {
        self.cut(groups, false)
    }

    /// Join all ports.
    pub fn heal(&self) {
        self.switch.lock().heal();
    }

    fn cut(self: &Arc<Self>, groups: &[Vec<&Port>], is_cut: bool) -> Result<()> {
        let groups = groups.iter().map(|group| self.ids(group)).collect::<Result<Vec<_>>>()?;
        let mut all = groups.concat();
        all.sort_unstable();
        if all.windows(2).any(|pair| matches!(pair, [one, other] if one == other)) {
            let detail = "a port is in two groups";
            return Err(Error::new(ErrorKind::Config, "partition", detail));
        }
        let mut switch = self.switch.lock();
        switch.check(&all)?;
        let now = now();
        for (number, ones) in groups.iter().enumerate() {
            for others in groups.iter().skip(number + 1) {
                switch.cut((ones, others), is_cut, now)?;
            }
        }
        Ok(())
    }

    /// Record the frames that are sent, from now on.
    ///
    /// # Errors
    /// Never in practice.
    pub fn capture(&self, capture: Option<Arc<Capture>>) -> Result<()> {
        self.switch.lock().capture(None, capture)
    }

    /// The network at this instant: links, addresses, counts, and the frames on their way.
    #[must_use]
    pub fn freeze(&self) -> FrozenNetwork {
        let switch = self.switch.lock();
        FrozenNetwork(Arc::new(switch.freeze(now())))
    }

    /// A network that continues from a frozen one, and its ports in the order in which the
    /// original's were made.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the process has no file descriptor left.
    pub fn thaw(frozen: &FrozenNetwork) -> Result<(Arc<Self>, Vec<Arc<Port>>)> {
        let switch = Switch::thaw(&frozen.0, now()).map_err(|e| no_descriptor(&e))?;
        let own = |(id, name, inbox): (_, &str, &_)| (id, name.to_owned(), Arc::clone(inbox));
        let ports: Vec<_> = switch.ports().map(own).collect();
        let network = Self::of(switch.seed(), switch);
        let connect = |(id, name, inbox)| network.connect(id, name, inbox);
        let ports = ports.into_iter().map(connect).collect();
        Ok((network, ports))
    }
}

impl Port {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network.
    #[must_use]
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// Send a frame into the network. What becomes of it is counted. Frames of a wrong length, and
    /// those sent after the port was closed, are dropped.
    pub fn send(&self, frame: &[u8]) {
        self.send_all(&[Frame::complete(frame)]);
    }

    /// Send frames, with what they leave to their receivers.
    pub fn send_all(&self, frames: &[Frame<'_>]) {
        let mut switch = self.network.switch.lock();
        let now = now();
        frames.iter().for_each(|frame| switch.send(self.id, Parcel::new(frame), now));
        switch.flush(self.id);
    }

    /// Whether a frame of this length can be sent.
    #[must_use]
    pub fn is_length(length: usize) -> bool {
        is_length(length)
    }

    /// Take the next frame that has arrived. A program gets complete frames.
    #[must_use]
    pub fn receive(&self) -> Option<Arc<[u8]>> {
        self.inbox.pop(now).map(|frame| frame.bytes)
    }

    pub(super) fn pop(&self) -> Option<Parcel> {
        self.inbox.pop(now)
    }

    pub(super) fn put_back(&self, frame: Parcel) {
        self.inbox.put_back(frame);
    }

    /// Drop the frames on their way to the port.
    pub(super) fn clear(&self) {
        self.inbox.clear();
    }

    pub(super) fn claim(&self, is_claimed: bool) -> bool {
        self.inbox.claim(is_claimed)
    }

    /// Whether a machine uses it.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        self.inbox.is_claimed()
    }

    /// Its place among the ports of its network's copies.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Record the frames that it sends and takes, from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] if it is closed.
    pub fn capture(&self, capture: Option<Arc<Capture>>) -> Result<()> {
        self.network.switch.lock().capture(Some(self.id), capture.clone())?;
        self.inbox.capture(capture);
        Ok(())
    }

    /// Change the conditions of all frames that it sends or gets.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if a value is out of range, [`ErrorKind::Closed`] if it is closed.
    pub fn set(&self, directions: &[Direction], change: impl Fn(&mut Conditions)) -> Result<()> {
        self.network.switch.lock().set_port(self.id, directions, change)
    }

    /// The conditions of what it sends and of what it gets.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] if it is closed.
    pub fn conditions(&self) -> Result<[Conditions; 2]> {
        self.network.switch.lock().conditions(self.id)
    }

    /// What has become of its frames.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] if it is closed.
    pub fn counts(&self) -> Result<PortCounts> {
        let switch = self.network.switch.lock();
        Ok(PortCounts { sent: switch.counts(self.id)?, received: self.inbox.counts() })
    }

    /// Whether it is closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inbox.is_closed()
    }

    /// Disconnect it. The frames on their way to it are dropped.
    pub fn close(&self) {
        self.network.switch.lock().remove(self.id);
        self.inbox.close();
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.close();
    }
}

/// Readable while a frame is there.
impl AsRawFd for Port {
    fn as_raw_fd(&self) -> RawFd {
        self.inbox.as_raw_fd()
    }
}
