//! Writing a snapshot's file; `new_file` puts it in its place.

use std::path::Path;

use vm_memory::MmapRegion;

use super::Snapshot;
use super::file::{HEADER, Header, MOST_STATE, OF_BASE};
use super::host::Host;
use super::new_file::NewFile;
use super::state::{Kind, Record};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::memory::ranges::{self, ByteRange};
use crate::memory::{Image, is_same, part};

/// Written at a time.
const CHUNK: u64 = 1 << 20;

impl Snapshot {
    /// Write it to a file. With a base only the pages that differ from the base's are written, and
    /// loading needs the base. `progress` is told how many bytes of how many have been written; its
    /// error ends the writing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the file cannot be written, [`ErrorKind::Snapshot`] when the base is
    /// of another machine or the devices' state is larger than a file may have; what `progress`
    /// returns. A file of that name is as before then. What is no regular file is refused.
    pub fn save<E: From<Error>>(
        &self,
        path: &Path,
        base: Option<&Self>,
        mut progress: impl FnMut(u64, u64) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let plans = self.plans(base)?;
        let total = plans.iter().map(|plan| ranges::size(&plan.stored)).sum();
        let state = self.encode(&plans)?;
        if state.len() as u64 > MOST_STATE {
            let detail = format!("{} bytes, where a file has {MOST_STATE} at most", state.len());
            return Err(Error::new(ErrorKind::Snapshot, "state", detail).into());
        }
        let pages = (HEADER as u64 + state.len() as u64).next_multiple_of(PAGE);
        let new = NewFile::to_replace(path)?;
        let (mut at, mut crc, mut piece) = (pages, crc32fast::Hasher::new(), Vec::new());
        for plan in &plans {
            let mapping = plan.image.mapping()?;
            for (start, end) in &plan.stored {
                for first in (*start..*end).step_by(1 << 20) {
                    let last = (first + CHUNK).min(*end);
                    copy(mapping, (first, last), &mut piece)?;
                    crc.update(&piece);
                    new.write(&piece, at)?;
                    at += last - first;
                    progress(at - pages, total)?;
                }
            }
        }
        let header = Header {
            file_length: at,
            state_length: state.len() as u64,
            pages,
            state_crc: crc32fast::hash(&state),
            pages_crc: crc.finalize(),
            id: self.id,
            base: base.map_or([0; 16], |base| base.id),
        };
        new.write(&state, HEADER as u64)?;
        new.write(&header.encode(), 0)?;
        // A state that ends before its page does, and no page behind it: the file has that length
        // all the same.
        new.set_length(at)?;
        Ok(new.replace()?)
    }

    fn plans(&self, base: Option<&Self>) -> Result<Vec<Plan>> {
        self.ranges.iter().try_for_each(|range| range.image.check())?;
        let of_base = |range: &crate::memory::MemoryRange| {
            let Some(base) = base else { return Ok(None) };
            let size = range.image.size();
            let same =
                |r: &&crate::memory::MemoryRange| (r.start, r.image.size()) == (range.start, size);
            let found = base.ranges.iter().find(same).map(|range| range.image.clone());
            let detail = "its memory is not that of this snapshot";
            found.map(Some).ok_or_else(|| Error::new(ErrorKind::Snapshot, "base", detail))
        };
        self.ranges.iter().map(|range| Plan::of(&range.image, of_base(range)?.as_ref())).collect()
    }

    /// The records, with where each page will be.
    fn encode(&self, plans: &[Plan]) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut put = |kind: Kind, number: u16, bytes: &[u8]| {
            all.extend((kind as u16).to_le_bytes());
            all.extend(number.to_le_bytes());
            all.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            all.extend(bytes);
        };
        put(Kind::Shape, 0, &self.shape.encode());
        let host = match &self.host {
            Some(host) => host,
            None => Host::here()?,
        };
        put(Kind::Host, 0, &host.encode());
        let records = self.vcpus.iter().flatten().chain(&self.chips);
        records.for_each(|Record { kind, number, bytes }| put(*kind, *number, bytes));
        self.devices.iter().for_each(|device| put(Kind::Device, 0, &device.encode()));
        let mut place = 0;
        for (range, plan) in self.ranges.iter().zip(plans) {
            let mut bytes = Vec::new();
            bytes.extend(range.start.to_le_bytes());
            bytes.extend(range.image.size().to_le_bytes());
            bytes.extend(u64::from(range.read_only).to_le_bytes());
            for (run, is_stored) in plan.runs() {
                let at = if is_stored { place } else { OF_BASE };
                [run.0, run.1 - run.0, at].iter().for_each(|n| bytes.extend(n.to_le_bytes()));
                place += if is_stored { run.1 - run.0 } else { 0 };
            }
            put(Kind::Range, 0, &bytes);
        }
        Ok(all)
    }
}

/// Which pages of a range a file holds, and which it takes of its base. All others are zeros.
struct Plan {
    image: Image,
    stored: Vec<ByteRange>,
    of_base: Vec<ByteRange>,
}

impl Plan {
    fn of(image: &Image, base: Option<&Image>) -> Result<Self> {
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
        let mut of_base = Vec::new();
        if base.is_some() {
            let mut other: Vec<ByteRange> = stored.iter().chain(&zeros).copied().collect();
            other.sort_unstable();
            let mut at = 0;
            for (start, end) in other {
                if at < start {
                    of_base.push((at, start));
                }
                at = at.max(end);
            }
            if at < image.size() {
                of_base.push((at, image.size()));
            }
        }
        Ok(Self { image: image.clone(), stored, of_base })
    }

    /// All runs by address, and whether the file has them.
    fn runs(&self) -> Vec<(ByteRange, bool)> {
        let stored = self.stored.iter().map(|run| (*run, true));
        let mut all: Vec<_> = stored.chain(self.of_base.iter().map(|run| (*run, false))).collect();
        all.sort_unstable();
        all
    }
}

/// Copy a range of an image. A file behind it that is changed against the rule may change while it
/// is read: so nothing looks at the image's own bytes twice.
fn copy(mapping: &MmapRegion, range: ByteRange, to: &mut Vec<u8>) -> Result<()> {
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
