//! What holds for every sequence of frames, conditions, cuts and reads, on a clock of the test.
//! Covers src/net/switch/network.rs, src/net/switch/state.rs, src/net/switch/parcel.rs,
//! Covers src/net/switch/counts.rs.

#[cfg(test)]
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::conditions::Conditions;
use super::counts::{QueueLimit, ReceivedCounts, SentCounts};
use super::inbox::{Inbox, PortId};
use super::lane::Nanos;
use super::network::{Network, Port};
use super::parcel::Parcel;
use super::state::{Direction, Switch};
use crate::error::ErrorKind;
use crate::net::Frame;

const MS: Nanos = 1_000_000;
const ALL: u8 = 0xff;

/// A switch with ports, and the queues of the ports.
struct Bench {
    switch: Switch,
    inboxes: Vec<Arc<Inbox>>,
}

impl Bench {
    fn new(seed: u64, ports: usize, limit: QueueLimit) -> Self {
        let mut switch = Switch::new(seed);
        let inboxes: Vec<_> = (0..ports).map(|_| Arc::new(Inbox::new(limit).unwrap())).collect();
        for inbox in &inboxes {
            switch.add(None, Arc::clone(inbox)).unwrap();
        }
        Self { switch, inboxes }
    }

    fn send(&mut self, from: PortId, to: u8, number: u32, now: Nanos) {
        self.switch.send(from, frame(u8::try_from(from).unwrap(), to, number), now);
    }

    /// The numbers of the frames that have arrived.
    fn read(&self, port: usize, now: Nanos) -> Vec<u32> {
        std::iter::from_fn(|| self.inboxes[port].pop(|| now)).map(|frame| number(&frame)).collect()
    }

    fn sent(&self) -> Vec<SentCounts> {
        (0..).zip(&self.inboxes).map(|(port, _)| self.switch.counts(port).unwrap()).collect()
    }

    fn received(&self) -> Vec<ReceivedCounts> {
        self.inboxes.iter().map(|inbox| inbox.counts()).collect()
    }
}

/// A frame from a port to a port, or to all.
fn frame(from: u8, to: u8, number: u32) -> Parcel {
    let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    if to == ALL {
        bytes[..6].fill(0xff);
    }
    bytes.extend(number.to_le_bytes());
    bytes.as_slice().into()
}

fn number(frame: &Parcel) -> u32 {
    u32::from_le_bytes(frame[14..18].try_into().unwrap())
}

/// A step of a run.
#[derive(Clone, Debug)]
enum Step {
    Send(PortId, u8),
    Set(PortId, Conditions),
    SetLink(PortId, PortId, Conditions),
    Cut(PortId, bool),
    Heal,
    Read(usize),
    Wait(Nanos),
}

fn conditions() -> impl Strategy<Value = Conditions> {
    let time = || (0..20u64).prop_map(Duration::from_millis);
    let chance = || prop_oneof![Just(0.0), 0.0..=1.0];
    let bandwidth = prop_oneof![Just(0), 10_000..1_000_000u64];
    (time(), time(), chance(), chance(), chance(), bandwidth, time()).prop_map(
        |(delay, jitter, loss, duplicate, reorder, bandwidth, backlog)| Conditions {
            delay,
            jitter,
            loss,
            duplicate,
            reorder,
            bandwidth,
            backlog,
        },
    )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let port = || 0..4u32;
    let step = prop_oneof![
        12 => (port(), prop_oneof![0..6u8, Just(ALL)]).prop_map(|(from, to)| Step::Send(from, to)),
        1 => (port(), conditions()).prop_map(|(port, set)| Step::Set(port, set)),
        1 => (port(), port(), conditions()).prop_map(|(from, to, set)| Step::SetLink(from, to, set)),
        1 => (port(), any::<bool>()).prop_map(|(port, is_cut)| Step::Cut(port, is_cut)),
        1 => Just(Step::Heal),
        3 => (0..4usize).prop_map(Step::Read),
        3 => (0..30 * MS).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..300)
}

/// Returns what each port has received.
fn run(bench: &mut Bench, steps: &[Step]) -> Vec<Vec<u32>> {
    run_from(bench, steps, 0).0
}

