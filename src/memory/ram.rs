//! A slot's RAM as its machine uses it, and the two things a snapshot needs of it: freeze it
//! without a copy, and bring an image back. The caller keeps the guest at rest; host threads may
//! write at any time.

use std::fs::File;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::image::{Image, Layer, copy_to, memfd};
use super::mapping::{Mapping, part};
use super::pagemap::{self, ByteRange};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;

/// More runs of changed pages than this are joined, with pages between them that have not changed:
/// each run is one mapping of every fork, and the kernel allows a process 65,530.
const MOST_RUNS: usize = 256;
/// A reset puts another mapping in place instead of copying this part of the memory, or more.
const REMAP_ABOVE: u64 = 4;
/// Resets in a row after which written pages that stay the same are given back,
const IDLE_RESETS: u32 = 8;
/// if there are more of them than this and than eight times those that change.
const IDLE_PAGES: u64 = 1024;

/// RAM that is one machine's own. It keeps its mapping, so that what it puts over it never lies
/// over anything else.
#[derive(Debug)]
pub(crate) struct Ram {
    mapping: Arc<Mapping>,
    under: Under,
    idle_resets: u32,
}

/// What stands under the mapping.
#[derive(Debug)]
enum Under {
    /// A memfd that nobody else has, mapped shared.
    Own(Arc<File>),
    /// Private pages over an image.
    Copy {
        /// What is mapped.
        mapped: Image,
        /// What the pages are compared with: the last snapshot or reset.
        last: Image,
    },
    /// Parts of two images: a reset has failed halfway.
    Torn,
}

impl Ram {
    /// RAM that is this memfd, mapped shared.
    pub(crate) fn own(mapping: Arc<Mapping>, file: Arc<File>) -> Self {
        Self { mapping, under: Under::Own(file), idle_resets: 0 }
    }

    /// RAM over a private mapping of an image.
    pub(crate) fn over(mapping: Arc<Mapping>, image: Image) -> Self {
        Self { mapping, under: Under::Copy { mapped: image.clone(), last: image }, idle_resets: 0 }
    }

    fn region(&self) -> &MmapRegion {
        self.mapping.region()
    }

    /// What it holds now, for good. The machine goes on with private copies of what it writes.
    ///
    /// # Errors
    /// When a descriptor, memory or a mapping is missing; the RAM holds what it held.
    pub(crate) fn freeze(&mut self) -> Result<Image> {
        match &mut self.under {
            Under::Own(file) => {
                let layer = Layer::of_memfd(Arc::clone(file));
                let image = Image::whole(self.mapping.size(), Arc::clone(&layer));
                // Replaced in one step by the same bytes: an access from another thread finds one
                // or the other.
                self.mapping.make_private(|| image.map_over(&self.mapping))?;
                let last = if layer.seal()? { image.clone() } else { self.copy(&image)? };
                self.under = Under::Copy { mapped: image, last: last.clone() };
                Ok(last)
            }
            Under::Copy { mapped, last } => {
                let (host, region) = (self.mapping.host(), self.mapping.region());
                let written = pagemap::written(host, self.mapping.size())?;
                let found = compare(region, last, &union(written, mapped.differing(last)))?;
                if found.other.is_empty() {
                    return Ok(last.clone());
                }
                let changed = joined(found.other);
                let file = memfd(self.mapping.size())?;
                changed.iter().try_for_each(|range| copy_to(&file, region, *range))?;
                *last = last.overlaid(&changed, &Layer::sealed(file)?);
                Ok(last.clone())
            }
            Under::Torn => {
                let detail = "a reset of this memory has failed halfway";
                let error = Error::new(ErrorKind::State, "snapshot", detail);
                Err(error.hint("reset the machine again first"))
            }
        }
    }

    /// A copy of what it holds over an image that somebody else may still write: a child that was
    /// forked past the C library, or a transfer of the kernel's that has begun.
    fn copy(&self, image: &Image) -> Result<Image> {
        let (host, size) = (self.mapping.host(), self.mapping.size());
        let file = memfd(size)?;
        let data = union(pagemap::written(host, size)?, image.data());
        data.iter().try_for_each(|range| copy_to(&file, self.region(), *range))?;
        Ok(Image::whole(size, Layer::sealed(file)?))
    }

    /// Have it hold an image of its size again; the ranges that were changed for it.
    ///
    /// # Errors
    /// When memory or a mapping is missing: then it holds some of both. Another reset can still
    /// bring it back.
    pub(crate) fn reset(&mut self, image: &Image) -> Result<Vec<ByteRange>> {
        image.check()?;
        let (host, size) = (self.mapping.host(), self.mapping.size());
        let Under::Copy { mapped, last } = &mut self.under else {
            return self.replace(image, vec![(0, size)]);
        };
        let (written, elsewhere) = (pagemap::written(host, size)?, mapped.differing(image));
        if bytes(&elsewhere) > size / REMAP_ABOVE {
            return self.replace(image, union(written, elsewhere));
        }
        let (region, golden) = (self.mapping.region(), image.mapping()?);
        let found = compare(region, image, &union(written, elsewhere.clone()))?;
        for range in &found.other {
            part(golden, *range)?.copy_to_volatile_slice(part(region, *range)?);
        }
        *last = image.clone();
        let (same, other) = (bytes(&found.same), bytes(&found.other));
        let is_idle = same > (IDLE_PAGES * PAGE).max(8 * other);
        self.idle_resets = if is_idle { self.idle_resets + 1 } else { 0 };
        if self.idle_resets > IDLE_RESETS && elsewhere.is_empty() {
            found.same.iter().try_for_each(|range| give_back(region, *range))?;
            self.idle_resets = 0;
        }
        Ok(found.other)
    }

