//! Blocks of a disk that are kept in memory, by their numbers. Pure data.

use std::collections::HashMap;

use super::slices::{self, Slice};

/// The size of a block. The unit of copy-on-write.
pub(super) const BLOCK: u64 = 4096;
/// The same, for what is in memory.
pub(super) const BLOCK_BYTES: usize = 4096;

/// The bytes of a block.
pub(super) type Bytes = [u8; BLOCK_BYTES];

/// The contents of a block.
#[derive(Debug)]
pub(super) enum Block {
    /// Zeroes.
    Zero,
    /// These bytes.
    Data(Box<Bytes>),
}

impl Block {
    /// From a whole block of bytes; shorter ones end in zeroes.
    pub(super) fn new(bytes: &[u8]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::Zero;
        }
        let mut block = Box::new([0; BLOCK_BYTES]);
        block.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Self::Data(block)
    }

    /// Fill the part of the buffers at `at` with the bytes of the block from `start` on.
    pub(super) fn read(&self, piece: Piece, buffers: &[Slice<'_>]) {
        match self {
            Self::Zero => slices::clear(buffers, piece.at, piece.length),
            Self::Data(bytes) => {
                let bytes = piece.range().and_then(|range| bytes.get(range));
                slices::fill(buffers, piece.at, bytes.unwrap_or_default());
            }
        }
    }

    /// Change the bytes from `start` on to those of the buffers at `at`.
    pub(super) fn write(&mut self, piece: Piece, buffers: &[Slice<'_>]) {
        if matches!(self, Self::Zero) {
            *self = Self::Data(Box::new([0; BLOCK_BYTES]));
        }
        if let Self::Data(bytes) = self
            && let Some(bytes) = piece.range().and_then(|range| bytes.get_mut(range))
        {
            slices::take(buffers, piece.at, bytes);
        }
    }

    /// Set the bytes of a piece to zero.
    pub(super) fn clear(&mut self, piece: Piece) {
        if let Self::Data(bytes) = self
            && let Some(bytes) = piece.range().and_then(|range| bytes.get_mut(range))
        {
            bytes.fill(0);
        }
    }
}

/// The part of a request that lies in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The number of the block.
    pub(super) block: u64,
    /// Where it starts in the block.
    pub(super) start: u64,
    /// How many bytes it has.
    pub(super) length: u64,
    /// Where it starts in the buffers.
    pub(super) at: u64,
}

impl Piece {
    /// Whether it is a whole block.
    pub(super) fn is_whole(&self) -> bool {
        self.length == BLOCK
    }

    fn range(&self) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(self.start).ok()?;
        let length = usize::try_from(self.length).ok()?;
        Some(start..start.checked_add(length)?)
    }
}

/// The pieces of a range of a disk.
pub(super) fn pieces(offset: u64, length: u64) -> impl Iterator<Item = Piece> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = length.checked_sub(at).filter(|left| *left > 0)?;
        let (block, start) = ((offset + at) / BLOCK, (offset + at) % BLOCK);
        let length = left.min(BLOCK - start);
        let piece = Piece { block, start, length, at };
        at += length;
        Some(piece)
    })
}

/// Blocks by number.
pub(super) type Blocks = HashMap<u64, Block>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{of_bytes, of_bytes_mut};

    #[test]
    fn a_range_is_divided_at_the_blocks() {
        let found: Vec<_> = pieces(4000, 5000).collect();
        assert_eq!(found[0], Piece { block: 0, start: 4000, length: 96, at: 0 });
        assert_eq!(found[1], Piece { block: 1, start: 0, length: 4096, at: 96 });
        assert_eq!(found[2], Piece { block: 2, start: 0, length: 808, at: 4192 });
        assert_eq!((found.len(), found[1].is_whole()), (3, true));
        assert_eq!(pieces(7, 0).count(), 0);
    }

    #[test]
    fn a_block_changes_in_parts() {
        let mut block = Block::new(&[0; 10]);
        assert!(matches!(block, Block::Zero));
        let piece = Piece { block: 0, start: 2, length: 3, at: 1 };
        block.write(piece, &of_bytes(&[9, 1, 2, 3]));
        let mut bytes = [7; 6];
        block.read(Piece { start: 0, length: 6, at: 0, ..piece }, &of_bytes_mut(&mut bytes));
        assert_eq!(bytes, [0, 0, 1, 2, 3, 0]);
        block.clear(Piece { start: 3, length: 1, ..piece });
        block.read(Piece { start: 1, length: 3, at: 2, ..piece }, &of_bytes_mut(&mut bytes));
        assert_eq!(bytes, [0, 0, 0, 1, 0, 0]);
        assert!(matches!(Block::new(&[0, 1]), Block::Data(_)));
    }
}
