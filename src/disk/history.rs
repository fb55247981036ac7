//! The blocks that snapshots need and that a disk has overwritten since: of each frozen state,
//! those that were overwritten while it was the newest. A state reads its own blocks, else those of
//! newer states, else the disk. Pure data.

use super::blocks::{Block, Blocks, Piece, pieces};
use super::slices::{self, Slice};

/// A frozen state.
#[derive(Debug)]
struct State {
    number: u64,
    blocks: Blocks,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct History {
    /// From the oldest to the newest.
    states: Vec<State>,
    next: u64,
}

impl History {
    /// Freeze the disk as it is now. Returns the number of the state.
    pub(super) fn freeze(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.states.push(State { number, blocks: Blocks::default() });
        number
    }

    /// A state is not needed any more. The next older one gets the blocks that it has read there.
    pub(super) fn forget(&mut self, number: u64) {
        let Some(at) = self.place(number) else { return };
        let gone = self.states.remove(at);
        if let Some(older) = at.checked_sub(1).and_then(|at| self.states.get_mut(at)) {
            for (block, contents) in gone.blocks {
                older.blocks.entry(block).or_insert(contents);
            }
        }
    }

    fn place(&self, number: u64) -> Option<usize> {
        self.states.iter().position(|state| state.number == number)
    }

    fn from(&self, number: u64) -> &[State] {
        self.place(number).and_then(|at| self.states.get(at..)).unwrap_or_default()
    }

    /// Whether no state is needed.
    pub(super) fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// The next blocks in a range of blocks that the newest state lacks, at most this many, and its
    /// number. None if it has them all.
    pub(super) fn missing(&self, blocks: (u64, u64), most: u64) -> Option<(u64, (u64, u64))> {
        let State { number, blocks: saved } = self.states.last()?;
        let (first, end) = blocks;
        let start = (first..end).find(|block| !saved.contains_key(block))?;
        let limit = end.min(start + most);
        let end = (start..limit).find(|block| saved.contains_key(block)).unwrap_or(limit);
        Some((*number, (start, end)))
    }

    /// Save a block for a state, unless it has it.
    pub(super) fn save(&mut self, number: u64, block: u64, contents: Block) {
        if let Some(state) = self.place(number).and_then(|at| self.states.get_mut(at)) {
            state.blocks.entry(block).or_insert(contents);
        }
    }

    /// Fill those parts of buffers that a state has saved. Returns whether these were all.
    pub(super) fn read(&self, number: u64, offset: u64, buffers: &[Slice<'_>]) -> bool {
        let states = self.from(number);
        let read = |piece: Piece| {
            let found = states.iter().find_map(|state| state.blocks.get(&piece.block));
            found.inspect(|block| block.read(piece, buffers)).is_some()
        };
        pieces(offset, slices::length(buffers)).map(read).fold(true, |all, found| all & found)
    }

    /// The numbers of all blocks that were overwritten since a state, in order.
    pub(super) fn changed_since(&self, number: u64) -> Vec<u64> {
        let states = self.from(number).iter();
        let mut all: Vec<u64> = states.flat_map(|state| state.blocks.keys().copied()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The disk is again as the state is. Its blocks are not needed if it is the newest.
    pub(super) fn returned_to(&mut self, number: u64) {
        if let Some(state) = self.states.last_mut().filter(|state| state.number == number) {
            state.blocks.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::of_bytes_mut;

    #[test]
    fn an_older_state_inherits_from_a_newer_one() {
        let mut history = History::default();
        assert_eq!(history.missing((0, 9), 9), None);
        let (old, new) = (history.freeze(), history.freeze());
        history.save(old, 1, Block::new(&[1]));
        history.save(new, 1, Block::new(&[2]));
        history.save(new, 2, Block::new(&[3]));
        assert_eq!(history.missing((0, 4), 9), Some((new, (0, 1))));
        assert_eq!(history.missing((1, 9), 3), Some((new, (3, 6))));
        assert_eq!(history.changed_since(old), [1, 2]);
        history.forget(new);
        history.forget(new);
        let mut bytes = [9; 2];
        assert!(history.read(old, 4096, &of_bytes_mut(&mut bytes)));
        assert_eq!(bytes, [1, 0]);
        assert!(history.read(old, 8192, &of_bytes_mut(&mut bytes)));
        assert_eq!(bytes, [3, 0]);
        assert!(!history.read(old, 0, &of_bytes_mut(&mut bytes)));
        history.returned_to(old);
        assert!(history.changed_since(old).is_empty() && !history.is_empty());
        history.forget(old);
        assert!(history.is_empty());
    }
}
