//! Writes a snapshot's file; `new_file.rs` puts it in its place. On the caller's thread, which may
//! wait for the disk.

use std::path::Path;

use super::header::{HEADER, Header, MAX_STATE, OF_BASE};
use super::host::Host;
use super::new_file::NewFile;
use super::plan::{Plan, copy};
use super::snapshot::Snapshot;
use super::state::{Record, RecordKind};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::memory::{MemoryRange, ranges};

/// How many bytes are written at a time.
const CHUNK: u64 = 1 << 20;

impl Snapshot {
    /// Write it to a file. With a base, only pages that differ from the base's are written, and
    /// loading needs the base. `progress` gets the number of bytes written and the total; its error
    /// ends the save.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the file cannot be written or is not a regular file;
    /// [`ErrorKind::Snapshot`] if the base's memory has another size, or the state is larger than a
    /// file can hold; any error of `progress`. An existing file of that name is unchanged then.
    pub fn save<E: From<Error>>(
        &self,
        path: &Path,
        base: Option<&Self>,
        mut progress: impl FnMut(u64, u64) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let plans = self.plans(base)?;
        let total = plans.iter().map(|plan| ranges::size(&plan.stored)).sum();
        let state = self.encode(&plans)?;
        if state.len() as u64 > MAX_STATE {
            let detail = format!("{} bytes, where a file has {MAX_STATE} at most", state.len());
            return Err(Error::new(ErrorKind::Snapshot, "state", detail).into());
        }
        let pages = (HEADER as u64 + state.len() as u64).next_multiple_of(PAGE);
        let new = NewFile::to_replace(path)?;
        let (file_length, pages_crc) =
            write_pages(&new, &plans, pages, |at| progress(at - pages, total))?;
        let header = Header {
            file_length,
            state_length: state.len() as u64,
            pages,
            state_crc: crc32fast::hash(&state),
            pages_crc,
            id: self.id,
            base: base.map_or([0; 16], |base| base.id),
        };
        new.write(&state, HEADER as u64)?;
        new.write(&header.encode(), 0)?;
        // Without pages the file would end with the state, before the end of its page.
        new.set_length(file_length)?;
        Ok(new.replace()?)
    }

    fn plans(&self, base: Option<&Self>) -> Result<Vec<Plan>> {
        self.ranges.iter().try_for_each(|range| range.image.check())?;
        let of_base = |range: &MemoryRange| {
            let Some(base) = base else { return Ok(None) };
            let size = range.image.size();
            let same = |r: &&MemoryRange| (r.start, r.image.size()) == (range.start, size);
            let found = base.ranges.iter().find(same).map(|range| range.image.clone());
            let detail = "its memory is not that of this snapshot";
            found.map(Some).ok_or_else(|| Error::new(ErrorKind::Snapshot, "base", detail))
        };
        self.ranges.iter().map(|range| Plan::of(&range.image, of_base(range)?.as_ref())).collect()
    }

    /// The records, with the place of each page in the file.
    fn encode(&self, plans: &[Plan]) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut put = |kind: RecordKind, number: u16, bytes: &[u8]| {
            all.extend((kind as u16).to_le_bytes());
            all.extend(number.to_le_bytes());
            all.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            all.extend(bytes);
        };
        put(RecordKind::Machine, 0, &self.spec.encode());
        let host = match &self.host {
            Some(host) => host,
            None => Host::current()?,
        };
        put(RecordKind::Host, 0, &host.encode());
        let records = self.vcpus.iter().flatten().chain(&self.chips);
        records.for_each(|Record { kind, number, bytes }| put(*kind, *number, bytes));
        self.devices.iter().for_each(|device| put(RecordKind::Device, 0, &device.encode()));
        self.virtio.iter().for_each(|device| put(RecordKind::Virtio, 0, &device.encode()));
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
            put(RecordKind::Range, 0, &bytes);
        }
        Ok(all)
    }
}

/// Write the pages of all ranges, from an offset on; returns their end and checksum. `written` is
/// called with the end of each part.
fn write_pages<E: From<Error>>(
    file: &NewFile,
    plans: &[Plan],
    mut at: u64,
    mut written: impl FnMut(u64) -> std::result::Result<(), E>,
) -> std::result::Result<(u64, u32), E> {
    let (mut crc, mut piece) = (crc32fast::Hasher::new(), Vec::new());
    for plan in plans {
        let mapping = plan.image.mapping()?;
        for (start, end) in &plan.stored {
            for first in (*start..*end).step_by(1 << 20) {
                let last = (first + CHUNK).min(*end);
                copy(mapping, (first, last), &mut piece)?;
                crc.update(&piece);
                file.write(&piece, at)?;
                at += last - first;
                written(at)?;
            }
        }
    }
    Ok((at, crc.finalize()))
}
