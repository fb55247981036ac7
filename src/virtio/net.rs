//! The network device (virtio 1.2, 5.1): one receive, one transmit and a control queue. The loop's
//! thread moves frames between queues and backend; any thread changes the link.

use std::path::Path;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::access::QueueAccess;
use super::device::{Frozen, VirtioDevice, read_space};
use super::net_control::{self, CONTROL, Controlled, Filter};
use super::net_features::{self, guest_offloads};
use super::net_link::{Link, NetCounts, default_mac, parse_spec};
use super::net_receive::{RECEIVE, Receive, Turn};
use super::net_transmit::{Progress, TRANSMIT, Transmit};
use super::net_watch::Watch;
use super::queues::Queues;
use crate::bytes::Reader;
use crate::config::NetConfig;
use crate::error::Result;
use crate::net::{Capture, Disconnected, FrozenNet, NetBackend, Offloads};
use crate::sync::{Mutex, rank};

/// Without VIRTIO_NET_F_MTU.
const ETHERNET_MTU: u16 = 1500;

/// Errors of a descriptor without a cause that the backend finds. Then it is not watched any more.
const MOST_ERRORS: u32 = 100;

#[derive(Debug)]
struct State {
    backend: Arc<dyn NetBackend>,
    /// The next backend, which the loop's thread exchanges for the current one.
    next: Option<Arc<dyn NetBackend>>,
    /// Once the driver has started the device.
    queues: Option<Arc<Queues>>,
    watch: Watch,
    receive: Receive,
    transmit: Transmit,
    controlled: Controlled,
    /// What the driver has accepted, or Ethernet's.
    guest_mtu: u16,
    errors: u32,
}

impl State {
    /// Tell the backend what the guest does.
    fn tell(&self) {
        self.backend.guest_offloads(self.controlled.guest);
        self.backend.guest_mtu(self.guest_mtu);
    }
}

/// See the module.
#[derive(Debug)]
pub struct Net {
    mac: [u8; 6],
    mtu: Option<u16>,
    link: Link,
    state: Mutex<State, rank::VirtioDevice>,
}

/// What forks continue from.
struct FrozenLink(Arc<dyn FrozenNet>);

impl Net {
    /// As a configuration says it.
    ///
    /// # Errors
    /// If the backend cannot be opened.
    pub fn new(config: NetConfig) -> Result<Self> {
        let backend = config.source.open()?;
        let mac = config.mac.unwrap_or_else(|| default_mac(&backend.describe(), config.number));
        let mtu = config.mtu.or_else(|| backend.mtu());
        Ok(Self::over(backend, mac, mtu))
    }

    /// A device over a backend.
    #[must_use]
    pub fn over(backend: Arc<dyn NetBackend>, mac: [u8; 6], mtu: Option<u16>) -> Self {
        let link = Link::default();
        link.set_failed(backend.failure().is_some());
        let controlled = Controlled { filter: Filter::default(), mac, guest: Offloads::default() };
        let state = Mutex::new(State {
            backend,
            next: None,
            queues: None,
            watch: Watch::default(),
            receive: Receive::default(),
            transmit: Transmit::default(),
            controlled,
            guest_mtu: ETHERNET_MTU,
            errors: 0,
        });
        Self { mac, mtu, link, state }
    }

    /// A device of a fork, or of a snapshot's file, with what it has of its network.
    pub(super) fn from_spec(spec: &[u8], frozen: Option<&Frozen>) -> Result<Self> {
        let (mac, mtu) = parse_spec(spec)?;
        let link = frozen.and_then(|frozen| frozen.downcast_ref::<FrozenLink>());
        let backend = match link {
            Some(FrozenLink(net)) => net.backend()?,
            None => Arc::new(Disconnected),
        };
        Ok(Self::over(backend, mac, mtu))
    }

