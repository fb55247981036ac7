//! What two ports have between them, besides the lanes of each: conditions, cuts, and the order of
//! frames. Pure data, but for the queue of the port that a frame goes to.

use super::inbox::{Inbox, Key, PortId};
use super::lane::{Lane, Nanos, Passage};
use super::parcel::Parcel;

/// From one port to another.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) lane: Lane,
    /// Whether a partition separates the two.
    pub(super) is_cut: bool,
    /// When the last frame arrives; the next does not arrive before it.
    last: Nanos,
    /// A frame that waits for the next one to overtake it, and how many copies follow it.
    held: Option<(Key, u8)>,
}

/// How long a frame waits for one that overtakes it.
pub(super) const HOLD: Nanos = 10_000_000;

impl Link {
    pub(super) fn new(seed: u64, (from, to): (PortId, PortId)) -> Self {
        let lane = Lane::new(seed, [2, u64::from(from), u64::from(to)]);
        Self { lane, is_cut: false, last: 0, held: None }
    }

    /// A frame has passed all lanes: put it into the queue of the port that it goes to.
    pub(super) fn deliver(
        &mut self,
        inbox: &Inbox,
        frame: (Parcel, PortId),
        passage: Passage,
        now: Nanos,
    ) {
        let due = passage.at.max(self.last);
        self.last = due;
        let Passage { copies, is_overtaken, .. } = passage;
        if let Some(((held, first), more)) = self.held.take() {
            inbox.push(frame, (due, copies), now);
            let numbers = first..=first.saturating_add(u64::from(more));
            numbers.for_each(|number| inbox.put_off((held, number), due, now));
        } else if is_overtaken {
            inbox.count_reordered();
            let key = inbox.push(frame, (due.saturating_add(HOLD), copies), now);
            self.held = key.map(|key| (key, copies));
        } else {
            inbox.push(frame, (due, copies), now);
        }
    }

    /// The same link of a copy of the network, at another time.
    pub(super) fn moved(&self, shift: impl Fn(Nanos) -> Nanos) -> Self {
        Self {
            lane: self.lane.moved(&shift),
            is_cut: self.is_cut,
            last: shift(self.last),
            held: self.held.map(|((due, number), more)| ((shift(due), number), more)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::switch::counts::QueueLimit;

    fn order(overtaken: &[usize]) -> Vec<u8> {
        let inbox = Inbox::new(QueueLimit::default()).unwrap();
        let mut link = Link::new(1, (0, 1));
        for number in 0..6u8 {
            let is_overtaken = overtaken.contains(&usize::from(number));
            let passage = Passage { is_overtaken, ..Passage::starting(u64::from(number)) };
            link.deliver(&inbox, ([number].as_slice().into(), 0), passage, u64::from(number));
        }
        std::iter::from_fn(|| inbox.pop(|| HOLD * 2)).map(|frame| frame[0]).collect()
    }

    #[test]
    fn a_frame_is_overtaken_by_the_next_only() {
        assert_eq!(order(&[]), [0, 1, 2, 3, 4, 5]);
        assert_eq!(order(&[1]), [0, 2, 1, 3, 4, 5]);
        assert_eq!(order(&[0, 1, 2, 5]), [1, 0, 3, 2, 4, 5]);
    }

    #[test]
    fn the_copies_of_a_frame_are_overtaken_with_it() {
        let inbox = Inbox::new(QueueLimit::default()).unwrap();
        let mut link = Link::new(1, (0, 1));
        for (number, copies) in [(1, 1), (2, 0), (3, 0)] {
            let passage = Passage { at: 1, copies, is_overtaken: number == 1 };
            link.deliver(&inbox, ([number].as_slice().into(), 0), passage, 1);
        }
        let order: Vec<u8> = std::iter::from_fn(|| inbox.pop(|| 1)).map(|frame| frame[0]).collect();
        assert_eq!(order, [2, 1, 1, 3]);
    }

    #[test]
    fn a_frame_does_not_arrive_before_one_that_was_sent_earlier() {
        let inbox = Inbox::new(QueueLimit::default()).unwrap();
        let mut link = Link::new(1, (0, 1));
        for (number, at) in [(1, 50), (2, 20)] {
            link.deliver(&inbox, ([number].as_slice().into(), 0), Passage::starting(at), 10);
        }
        assert!(inbox.pop(|| 49).is_none());
        assert_eq!(inbox.pop(|| 50).unwrap()[0], 1);
        assert_eq!(inbox.pop(|| 50).unwrap()[0], 2);
    }
}
