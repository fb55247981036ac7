//! The memory in a snapshot's file: where each run of pages is found, in the file or in its base.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::file::read_pages;
use super::header::{Header, OF_BASE};
use super::snapshot::Snapshot;
use crate::bytes::{Reader, bad};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::memory::ranges::{self, ByteRange};
use crate::memory::{Image, Layer, MemoryRange, Run, host_memory, memfd};

/// The pages of a file, and their place in a layer.
pub(super) struct Pages {
    layer: Arc<Layer>,
    first: u64,
    length: u64,
}

impl Pages {
    /// The pages in the file itself.
    pub(super) fn of(layer: Arc<Layer>, header: &Header) -> Self {
        Self { layer, first: header.pages, length: header.file_length - header.pages }
    }

    /// A copy of the pages in memory.
    ///
    /// # Errors
    /// As for [`read_pages`]; if there is not enough memory.
    pub(super) fn copied<E: From<Error>>(
        file: &File,
        header: &Header,
        path: &Path,
        progress: impl FnMut(u64, u64) -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let length = header.file_length - header.pages;
        let copy = memfd(length.next_multiple_of(PAGE).max(PAGE))?;
        let write = |part: &[u8], at| {
            copy.write_all_at(part, at).map_err(|e| Error::os(ErrorKind::Memory, "memfd", &e))
        };
        read_pages(file, header, path, write, progress)?;
        Ok(Self { layer: Layer::sealed(copy)?, first: 0, length })
    }

    /// Decode the record of a range of memory.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`] if it is not memory, or its pages are not in the file or the base.
    pub(super) fn range(&self, record: &[u8], base: Option<&Snapshot>) -> Result<MemoryRange> {
        let mut reader = Reader::new("range", record);
        let (start, size, read_only) = range_head(&mut reader)?;
        let of_base = base.and_then(|base| {
            base.ranges.iter().find(|range| (range.start, range.image.size()) == (start, size))
        });
        let mut runs: Vec<Run> = Vec::new();
        let mut at = 0;
        while !reader.is_empty() {
            let (first, length, place) = (reader.u64()?, reader.u64()?, reader.u64()?);
            let end = first.checked_add(length).filter(|end| *end <= size);
            let is_whole = first.is_multiple_of(PAGE) && length.is_multiple_of(PAGE);
            let Some(end) = end.filter(|_| first >= at && length > 0 && is_whole) else {
                return Err(bad("range", "its runs of pages are not in order"));
            };
            zeros_up_to(&mut runs, at, first);
            if place == OF_BASE {
                let base = of_base.ok_or_else(|| bad("base", "it does not have that memory"))?;
                runs.extend(base.image.parts((first, end)));
            } else {
                runs.push(self.run((first, end), place)?);
            }
            at = end;
        }
        zeros_up_to(&mut runs, at, size);
        Ok(MemoryRange { start, read_only, image: Image::new(size, runs) })
    }

    /// The run at a place in the file.
    fn run(&self, range: ByteRange, place: u64) -> Result<Run> {
        let end = place.checked_add(range.1 - range.0);
        if !place.is_multiple_of(PAGE) || end.is_none_or(|end| end > self.length) {
            return Err(bad("range", "a run of pages is not in the file"));
        }
        let (layer, offset) = (Some(Arc::clone(&self.layer)), self.first + place);
        Ok(Run { range, layer, offset })
    }
}

/// Start, size and whether it is read-only, of the record of a range of memory.
///
/// # Errors
/// [`ErrorKind::Snapshot`] if the record is too short.
pub fn described(range: &[u8]) -> Result<(u64, u64, bool)> {
    let mut reader = Reader::new("range", range);
    let (start, size, read_only) = (reader.u64()?, reader.u64()?, reader.u64()?);
    Ok((start, size, read_only != 0))
}

/// A range's start, size and flags, checked.
fn range_head(reader: &mut Reader<'_>) -> Result<(u64, u64, bool)> {
    let (start, size) = (reader.u64()?, reader.u64()?);
    let [read_only, zeros @ ..] = reader.take::<8>()?;
    let is_whole = start.is_multiple_of(PAGE) && size.is_multiple_of(PAGE);
    let fits = size > 0 && is_whole && start.checked_add(size).is_some();
    if !fits || size > host_memory() || read_only > 1 || zeros != [0; 7] {
        return Err(bad("range", format!("{size:#x} bytes at {start:#x} are no memory here")));
    }
    Ok((start, size, read_only == 1))
}

fn zeros_up_to(runs: &mut Vec<Run>, at: u64, first: u64) {
    if at < first {
        runs.push(Run { range: (at, first), layer: None, offset: 0 });
    }
}

/// Check that ranges are in order, do not overlap, and fit this host.
pub(super) fn check_ranges(ranges: &[MemoryRange]) -> Result<()> {
    let mut end_of_last = 0;
    let mut all: Vec<ByteRange> = Vec::new();
    for range in ranges {
        // Checked not to wrap when it was decoded.
        let end = range.start + range.image.size();
        if range.start < end_of_last {
            return Err(bad("range", "memory overlaps, or is not in order"));
        }
        all.push((range.start, end));
        end_of_last = end;
    }
    if ranges::size(&all) > host_memory() {
        return Err(bad("range", "it is more memory than this host has"));
    }
    Ok(())
}