/// Returns what each port has received, and the time at the end.
fn run_from(bench: &mut Bench, steps: &[Step], begin: Nanos) -> (Vec<Vec<u32>>, Nanos) {
    let (mut now, mut number, mut read) = (begin, 0, vec![Vec::new(); 4]);
    for step in steps {
        match step.clone() {
            Step::Send(from, to) => {
                bench.send(from, to, number, now);
                number += 1;
            }
            Step::Set(port, set) => bench
                .switch
                .set_port(port, &[Direction::In, Direction::Out], |conditions| *conditions = set)
                .unwrap(),
            Step::SetLink(from, to, set) => {
                bench.switch.set_link((from, to), |conditions| *conditions = set).unwrap();
            }
            Step::Cut(port, is_cut) => {
                let others: Vec<_> = (0..4).filter(|other| *other != port).collect();
                bench.switch.cut((&[port], &others), is_cut, now).unwrap();
            }
            Step::Heal => bench.switch.heal(),
            Step::Read(port) => read[port].extend(bench.read(port, now)),
            Step::Wait(time) => now += time,
        }
    }
    (read, now)
}

fn check_conservation(bench: &Bench) {
    for sent in bench.sent() {
        let SentCounts { lost, over_bandwidth, malformed, unclaimed, forwarded, .. } = sent;
        assert_eq!(sent.sent, lost + over_bandwidth + malformed + unclaimed + forwarded);
    }
    for counts in bench.received() {
        let ReceivedCounts { addressed, duplicated, received, lost, over_bandwidth, .. } = counts;
        let ReceivedCounts { partitioned, overflowed, discarded, queued, .. } = counts;
        let ends = received + lost + over_bandwidth + partitioned + overflowed + discarded + queued;
        assert_eq!(addressed + duplicated, ends, "{counts:?}");
    }
}

proptest! {
    #[test]
    fn every_frame_is_received_dropped_for_a_reason_or_on_its_way(
        steps in steps(), frames in 1..20usize
    ) {
        let limit = QueueLimit { frames, bytes: 1 << 20 };
        let mut bench = Bench::new(1, 4, limit);
        let read = run(&mut bench, &steps);
        check_conservation(&bench);
        let counts = bench.received();
        prop_assert!(counts.iter().all(|counts| counts.queued <= frames as u64));
        prop_assert!(counts.iter().zip(&read).all(|(counts, read)| counts.received == read.len() as u64));
    }

    #[test]
    fn a_run_repeats_with_its_seed(steps in steps(), seed in any::<u64>()) {
        let once = || {
            let mut bench = Bench::new(seed, 4, QueueLimit::default());
            (run(&mut bench, &steps), bench.sent(), bench.received())
        };
        prop_assert_eq!(once(), once());
    }

    #[test]
    fn frames_between_two_ports_keep_their_order_unless_it_is_to_change(steps in steps()) {
        let mut bench = Bench::new(1, 4, QueueLimit::default());
        let steps: Vec<_> = steps
            .into_iter()
            .map(|step| match step {
                Step::Set(port, set) => Step::Set(port, Conditions { reorder: 0.0, ..set }),
                Step::SetLink(from, to, set) => {
                    Step::SetLink(from, to, Conditions { reorder: 0.0, ..set })
                }
                step => step,
            })
            .collect();
        let senders: Vec<_> = steps
            .iter()
            .filter_map(|step| if let Step::Send(from, _) = step { Some(*from) } else { None })
            .collect();
        for read in run(&mut bench, &steps) {
            for port in 0..4 {
                let from: Vec<_> =
                    read.iter().filter(|number| senders[**number as usize] == port).collect();
                prop_assert!(from.is_sorted(), "{from:?}");
            }
        }
    }

    #[test]
    fn a_copy_continues_as_the_original_does(before in steps(), after in steps()) {
        let mut original = Bench::new(3, 4, QueueLimit::default());
        let (_, now) = run_from(&mut original, &before, 0);
        let frozen = original.switch.freeze(now);
        let switch = Switch::thaw(&frozen, now).unwrap();
        let inboxes = switch.ports().map(|(_, _, inbox)| Arc::clone(inbox)).collect();
        let mut copy = Bench { switch, inboxes };
        let expected = run_from(&mut original, &after, now);
        prop_assert_eq!(run_from(&mut copy, &after, now), expected);
        prop_assert_eq!((copy.sent(), copy.received()), (original.sent(), original.received()));
        check_conservation(&copy);
    }

    #[test]
    fn any_bytes_can_be_sent(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let mut bench = Bench::new(1, 2, QueueLimit::default());
        bench.switch.send(0, bytes.as_slice().into(), 0);
        check_conservation(&bench);
        prop_assert_eq!(bench.sent()[0].malformed, u64::from(bytes.len() < 14));
    }
}

