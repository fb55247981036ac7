//! A copy-on-write overlay in memory: what is written stays here, and the rest is read from the
//! base, which never changes. Any thread; the base is read with no lock held.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::backend::Backend;
use super::blocks::{BLOCK, BLOCK_BYTES, Block, Blocks, Piece, pieces};
use super::slices::{self, Slice};
use crate::sync::{Mutex, rank};

/// See the module.
#[derive(Debug)]
pub(super) struct Overlay {
    base: Arc<dyn Backend>,
    size: AtomicU64,
    /// What the base has, unless it was cut off since.
    base_size: AtomicU64,
    blocks: Mutex<Blocks, rank::DiskBlocks>,
}

impl Overlay {
    /// An empty overlay. If the base cannot tell its size, it has none.
    pub(super) fn new(base: Arc<dyn Backend>) -> Self {
        let size = base.size().unwrap_or(0);
        let sizes = (AtomicU64::new(size), AtomicU64::new(size));
        Self { base, size: sizes.0, base_size: sizes.1, blocks: Mutex::default() }
    }

    /// Read from the base, and zeroes beyond it.
    fn read_base(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        // Acquire: pairs with the release of `resize`.
        let base_size = self.base_size.load(Ordering::Acquire);
        let length = slices::length(buffers);
        let there = base_size.saturating_sub(offset).min(length);
        slices::clear(buffers, there, length - there);
        if there == 0 {
            return Ok(());
        }
        self.base.read_at(offset, &slices::part(buffers, 0, there))
    }

    /// Fill in what a write leaves of blocks that the overlay does not have.
    fn complete(&self, piece: Piece) -> io::Result<()> {
        if piece.is_whole() || self.blocks.lock().contains_key(&piece.block) {
            return Ok(());
        }
        let mut bytes = vec![0; BLOCK_BYTES];
        self.read_base(piece.block * BLOCK, &slices::of_bytes_mut(&mut bytes))?;
        self.blocks.lock().entry(piece.block).or_insert_with(|| Block::new(&bytes));
        Ok(())
    }

    /// The first and the last piece of a range, which may be parts of blocks.
    fn complete_ends(&self, offset: u64, length: u64) -> io::Result<()> {
        let first = pieces(offset, length).next();
        let last = (offset + length).checked_sub(1).map(|last| last - last % BLOCK);
        let last = last.filter(|start| *start > offset);
        let last = last.and_then(|start| pieces(start, offset + length - start).next());
        first.into_iter().chain(last).try_for_each(|piece| self.complete(piece))
    }

    /// The runs of bytes that only the base has, as position and length in the buffers.
    fn read_own(&self, offset: u64, buffers: &[Slice<'_>]) -> Vec<(u64, u64)> {
        let mut missing: Vec<(u64, u64)> = Vec::new();
        let blocks = self.blocks.lock();
        for piece in pieces(offset, slices::length(buffers)) {
            match (blocks.get(&piece.block), missing.last_mut()) {
                (Some(block), _) => block.read(piece, buffers),
                (None, Some((at, length))) if *at + *length == piece.at => *length += piece.length,
                (None, _) => missing.push((piece.at, piece.length)),
            }
        }
        missing
    }
}

impl Backend for Overlay {
    fn size(&self) -> io::Result<u64> {
        // Acquire: pairs with the release of `resize`.
        Ok(self.size.load(Ordering::Acquire))
    }

    fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        for (at, length) in self.read_own(offset, buffers) {
            self.read_base(offset + at, &slices::part(buffers, at, length))?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        let length = slices::length(buffers);
        self.complete_ends(offset, length)?;
        let mut blocks = self.blocks.lock();
        for piece in pieces(offset, length) {
            blocks.entry(piece.block).or_insert(Block::Zero).write(piece, buffers);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, true)
    }

    fn write_zeroes(&self, offset: u64, length: u64, _may_unmap: bool) -> io::Result<()> {
        self.complete_ends(offset, length)?;
        let mut blocks = self.blocks.lock();
        for piece in pieces(offset, length) {
            let block = blocks.entry(piece.block).or_insert(Block::Zero);
            if piece.is_whole() {
                *block = Block::Zero;
            } else {
                block.clear(piece);
            }
        }
        Ok(())
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        let before = self.size.load(Ordering::Acquire);
        if size < before {
            // What comes back by growing again is zeroes.
            let tail = size.next_multiple_of(BLOCK).min(before);
            self.write_zeroes(size, tail - size, true)?;
            self.blocks.lock().retain(|block, _| block * BLOCK < size);
            self.base_size.fetch_min(size, Ordering::Release);
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn may_block(&self) -> bool {
        self.base.may_block()
    }

    fn best_block(&self) -> u32 {
        self.base.best_block()
    }

    fn is_volatile(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::bytes::Bytes;
    use super::*;
    use crate::disk::{of_bytes, of_bytes_mut};
    use proptest::prelude::*;

    fn read(disk: &dyn Backend, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0x55; length];
        disk.read_at(offset, &of_bytes_mut(&mut bytes)).unwrap();
        bytes
    }

    #[test]
    fn the_base_keeps_its_bytes() {
        let base = Arc::new(Bytes::new(vec![1; 10_000]));
        let disk = Overlay::new(base.clone());
        disk.write_at(4090, &of_bytes(&[2; 20])).unwrap();
        disk.flush().unwrap();
        assert_eq!(read(&disk, 4089, 22), [[1].as_slice(), &[2; 20], &[1]].concat());
        assert!(read(&*base, 0, 10_000).iter().all(|byte| *byte == 1));
        assert!(disk.is_volatile() && !disk.is_read_only() && !disk.may_block());
    }

    #[test]
    fn what_grows_back_is_zero() {
        let disk = Overlay::new(Arc::new(Bytes::new(vec![1; 10_000])));
        disk.write_at(5000, &of_bytes(&[2; 5000])).unwrap();
        disk.resize(4500).unwrap();
        disk.resize(20_000).unwrap();
        assert_eq!(disk.size().unwrap(), 20_000);
        let bytes = read(&disk, 0, 20_000);
        assert!(bytes[..4500].iter().all(|byte| *byte == 1));
        assert!(bytes[4500..].iter().all(|byte| *byte == 0));
    }

    proptest! {
        #[test]
        fn an_overlay_reads_as_bytes_would(
            steps in prop::collection::vec((0u64..20_000, 0usize..9000, any::<u8>(), 0u8..3), 0..30),
        ) {
            let mut model: Vec<u8> = (0..20_000u32).map(|at| at.to_le_bytes()[0]).collect();
            let disk = Overlay::new(Arc::new(Bytes::new(model.clone())));
            for (offset, length, value, kind) in steps {
                let start = usize::try_from(offset).unwrap();
                let end = (start + length).min(model.len());
                let (length, value) = (end - start, if kind == 0 { value } else { 0 });
                match kind {
                    0 => disk.write_at(offset, &of_bytes(&vec![value; length])).unwrap(),
                    1 => disk.write_zeroes(offset, length as u64, false).unwrap(),
                    _ => disk.discard(offset, length as u64).unwrap(),
                }
                model[start..end].fill(value);
            }
            prop_assert_eq!(read(&disk, 0, model.len()), model);
        }
    }
}
