//! What a file saves of a range of memory: its own pages, and those that it takes from its base.

use vm_memory::MmapRegion;

use crate::error::Result;
use crate::layout::PAGE;
use crate::memory::ranges::{self, ByteRange};
use crate::memory::{Image, is_same, part};

/// Which pages of a range a file holds, and which it takes from its base. All others are zeros.
pub(super) struct Plan {
    pub(super) image: Image,
    pub(super) stored: Vec<ByteRange>,
    of_base: Vec<ByteRange>,
}

impl Plan {
    /// Compare an image with zeros and its base.
    pub(super) fn of(image: &Image, base: Option<&Image>) -> Result<Self> {
        let (ours, theirs) = (image.mapping()?, base.map(Image::mapping).transpose()?);
        let candidates = base.map_or_else(|| image.data(), |base| image.differing(base));
        let mut stored: Vec<ByteRange> = Vec::new();
        let mut zeros: Vec<ByteRange> = Vec::new();
        let mut bytes = Vec::new();
        for (start, end) in candidates {
            for at in (start..end).step_by(4096) {
                let page = (at, at + PAGE);
                let is_of_base = theirs.map(|theirs| is_same(theirs, ours, page)).transpose()?;
                if is_of_base == Some(true) {
                    continue;
                }
                copy(ours, page, &mut bytes)?;
                let is_zero = is_zero(&bytes);
                ranges::push(if is_zero { &mut zeros } else { &mut stored }, page);
            }
        }
        let stored = ranges::coalesce(stored);
        let of_base = match base {
            Some(_) => others(image.size(), &stored, &zeros),
            None => Vec::new(),
        };
        Ok(Self { image: image.clone(), stored, of_base })
    }

    /// All runs by address, and whether the file has them.
    pub(super) fn runs(&self) -> Vec<(ByteRange, bool)> {
        let stored = self.stored.iter().map(|run| (*run, true));
        let mut all: Vec<_> = stored.chain(self.of_base.iter().map(|run| (*run, false))).collect();
        all.sort_unstable();
        all
    }
}

/// What is in neither of two lists.
fn others(size: u64, stored: &[ByteRange], zeros: &[ByteRange]) -> Vec<ByteRange> {
    let mut known: Vec<ByteRange> = stored.iter().chain(zeros).copied().collect();
    known.sort_unstable();
    let (mut others, mut at) = (Vec::new(), 0);
    for (start, end) in known {
        if at < start {
            others.push((at, start));
        }
        at = at.max(end);
    }
    if at < size {
        others.push((at, size));
    }
    others
}

/// Copy a range of an image. If the file behind it is changed, against the rules, its bytes may
/// change while they are read: so nothing reads them from the image twice.
pub(super) fn copy(mapping: &MmapRegion, range: ByteRange, to: &mut Vec<u8>) -> Result<()> {
    let source = part(mapping, range)?;
    to.resize(source.len(), 0);
    source.copy_to(to.as_mut_slice());
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    let words = page.chunks_exact(16);
    let is_word_zero =
        |word: &[u8]| word.try_into().is_ok_and(|word| u128::from_ne_bytes(word) == 0);
    words.remainder().iter().all(|byte| *byte == 0) && words.into_iter().all(is_word_zero)
}