#[test]
fn a_frame_goes_to_the_port_of_its_address_and_to_all_before_it_is_known() {
    let mut bench = Bench::new(1, 3, QueueLimit::default());
    bench.send(0, 1, 10, 0);
    assert_eq!([1, 2].map(|port| bench.read(port, 0)), [[10], [10]]);
    bench.send(1, 0, 11, 0);
    assert_eq!([0, 2].map(|port| bench.read(port, 0)), [vec![11], vec![]]);
    bench.send(2, ALL, 12, 0);
    assert_eq!([0, 1, 2].map(|port| bench.read(port, 0)), [vec![12], vec![12], vec![]]);
    bench.send(0, 0, 13, 0);
    assert_eq!((bench.sent()[0].unclaimed, bench.sent()[0].forwarded), (1, 1));
    bench.switch.remove(1);
    bench.send(0, 1, 14, 0);
    assert_eq!(bench.read(2, 0), [14], "the address of a port that is gone is unknown");
}

#[test]
fn a_partition_cuts_both_ways_and_what_is_on_its_way() {
    let mut bench = Bench::new(1, 3, QueueLimit::default());
    let delay = |conditions: &mut Conditions| conditions.delay = Duration::from_millis(10);
    bench.switch.set_port(0, &[Direction::Out], delay).unwrap();
    bench.send(0, ALL, 1, 0);
    bench.send(0, ALL, 2, 5 * MS);
    bench.switch.cut((&[0], &[1]), true, 12 * MS).unwrap();
    bench.send(0, ALL, 3, 12 * MS);
    bench.send(1, ALL, 4, 12 * MS);
    assert_eq!(bench.read(1, 40 * MS), [1], "had arrived");
    assert_eq!(bench.read(2, 40 * MS), [1, 4, 2, 3], "is in no group");
    assert!(bench.read(0, 40 * MS).is_empty());
    assert_eq!(bench.received().map_partitioned(), [1, 2, 0]);
    bench.switch.heal();
    bench.send(0, 1, 5, 50 * MS);
    bench.send(1, 0, 6, 50 * MS);
    assert_eq!((bench.read(1, 60 * MS), bench.read(0, 60 * MS)), (vec![5], vec![6]));
}

trait Partitioned {
    fn map_partitioned(&self) -> Vec<u64>;
}

impl Partitioned for Vec<ReceivedCounts> {
    fn map_partitioned(&self) -> Vec<u64> {
        self.iter().map(|counts| counts.partitioned).collect()
    }
}

#[test]
fn delays_of_both_cables_and_the_link_add_up() {
    let mut bench = Bench::new(1, 2, QueueLimit::default());
    let delay = |ms| move |set: &mut Conditions| set.delay = Duration::from_millis(ms);
    bench.switch.set_port(0, &[Direction::Out], delay(1)).unwrap();
    bench.switch.set_port(1, &[Direction::In], delay(2)).unwrap();
    bench.switch.set_link((0, 1), delay(4)).unwrap();
    bench.send(0, 1, 1, 0);
    bench.send(1, 0, 2, 0);
    assert_eq!(bench.read(0, 0), [2], "the other way has no delay");
    assert!(bench.read(1, 7 * MS - 1).is_empty());
    assert_eq!(bench.read(1, 7 * MS), [1]);
    let delays = bench.switch.conditions(0).unwrap().map(|conditions| conditions.delay);
    assert_eq!(delays, [Duration::from_millis(1), Duration::ZERO]);
}