    fn replace(&mut self, image: &Image, changed: Vec<ByteRange>) -> Result<Vec<ByteRange>> {
        // Until all of it is there, nobody knows what is mapped.
        self.under = Under::Torn;
        self.mapping.make_private(|| image.map_over(&self.mapping))?;
        self.under = Under::Copy { mapped: image.clone(), last: image.clone() };
        Ok(changed)
    }
}

/// What a comparison found: pages that are as in the image, and others.
struct Found {
    same: Vec<ByteRange>,
    other: Vec<ByteRange>,
}

fn compare(region: &MmapRegion, image: &Image, ranges: &[ByteRange]) -> Result<Found> {
    let (mut same, mut other) = (Vec::new(), Vec::new());
    if ranges.is_empty() {
        return Ok(Found { same, other });
    }
    let golden = image.mapping()?;
    for (start, end) in ranges {
        let mut at = *start;
        while at < *end {
            let page = (at, at + PAGE);
            let is_same = is_same(golden, region, page)?;
            pagemap::push(if is_same { &mut same } else { &mut other }, page);
            at += PAGE;
        }
    }
    Ok(Found { same, other })
}

/// Whether two regions have the same bytes in a range.
pub(crate) fn is_same(a: &MmapRegion, b: &MmapRegion, range: ByteRange) -> Result<bool> {
    let (a, b) = (part(a, range)?, part(b, range)?);
    let (from, to) = (a.ptr_guard(), b.ptr_guard());
    // SAFETY: both slices have these bytes, and both are of the same length. They are of no Rust
    // object, and compared outside of Rust: a thread that writes them meanwhile makes the answer
    // old, not wrong.
    Ok(unsafe { libc::memcmp(from.as_ptr().cast(), to.as_ptr().cast(), a.len()) == 0 })
}

/// Let the private copies go: the image's pages show again.
fn give_back(region: &MmapRegion, range: ByteRange) -> Result<()> {
    let slice = part(region, range)?;
    let start = slice.ptr_guard_mut();
    // SAFETY: a part of the private mapping of a RAM, whose pages are as those under it: no byte
    // changes. That a kernel refuses it changes nothing.
    unsafe { libc::madvise(start.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) };
    Ok(())
}

/// Bytes of these ranges.
pub(crate) fn bytes(ranges: &[ByteRange]) -> u64 {
    ranges.iter().map(|(start, end)| end - start).sum()
}

/// The ranges of both lists, each of which is sorted and without overlap.
fn union(mut a: Vec<ByteRange>, b: Vec<ByteRange>) -> Vec<ByteRange> {
    if b.is_empty() {
        return a;
    }
    a.extend(b);
    a.sort_unstable();
    let mut all: Vec<ByteRange> = Vec::new();
    for range in a {
        match all.last_mut() {
            Some(last) if range.0 <= last.1 => last.1 = last.1.max(range.1),
            _ => all.push(range),
        }
    }
    all
}

