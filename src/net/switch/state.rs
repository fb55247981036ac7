//! The switch itself: which ports there are, and where a frame goes. Runs on the thread of the
//! sender, with the network's lock held; the time comes from the caller.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use smallvec::SmallVec;

use super::conditions::Conditions;
use super::counts::SentCounts;
use super::inbox::{FrozenInbox, Inbox, PortId};
use super::lane::{Lane, Loss, Nanos, Passage};
use super::link::Link;
use super::parcel::Parcel;
use super::table::{Address, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::net::{Capture, Frame};

/// Which lanes of a port, seen from the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The frames that it sends.
    Out,
    /// The frames that it gets.
    In,
}

#[derive(Clone, Debug)]
struct Entry<I> {
    name: String,
    inbox: I,
    /// Records the frames that it sends.
    capture: Option<Arc<Capture>>,
    out: Lane,
    into: Lane,
    counts: SentCounts,
}

/// The ports, links and addresses of a network, with what `I` is for the queue of a port.
#[derive(Clone, Debug)]
pub(super) struct State<I> {
    seed: u64,
    next: PortId,
    ports: BTreeMap<PortId, Entry<I>>,
    /// The links with conditions or a cut, and those on which a frame is on its way.
    links: HashMap<(PortId, PortId), Link>,
    table: Table,
    /// Records the frames that are sent.
    capture: Option<Arc<Capture>>,
}

/// A network in use.
pub(super) type Switch = State<Arc<Inbox>>;

/// A network at one instant, for copies.
#[derive(Clone, Debug)]
pub(super) struct FrozenSwitch {
    state: State<FrozenInbox>,
    at: Nanos,
}

fn gone() -> Error {
    Error::closed("port")
}

impl Switch {
    pub(super) fn new(seed: u64) -> Self {
        let (ports, links, table) = (BTreeMap::new(), HashMap::new(), Table::default());
        Self { seed, next: 0, ports, links, table, capture: None }
    }