fn wait(port: &Port) -> Vec<u8> {
    loop {
        if let Some(frame) = port.receive() {
            return frame.to_vec();
        }
        let mut poll = libc::pollfd { fd: port.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 60_000) }, 1);
    }
}

#[test]
fn ports_on_several_threads_exchange_frames_by_their_descriptors() {
    let network = Network::new(1);
    let [one, other] = [0, 1].map(|_| network.port(None, QueueLimit::default()).unwrap());
    one.set(&[Direction::Out], |set| set.delay = Duration::from_micros(200)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..500 {
                assert_eq!(wait(&other), *frame(0, 1, number));
                other.send(&frame(1, 0, number));
            }
        });
        for number in 0..500 {
            one.send(&frame(0, 1, number));
            assert_eq!(wait(&one), *frame(1, 0, number));
        }
    });
    let counts = one.counts().unwrap();
    assert_eq!((counts.sent.sent, counts.received.received, counts.received.queued), (500, 500, 0));
    assert_eq!(counts.received.received_bytes, 500 * 18);
}

#[test]
fn what_a_network_cannot_do_is_refused() {
    let (network, other) = (Network::new(1), Network::new(2));
    let port = |name: &str| network.port(Some(name.into()), QueueLimit::default());
    let [a, b] = ["a", "b"].map(|name| port(name).unwrap());
    let foreign = other.port(None, QueueLimit::default()).unwrap();
    let set = |_: &mut Conditions| ();
    assert_eq!(port("a").unwrap_err().kind, ErrorKind::Config);
    assert_eq!(network.set_link(&a, &foreign, set).unwrap_err().kind, ErrorKind::Config);
    assert_eq!(network.set_link(&a, &a, set).unwrap_err().kind, ErrorKind::Config);
    let twice = network.partition(&[vec![&a], vec![&b, &a]]);
    assert_eq!(twice.unwrap_err().detail, "a port is in two groups");
    assert!(!network.link(&a, &b).unwrap().1);
    network.partition(&[vec![&a], vec![&b]]).unwrap();
    assert!(network.link(&a, &b).unwrap().1 && network.link(&b, &a).unwrap().1);
    network.join(&[vec![&b], vec![&a]]).unwrap();
    assert!(!network.link(&a, &b).unwrap().1);
    assert_eq!(network.ports().len(), 2);
    b.close();
    assert!(b.is_closed() && network.ports().len() == 1);
    assert_eq!(network.partition(&[vec![&a], vec![&b]]).unwrap_err().kind, ErrorKind::Closed);
    assert_eq!(b.counts().unwrap_err().kind, ErrorKind::Closed);
    let none = QueueLimit { frames: 0, ..QueueLimit::default() };
    assert_eq!(network.port(None, none).unwrap_err().kind, ErrorKind::Config);
    assert!(
        Port::is_length(Frame::LONGEST)
            && !Port::is_length(Frame::LONGEST + 1)
            && !Port::is_length(13)
    );
    assert_eq!((a.name(), Arc::ptr_eq(a.network(), &network)), ("a", true));
    assert_eq!(port("b").unwrap().name(), "b", "the name is free again");
}

#[test]
fn a_frozen_network_has_the_ports_and_frames_of_the_original() {
    let network = Network::new(1);
    let [a, b] =
        ["a", "b"].map(|name| network.port(Some(name.into()), QueueLimit::default()).unwrap());
    a.set(&[Direction::Out], |set| set.delay = Duration::from_millis(1)).unwrap();
    a.send(&frame(0, 1, 1));
    let frozen = network.freeze();
    assert_eq!(wait(&b), *frame(0, 1, 1));
    for _ in 0..2 {
        let (copy, ports) = Network::thaw(&frozen).unwrap();
        assert_eq!((copy.seed(), copy.ports().len()), (1, 2));
        assert_eq!(ports.iter().map(|port| port.name()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(wait(&ports[1]), *frame(0, 1, 1), "on its way in each copy");
        ports[1].send(&frame(1, 0, 2));
        assert_eq!(wait(&ports[0]), *frame(1, 0, 2));
        assert_eq!(ports[0].counts().unwrap().sent.sent, 1);
    }
    assert!(a.receive().is_none());
}
