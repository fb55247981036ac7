//! The RAM of one slot. A snapshot freezes it without a copy, and a reset restores it. The caller
//! keeps the guest stopped; host threads may write at any time.

use std::fs::File;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::image::Image;
use super::layer::{Layer, copy_to, memfd};
use super::mapping::{Mapping, is_same, part};
use super::pagemap;
use super::ranges::{self, ByteRange, coalesce, union};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;

/// A reset remaps the memory instead of copying more than one part in this many of it.
const REMAP_ABOVE: u64 = 4;
/// After this many resets in a row, written pages that hold what the image holds are released,
const IDLE_RESETS: u32 = 8;
/// if they are more than this, and more than eight times the pages that changed.
const IDLE_PAGES: u64 = 1024;

/// RAM that belongs to one machine. It owns its mapping, so new pages mapped over it replace
/// nothing else.
#[derive(Debug)]
pub(crate) struct Ram {
    mapping: Arc<Mapping>,
    contents: Contents,
    idle_resets: u32,
}

/// The current pages.
#[derive(Debug)]
enum Contents {
    /// The machine's own memfd, mapped shared.
    Own(Arc<File>),
    /// An image, mapped privately.
    Copy {
        /// The image under the mapping.
        mapped: Image,
        /// The image that pages are compared with: that of the last snapshot or reset.
        last: Image,
    },
    /// Parts of two images: a reset failed halfway.
    Torn,
}

impl Ram {
    /// RAM that is a shared mapping of this memfd.
    pub(crate) fn new(mapping: Arc<Mapping>, file: Arc<File>) -> Self {
        Self { mapping, contents: Contents::Own(file), idle_resets: 0 }
    }

    /// RAM that is a private mapping of an image.
    pub(crate) fn from_image(mapping: Arc<Mapping>, image: Image) -> Self {
        Self {
            mapping,
            contents: Contents::Copy { mapped: image.clone(), last: image },
            idle_resets: 0,
        }
    }

    fn region(&self) -> &MmapRegion {
        self.mapping.region()
    }

    /// An image of the current contents. From now on the machine writes to private copies.
    ///
    /// # Errors
    /// If the process is out of descriptors, memory or mappings. The contents do not change.
    pub(crate) fn freeze(&mut self) -> Result<Image> {
        match &mut self.contents {
            Contents::Own(file) => {
                let layer = Layer::of_memfd(Arc::clone(file));
                let image = Image::whole(self.mapping.size(), Arc::clone(&layer));
                // One step replaces the pages with the same bytes: an access from another thread
                // finds either.
                self.mapping.make_private(|| image.map_over(&self.mapping))?;
                let last = if layer.seal()? { image.clone() } else { self.copy(&image)? };
                self.contents = Contents::Copy { mapped: image, last: last.clone() };
                Ok(last)
            }
            Contents::Copy { mapped, last } => {
                let (host, region) = (self.mapping.host(), self.mapping.region());
                let written = pagemap::written(host, self.mapping.size())?;
                let found = compare(region, last, &union(written, mapped.differing(last)))?;
                if found.other.is_empty() {
                    return Ok(last.clone());
                }
                let changed = coalesce(found.other);
                let file = memfd(self.mapping.size())?;
                changed.iter().try_for_each(|range| copy_to(&file, region, *range))?;
                *last = last.overlaid(&changed, &Layer::sealed(file)?);
                Ok(last.clone())
            }
            Contents::Torn => {
                let detail = "a reset of this memory has failed halfway";
                let error = Error::new(ErrorKind::State, "snapshot", detail);
                Err(error.hint("reset the machine again first"))
            }
        }
    }

    /// A copy of the contents, used if the memfd may still be written: by a child that was forked
    /// without the C library, or by a kernel transfer in progress.
    fn copy(&self, image: &Image) -> Result<Image> {
        let (host, size) = (self.mapping.host(), self.mapping.size());
        let file = memfd(size)?;
        let data = union(pagemap::written(host, size)?, image.data());
        data.iter().try_for_each(|range| copy_to(&file, self.region(), *range))?;
        Ok(Image::whole(size, Layer::sealed(file)?))
    }