    /// # Errors
    /// [`ErrorKind::Config`] if the name is used already.
    pub(super) fn add(&mut self, name: Option<String>, inbox: Arc<Inbox>) -> Result<PortId> {
        let id = self.next;
        let name = name.unwrap_or_else(|| format!("port{id}"));
        if self.ports.values().any(|entry| entry.name == name) {
            let detail = format!("the network has a port {name:?} already");
            return Err(Error::new(ErrorKind::Config, "name", detail));
        }
        self.next += 1;
        let lane = |kind| Lane::new(self.seed, [kind, u64::from(id), 0]);
        let counts = SentCounts::default();
        self.ports
            .insert(id, Entry { name, inbox, capture: None, out: lane(0), into: lane(1), counts });
        Ok(id)
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    pub(super) fn name(&self, port: PortId) -> &str {
        self.ports.get(&port).map_or("", |entry| &entry.name)
    }

    /// # Errors
    /// If one of these ports is closed.
    pub(super) fn check(&self, ports: &[PortId]) -> Result<()> {
        if ports.iter().all(|port| self.ports.contains_key(port)) { Ok(()) } else { Err(gone()) }
    }

    pub(super) fn remove(&mut self, port: PortId) {
        self.ports.remove(&port);
        self.links.retain(|(from, to), _| *from != port && *to != port);
        self.table.forget(port);
    }

    /// The names and numbers of all ports, in the order in which they were made.
    pub(super) fn ports(&self) -> impl Iterator<Item = (PortId, &str, &Arc<Inbox>)> {
        self.ports.iter().map(|(id, entry)| (*id, entry.name.as_str(), &entry.inbox))
    }

    /// A port sends a frame.
    pub(super) fn send(&mut self, from: PortId, frame: Parcel, now: Nanos) {
        let Some(entry) = self.ports.get_mut(&from) else { return };
        entry.counts.sent += 1;
        entry.counts.sent_bytes += frame.len() as u64;
        for capture in self.capture.iter().chain(&entry.capture) {
            capture.record(&frame.frame());
        }
        let Some((to, source)) = addresses(&frame) else {
            entry.counts.malformed += 1;
            return;
        };
        let passage = match entry.out.pass(Passage::starting(now), frame.len()) {
            Ok(passage) => passage,
            Err(Loss::Lost) => return entry.counts.lost += 1,
            Err(Loss::OverBandwidth) => return entry.counts.over_bandwidth += 1,
        };
        self.table.learn(source, from);
        let ports: SmallVec<[PortId; 8]> = match self.table.find(to) {
            Some(port) => [port].into_iter().filter(|port| *port != from).collect(),
            None => self.ports.keys().copied().filter(|port| *port != from).collect(),
        };
        if let Some(entry) = self.ports.get_mut(&from) {
            let count = &mut entry.counts;
            *(if ports.is_empty() { &mut count.unclaimed } else { &mut count.forwarded }) += 1;
        }
        for port in ports {
            self.forward((from, port), &frame, passage, now);
        }
    }

    /// Record the frames that are sent from now on: all, or those of a port.
    ///
    /// # Errors
    /// If the port is closed.
    pub(super) fn capture(
        &mut self,
        port: Option<PortId>,
        capture: Option<Arc<Capture>>,
    ) -> Result<()> {
        let place = match port {
            Some(port) => &mut self.ports.get_mut(&port).ok_or_else(gone)?.capture,
            None => &mut self.capture,
        };
        *place = capture;
        Ok(())
    }

    /// Write what was recorded of a port's frames.
    pub(super) fn flush(&self, port: PortId) {
        let own = self.ports.get(&port).and_then(|entry| entry.capture.as_ref());
        self.capture.iter().chain(own).for_each(|capture| capture.flush());
    }

    /// Programs get complete frames; machines complete them, or leave it to their guests.
    fn forward(&mut self, ends: (PortId, PortId), frame: &Parcel, sent: Passage, now: Nanos) {
        let is_claimed = || self.ports.get(&ends.1).is_some_and(|to| to.inbox.is_claimed());
        if !frame.is_incomplete() || is_claimed() {
            return self.forward_one(ends, frame.clone(), sent, now);
        }
        let parts = frame.completed();
        if let (true, Some(to)) = (parts.is_empty(), self.ports.get(&ends.1)) {
            to.inbox.drop_one(|counts| &mut counts.discarded);
        }
        parts.into_iter().for_each(|part| self.forward_one(ends, part, sent, now));
    }

    fn forward_one(&mut self, ends: (PortId, PortId), frame: Parcel, sent: Passage, now: Nanos) {
        let Some(Entry { inbox, into, .. }) = self.ports.get_mut(&ends.1) else { return };
        let mut link = if self.links.is_empty() { None } else { self.links.get_mut(&ends) };
        if link.as_ref().is_some_and(|link| link.is_cut) {
            return inbox.drop_one(|counts| &mut counts.partitioned);
        }
        let length = frame.len();
        let between = link.as_mut().map_or(Ok(sent), |link| link.lane.pass(sent, length));
        let passage = match between.and_then(|passage| into.pass(passage, length)) {
            Ok(passage) => passage,
            Err(Loss::Lost) => return inbox.drop_one(|counts| &mut counts.lost),
            Err(Loss::OverBandwidth) => return inbox.drop_one(|counts| &mut counts.over_bandwidth),
        };
        let frame = (frame, ends.0);
        if link.is_none() && passage.at <= now && !passage.is_overtaken {
            inbox.push(frame, (passage.at, passage.copies), now);
            return;
        }
        let new = || Link::new(self.seed, ends);
        let link = self.links.entry(ends).or_insert_with(new);
        link.deliver(inbox, frame, passage, now);
    }

    /// Change the conditions of a port's lanes.
    ///
    /// # Errors
    /// If the port is closed, or a value is out of range: nothing is changed.
    pub(super) fn set_port(
        &mut self,
        port: PortId,
        directions: &[Direction],
        change: impl Fn(&mut Conditions),
    ) -> Result<()> {
        let entry = self.ports.get_mut(&port).ok_or_else(gone)?;
        let mut lanes = [(Direction::Out, &mut entry.out), (Direction::In, &mut entry.into)];
        let mut chosen: SmallVec<[(&mut &mut Lane, Conditions); 2]> = SmallVec::new();
        for (direction, lane) in &mut lanes {
            if directions.contains(direction) {
                let conditions = changed(lane, &change)?;
                chosen.push((lane, conditions));
            }
        }
        chosen.into_iter().for_each(|(lane, conditions)| lane.set(conditions));
        Ok(())
    }

    /// Change the conditions from one port to another.
    ///
    /// # Errors
    /// If a port is closed, or a value is out of range.
    pub(super) fn set_link(
        &mut self,
        ends: (PortId, PortId),
        change: impl Fn(&mut Conditions),
    ) -> Result<()> {
        let link = self.link(ends)?;
        let conditions = changed(&link.lane, &change)?;
        link.lane.set(conditions);
        Ok(())
    }

    fn link(&mut self, ends: (PortId, PortId)) -> Result<&mut Link> {
        self.check(&[ends.0, ends.1])?;
        Ok(self.links.entry(ends).or_insert_with(|| Link::new(self.seed, ends)))
    }

    /// The conditions of a port, out and in.
    ///
    /// # Errors
    /// If the port is closed.
    pub(super) fn conditions(&self, port: PortId) -> Result<[Conditions; 2]> {
        let entry = self.ports.get(&port).ok_or_else(gone)?;
        Ok([entry.out.conditions, entry.into.conditions])
    }

    /// The conditions from one port to another.
    pub(super) fn link_conditions(&self, ends: (PortId, PortId)) -> Conditions {
        self.links.get(&ends).map(|link| link.lane.conditions).unwrap_or_default()
    }

    /// # Errors
    /// If the port is closed.
    pub(super) fn counts(&self, port: PortId) -> Result<SentCounts> {
        Ok(self.ports.get(&port).ok_or_else(gone)?.counts)
    }

    /// Separate the ports of one group from those of the other, or join them again. Frames that
    /// have not arrived when they are separated are dropped.
    ///
    /// # Errors
    /// If a port is closed, which the caller has checked.
    pub(super) fn cut(
        &mut self,
        (ones, others): (&[PortId], &[PortId]),
        is_cut: bool,
        now: Nanos,
    ) -> Result<()> {
        for (from, to) in [(ones, others), (others, ones)] {
            for to in to {
                for from in from.iter().filter(|from| *from != to) {
                    self.link((*from, *to))?.is_cut = is_cut;
                }
                if is_cut && let Some(entry) = self.ports.get(to) {
                    entry.inbox.cut(from, now);
                }
            }
        }
        Ok(())
    }

    /// Join everything that is separated.
    pub(super) fn heal(&mut self) {
        self.links.values_mut().for_each(|link| link.is_cut = false);
    }

    pub(super) fn is_cut(&self, ends: (PortId, PortId)) -> bool {
        self.links.get(&ends).is_some_and(|link| link.is_cut)
    }

    pub(super) fn freeze(&self, at: Nanos) -> FrozenSwitch {
        let ports = self.ports.iter().map(|(id, entry)| {
            let Entry { name, inbox, out, into, counts, .. } = entry.clone();
            (*id, Entry { name, inbox: inbox.freeze(), capture: None, out, into, counts })
        });
        let (links, table) = (self.links.clone(), self.table.clone());
        let ports = ports.collect();
        FrozenSwitch {
            state: State { capture: None, seed: self.seed, next: self.next, ports, links, table },
            at,
        }
    }

    /// A switch that continues now from what was frozen.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub(super) fn thaw(frozen: &FrozenSwitch, now: Nanos) -> std::io::Result<Self> {
        let FrozenSwitch { state, at } = frozen;
        // Times that have passed stay in their order.
        let shift = |time: Nanos| match now.checked_sub(*at) {
            Some(later) => time.saturating_add(later),
            None => time,
        };
        let mut ports = BTreeMap::new();
        for (id, entry) in &state.ports {
            let Entry { name, inbox: queued, out, into, counts, .. } = entry.clone();
            let inbox = Inbox::new(queued.limit)?;
            inbox.thaw(&queued, shift);
            let (out, into, inbox) = (out.moved(shift), into.moved(shift), Arc::new(inbox));
            ports.insert(*id, Entry { name, inbox, capture: None, out, into, counts });
        }
        let links = state.links.iter().map(|(ends, link)| (*ends, link.moved(shift))).collect();
        let (table, capture) = (state.table.clone(), None);
        Ok(Self { seed: state.seed, next: state.next, ports, links, table, capture })
    }
}

fn changed(lane: &Lane, change: impl Fn(&mut Conditions)) -> Result<Conditions> {
    let mut conditions = lane.conditions;
    change(&mut conditions);
    conditions.check()?;
    Ok(conditions)
}

/// Whether a frame can have this length.
pub(super) fn is_length(length: usize) -> bool {
    (Frame::SHORTEST..=Frame::LONGEST).contains(&length)
}

/// The addresses of a frame, first the one that it goes to. None if its length is wrong.
#[inline]
fn addresses(frame: &[u8]) -> Option<(Address, Address)> {
    if !is_length(frame.len()) {
        return None;
    }
    Some((*frame.first_chunk()?, *frame.get(6..)?.first_chunk()?))
}