/// At most [`MOST_RUNS`] runs that cover these.
pub(crate) fn joined(mut ranges: Vec<ByteRange>) -> Vec<ByteRange> {
    let mut gap = PAGE;
    while ranges.len() > MOST_RUNS {
        let mut fewer: Vec<ByteRange> = Vec::new();
        for range in ranges {
            match fewer.last_mut() {
                Some(last) if range.0 - last.1 <= gap => last.1 = range.1,
                _ => fewer.push(range),
            }
        }
        (ranges, gap) = (fewer, gap * 2);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;
    use proptest::prelude::*;

    const PAGES: u64 = 64;

    /// RAM and its mapping.
    fn ram() -> (Ram, Arc<Mapping>) {
        let mapping = Mapping::of_own(anonymous(PAGES * PAGE).unwrap());
        let file = mapping.own_file().unwrap();
        (Ram::own(Arc::clone(&mapping), file), mapping)
    }

    fn set(mapping: &Mapping, page: u64, value: u8) {
        part(mapping.region(), (page * PAGE, page * PAGE + 1)).unwrap().copy_from(&[value]);
    }

    fn all(region: &MmapRegion) -> Vec<u8> {
        let get = |page: u64| {
            let mut value = [0u8];
            part(region, (page * PAGE, page * PAGE + 1)).unwrap().copy_to(&mut value);
            value[0]
        };
        (0..PAGES).map(get).collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u64, u8),
        Freeze,
        Reset(usize),
        Fork(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..PAGES, 0u8..4).prop_map(|(page, value)| Step::Set(page, value)),
            1 => Just(Step::Freeze),
            1 => (0usize..8).prop_map(Step::Reset),
            1 => (0usize..8).prop_map(Step::Fork),
        ];
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        #[test]
        fn snapshots_and_resets_agree_with_copies(steps in steps()) {
            let mut machines = vec![ram()];
            let mut images: Vec<(Image, Vec<u8>)> = Vec::new();
            for step in steps {
                let last = machines.len() - 1;
                match step {
                    Step::Set(page, value) => {
                        let at = usize::from(value) % machines.len();
                        set(&machines[at].1, page, value);
                    }
                    Step::Freeze => {
                        let held = all(machines[last].1.region());
                        let image = machines[last].0.freeze().unwrap();
                        prop_assert_eq!(&all(machines[last].1.region()), &held);
                        images.push((image, held));
                    }
                    Step::Reset(which) => if let Some((image, held)) = images.get(which) {
                        let before = all(machines[last].1.region());
                        let changed = bytes(&machines[last].0.reset(image).unwrap()) / PAGE;
                        prop_assert_eq!(&all(machines[last].1.region()), held);
                        let differ = before.iter().zip(held).filter(|(a, b)| a != b).count() as u64;
                        prop_assert!(changed >= differ);
                    },
                    Step::Fork(which) => if let Some((image, held)) = images.get(which) {
                        let mapping = Mapping::new(image.map().unwrap());
                        prop_assert_eq!(&all(mapping.region()), held);
                        machines.push((Ram::over(Arc::clone(&mapping), image.clone()), mapping));
                    },
                }
            }
            for (image, held) in &images {
                prop_assert_eq!(&all(image.mapping().unwrap()), held, "an image never changes");
            }
        }

        #[test]
        fn joined_ranges_cover_all_and_are_few(pages in prop::collection::btree_set(0u64..100_000, 0..4000)) {
            let mut ranges = Vec::new();
            pages.iter().for_each(|page| pagemap::push(&mut ranges, (page * PAGE, (page + 1) * PAGE)));
            let fewer = joined(ranges.clone());
            prop_assert!(fewer.len() <= MOST_RUNS);
            let covers = |range: &ByteRange| fewer.iter().any(|f| f.0 <= range.0 && range.1 <= f.1);
            prop_assert!(ranges.iter().all(covers));
        }
    }

    #[test]
    fn a_reset_copies_what_was_written_and_no_more() {
        let (mut ram, mapping) = ram();
        (0..PAGES).for_each(|page| set(&mapping, page, 9));
        let image = ram.freeze().unwrap();
        assert!(ram.reset(&image).unwrap().is_empty());
        [3, 4, 60].into_iter().for_each(|page| set(&mapping, page, 1));
        set(&mapping, 5, 9); // written, and the same
        let expected = [(3 * PAGE, 5 * PAGE), (60 * PAGE, 61 * PAGE)];
        assert_eq!(ram.reset(&image).unwrap(), expected);
        assert!(ram.reset(&image).unwrap().is_empty());
    }

    #[test]
    fn a_second_snapshot_stores_only_what_changed() {
        let (mut ram, mapping) = ram();
        (0..PAGES).for_each(|page| set(&mapping, page, 9));
        let first = ram.freeze().unwrap();
        set(&mapping, 7, 1);
        let second = ram.freeze().unwrap();
        assert_eq!(second.differing(&first), [(7 * PAGE, 8 * PAGE)]);
        assert_eq!(second.layers().iter().map(|layer| layer.allocated()).sum::<u64>(), 65 * PAGE);
        assert!(ram.freeze().unwrap().is(&second), "nothing has changed since");
    }

    #[test]
    fn memory_that_somebody_else_can_still_write_is_copied() {
        let (mut ram, mapping) = ram();
        set(&mapping, 3, 7);
        let file = mapping.own_file().unwrap();
        let offset = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
        // As a child has it that was forked by a bare system call.
        let elsewhere =
            Mapping::new(MmapRegion::from_file(offset, mapping.region().size()).unwrap());
        let image = ram.freeze().unwrap();
        let held = all(image.mapping().unwrap());
        set(&elsewhere, 3, 9);
        set(&elsewhere, 4, 9);
        assert_eq!((all(image.mapping().unwrap()), held[3], held[4]), (held.clone(), 7, 0));
        ram.reset(&image).unwrap();
        set(&elsewhere, 3, 8);
        assert_eq!(all(mapping.region()), held, "and a reset parts the machine from it");
    }

    #[test]
    fn a_reset_that_fails_halfway_is_made_good_by_the_next() {
        let (mut ram, mapping) = ram();
        set(&mapping, 3, 7);
        let image = ram.freeze().unwrap();
        set(&mapping, 3, 9);
        let short = Image::whole(PAGE, Layer::sealed(memfd(PAGE).unwrap()).unwrap());
        assert!(ram.replace(&short, Vec::new()).is_err());
        assert_eq!(ram.freeze().unwrap_err().kind, ErrorKind::State);
        ram.reset(&image).unwrap();
        assert_eq!(all(mapping.region())[3], 7);
        assert!(ram.freeze().unwrap().is(&image));
    }
}