    /// Restore an image of the same size. Returns the ranges that were changed.
    ///
    /// # Errors
    /// If the process is out of memory or mappings: the RAM may hold parts of both then. Another
    /// reset can still succeed.
    pub(crate) fn reset(&mut self, image: &Image) -> Result<Vec<ByteRange>> {
        image.check()?;
        let (host, size) = (self.mapping.host(), self.mapping.size());
        let Contents::Copy { mapped, last } = &mut self.contents else {
            return self.replace(image, vec![(0, size)]);
        };
        let (written, elsewhere) = (pagemap::written(host, size)?, mapped.differing(image));
        if ranges::size(&elsewhere) > size / REMAP_ABOVE {
            return self.replace(image, union(written, elsewhere));
        }
        let (region, golden) = (self.mapping.region(), image.mapping()?);
        let found = compare(region, image, &union(written, elsewhere.clone()))?;
        for range in &found.other {
            part(golden, *range)?.copy_to_volatile_slice(part(region, *range)?);
        }
        *last = image.clone();
        let (same, other) = (ranges::size(&found.same), ranges::size(&found.other));
        let is_idle = same > (IDLE_PAGES * PAGE).max(8 * other);
        self.idle_resets = if is_idle { self.idle_resets + 1 } else { 0 };
        if self.idle_resets > IDLE_RESETS && elsewhere.is_empty() {
            found.same.iter().try_for_each(|range| release(region, *range))?;
            self.idle_resets = 0;
        }
        Ok(found.other)
    }

    fn replace(&mut self, image: &Image, changed: Vec<ByteRange>) -> Result<Vec<ByteRange>> {
        // Until the last run is mapped, any of them may have been replaced.
        self.contents = Contents::Torn;
        self.mapping.make_private(|| image.map_over(&self.mapping))?;
        self.contents = Contents::Copy { mapped: image.clone(), last: image.clone() };
        Ok(changed)
    }
}

/// The pages that equal the image, and the others.
struct Comparison {
    same: Vec<ByteRange>,
    other: Vec<ByteRange>,
}

fn compare(region: &MmapRegion, image: &Image, candidates: &[ByteRange]) -> Result<Comparison> {
    let (mut same, mut other) = (Vec::new(), Vec::new());
    if candidates.is_empty() {
        return Ok(Comparison { same, other });
    }
    let golden = image.mapping()?;
    for (start, end) in candidates {
        let mut at = *start;
        while at < *end {
            let page = (at, at + PAGE);
            let is_same = is_same(golden, region, page)?;
            ranges::push(if is_same { &mut same } else { &mut other }, page);
            at += PAGE;
        }
    }
    Ok(Comparison { same, other })
}

/// Release the private copies, so that the image's pages are visible again.
fn release(region: &MmapRegion, range: ByteRange) -> Result<()> {
    let slice = part(region, range)?;
    let start = slice.ptr_guard_mut();
    // SAFETY: the slice is part of a RAM's private mapping, whose pages hold the same bytes as the
    // image under them: no byte changes. Nothing depends on the kernel doing it.
    unsafe { libc::madvise(start.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) };
    Ok(())
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
        (Ram::new(Arc::clone(&mapping), file), mapping)
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
                        let changed = ranges::size(&machines[last].0.reset(image).unwrap()) / PAGE;
                        prop_assert_eq!(&all(machines[last].1.region()), held);
                        let differ = before.iter().zip(held).filter(|(a, b)| a != b).count() as u64;
                        prop_assert!(changed >= differ);
                    },
                    Step::Fork(which) => if let Some((image, held)) = images.get(which) {
                        let mapping = Mapping::new(image.map().unwrap());
                        prop_assert_eq!(&all(mapping.region()), held);
                        machines.push((Ram::from_image(Arc::clone(&mapping), image.clone()), mapping));
                    },
                }
            }
            for (image, held) in &images {
                prop_assert_eq!(&all(image.mapping().unwrap()), held, "an image never changes");
            }
        }

    }

    #[test]
    fn a_reset_copies_what_was_written_and_no_more() {
        let (mut ram, mapping) = ram();
        (0..PAGES).for_each(|page| set(&mapping, page, 9));
        let image = ram.freeze().unwrap();
        assert!(ram.reset(&image).unwrap().is_empty());
        [3, 4, 60].into_iter().for_each(|page| set(&mapping, page, 1));
        set(&mapping, 5, 9); // written with the same value
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
        assert!(ram.freeze().unwrap().is(&second), "nothing has changed");
    }

    #[test]
    fn memory_that_somebody_else_can_still_write_is_copied() {
        let (mut ram, mapping) = ram();
        set(&mapping, 3, 7);
        let file = mapping.own_file().unwrap();
        let offset = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
        // As in a child that was forked by a bare system call.
        let elsewhere =
            Mapping::new(MmapRegion::from_file(offset, mapping.region().size()).unwrap());
        let image = ram.freeze().unwrap();
        let held = all(image.mapping().unwrap());
        set(&elsewhere, 3, 9);
        set(&elsewhere, 4, 9);
        assert_eq!((all(image.mapping().unwrap()), held[3], held[4]), (held.clone(), 7, 0));
        ram.reset(&image).unwrap();
        set(&elsewhere, 3, 8);
        assert_eq!(all(mapping.region()), held, "after a reset, the machine no longer shares it");
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