    /// The guest's hardware address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.state.lock().controlled.mac
    }

    /// The MTU in the device's configuration.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// What is behind the device.
    #[must_use]
    pub fn backend(&self) -> Arc<dyn NetBackend> {
        let state = self.state.lock();
        Arc::clone(state.next.as_ref().unwrap_or(&state.backend))
    }

    /// Put another backend behind the device. The loop's thread does it, if the device is in use.
    pub fn connect(&self, backend: Arc<dyn NetBackend>) {
        let mut state = self.state.lock();
        let old = state.next.replace(backend);
        let is_idle = state.watch.is_empty();
        if is_idle {
            self.exchange(&mut state);
        }
        let queues = state.queues.clone();
        drop(state);
        old.iter().for_each(|old| old.close());
        queues.iter().for_each(|queues| {
            if is_idle {
                queues.config_changed();
            }
            queues.notify(RECEIVE);
        });
    }

    /// Whether the guest has a link: the program wants one, and the backend has not ended.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.link.is_up()
    }

    /// Plug the cable in, or unplug it. Without a link, frames are dropped in both directions.
    pub fn set_link(&self, is_up: bool) {
        if self.link.want(is_up)
            && let Some(queues) = self.state.lock().queues.clone()
        {
            queues.config_changed();
        }
    }

    /// Counts since the machine was made.
    #[must_use]
    pub fn counts(&self) -> NetCounts {
        let dropped = self.state.lock().backend.dropped();
        self.link.counts(dropped)
    }

    /// Record frames into a new file, from now on. None ends it. Returns the former capture.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn capture(&self, path: Option<&Path>) -> Result<Option<Arc<Capture>>> {
        let capture = match path {
            Some(path) => Some(Arc::new(Capture::create(path)?)),
            None => None,
        };
        let former = self.link.capture(capture);
        former.iter().for_each(|capture| capture.flush());
        Ok(former)
    }

    /// Make `next` the backend. Its descriptors are not watched yet, and those of the former one
    /// not any more.
    fn exchange(&self, state: &mut State) {
        let Some(next) = state.next.take() else { return };
        std::mem::replace(&mut state.backend, next).close();
        state.receive.clear();
        state.transmit.clear();
        state.errors = 0;
        state.tell();
        self.link.set_failed(state.backend.failure().is_some());
    }

    fn receive(&self, state: &mut State, access: &QueueAccess<'_>) {
        let State { backend, receive, controlled, .. } = state;
        let capture = self.link.captured();
        let turn = Turn { link: &self.link, controlled, capture };
        receive.run(&**backend, access, &turn);
        turn.capture.iter().for_each(|capture| capture.flush());
    }

    fn transmit(&self, state: &mut State, access: &QueueAccess<'_>, queues: &Queues) {
        let State { backend, transmit, .. } = state;
        let capture = self.link.captured();
        let progress = transmit.run(&**backend, access, &self.link, capture.as_ref());
        capture.iter().for_each(|capture| capture.flush());
        if progress == Progress::More {
            queues.notify(TRANSMIT);
        }
        if backend.answers() && !state.receive.is_starved {
            self.receive(state, access);
        }
    }

    fn control(state: &mut State, access: &QueueAccess<'_>) {
        if net_control::process(access, &mut state.controlled) {
            state.backend.guest_offloads(state.controlled.guest);
        }
    }

    /// Call `work` with access to the queues, and watch afterwards what is to be watched.
    fn work(
        &self,
        queues: &Arc<Queues>,
        ops: &mut EventOps<'_>,
        work: impl FnOnce(&mut State, &QueueAccess<'_>),
    ) {
        let mut state = self.state.lock();
        let was_up = self.link.is_up();
        let is_exchanged = state.next.is_some();
        if is_exchanged {
            let watched = state.backend.watched();
            state.watch.set(watched, (false, false), ops);
            self.exchange(&mut state);
        }
        let access = queues.access();
        if let Some(access) = &access {
            work(&mut state, access);
        }
        let has_failed = state.errors > MOST_ERRORS || state.backend.failure().is_some();
        self.link.set_failed(has_failed);
        let State { backend, watch, receive, transmit, .. } = &mut *state;
        let is_used = access.is_some() && !has_failed;
        let wanted = (is_used && !receive.is_starved, is_used && transmit.is_full);
        watch.set(backend.watched(), wanted, ops);
        drop(access);
        drop(state);
        if was_up != self.link.is_up() || is_exchanged {
            queues.config_changed();
            // A driver whose frames the failed backend has not taken gets them back.
            queues.notify(TRANSMIT);
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        net_features::OFFERED | if self.mtu.is_some() { net_features::MTU } else { 0 }
    }

    fn accepts(&self, features: u64) -> bool {
        net_features::are_complete(features)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [status_low, status_high] = u16::from(self.link.is_up()).to_le_bytes();
        let [mtu_low, mtu_high] = self.mtu.unwrap_or(0).to_le_bytes();
        let rest = [status_low, status_high, 1, 0, mtu_low, mtu_high];
        read_space(&[&self.mac[..], &rest].concat(), offset, data);
    }

    fn activate(&self, queues: &Arc<Queues>, features: u64) {
        self.state.lock().controlled.guest = guest_offloads(features);
        self.reactivate(queues, features);
    }

    /// The driver may have turned offloads off since it has accepted them.
    fn reactivate(&self, queues: &Arc<Queues>, features: u64) {
        let mut state = self.state.lock();
        state.queues = Some(Arc::clone(queues));
        let accepted = self.mtu.filter(|_| features & net_features::MTU != 0);
        state.guest_mtu = accepted.unwrap_or(ETHERNET_MTU);
        state.tell();
    }

    fn reset(&self) {
        let mut state = self.state.lock();
        state.queues = None;
        state.receive.clear();
        state.transmit.clear();
        state.controlled =
            Controlled { filter: Filter::default(), mac: self.mac, guest: Offloads::default() };
        state.guest_mtu = ETHERNET_MTU;
        state.tell();
    }

    fn process_queue(&self, queues: &Arc<Queues>, queue: usize, ops: &mut EventOps<'_>) {
        self.work(queues, ops, |state, access| match queue {
            RECEIVE => self.receive(state, access),
            TRANSMIT if !state.transmit.is_full || state.backend.failure().is_some() => {
                self.transmit(state, access, queues);
            }
            CONTROL => Self::control(state, access),
            _ => {}
        });
    }

    fn process_event(&self, queues: &Arc<Queues>, events: Events, ops: &mut EventOps<'_>) {
        self.work(queues, ops, |state, access| {
            let (watched, set) = (state.backend.watched(), events.event_set());
            let has_error = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
            let before = self.link.counts(0);
            if events.fd() == watched.send && (set.contains(EventSet::OUT) || has_error) {
                self.transmit(state, access, queues);
            }
            if events.fd() == watched.receive && (set.contains(EventSet::IN) || has_error) {
                self.receive(state, access);
            }
            let is_useless = has_error && before == self.link.counts(0);
            state.errors = if is_useless { state.errors + 1 } else { 0 };
        });
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = self.state.lock();
        let mut bytes = vec![u8::from(self.link.is_wanted())];
        bytes.extend(state.controlled.mac);
        let guest = state.controlled.guest;
        bytes.extend([guest.checksum, guest.tso4, guest.tso6, guest.ecn].map(u8::from));
        state.controlled.filter.save(&mut bytes);
        Ok(bytes)
    }

    fn forget_counts(&self) {
        self.link.forget_counts();
    }

    fn restore(&self, bytes: &[u8]) -> Result<()> {
        let mut reader = Reader::new("net", bytes);
        let [is_wanted] = reader.take()?;
        let mac = reader.take()?;
        let [checksum, tso4, tso6, ecn] = reader.take()?.map(|flag: u8| flag != 0);
        let filter = Filter::restore(&mut reader)?;
        reader.end()?;
        let guest = Offloads { checksum, tso4, tso6, ecn };
        let mut state = self.state.lock();
        state.controlled = Controlled { filter, mac, guest };
        self.link.want(is_wanted != 0);
        Ok(())
    }

    fn spec(&self) -> Vec<u8> {
        let mtu = self.mtu.unwrap_or(0).to_le_bytes();
        self.mac.into_iter().chain(mtu).collect()
    }

    fn freeze(&self) -> Result<Option<Frozen>> {
        let frozen = self.backend().freeze();
        Ok(frozen.map(|net| Arc::new(FrozenLink(net)) as Frozen))
    }

    fn thaw(&self, _frozen: &Frozen) -> Result<()> {
        self.backend().reset();
        Ok(())
    }

    fn close(&self) {
        let state = self.state.lock();
        state.backend.close();
        state.next.iter().for_each(|next| next.close());
        self.link.capture(None).iter().for_each(|capture| capture.flush());
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }

    fn failure(&self) -> Option<String> {
        let backend = self.backend();
        backend.failure().map(|failure| format!("{}: {failure}", backend.describe()))
    }
}
