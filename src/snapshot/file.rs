//! Reads the parts of a snapshot's file: header, records and pages, with their checksums. Whatever
//! a file holds, the answer is data or an error: nothing is trusted before it is checked, and
//! nothing larger than the file is allocated. On the caller's thread, which may wait for the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::header::{HEADER, Header, damaged};
use super::state::{Record, RecordKind, Records};
use crate::bytes::{Reader, bad};
use crate::error::{Error, ErrorKind, Result};

fn io_error(path: &Path, error: &io::Error) -> Error {
    let mut failed = Error::os(ErrorKind::Io, "snapshot", error);
    failed.detail = format!("{}: {}", path.display(), failed.detail);
    failed
}

/// The header of a file, and its records.
///
/// # Errors
/// [`ErrorKind::Snapshot`] if the file is damaged or of another version; [`ErrorKind::Io`] if it
/// cannot be read. The contents of records are not checked.
pub fn inspect(path: &Path) -> Result<(Header, Records)> {
    let file = open(path)?;
    let (header, state) = read_state(&file, path)?;
    let mut records = Records::new();
    each_record(&state, |kind, number, bytes| {
        records.push(Record { kind, number, bytes: bytes.to_vec() });
        Ok(())
    })?;
    Ok((header, records))
}

pub(super) fn open(path: &Path) -> Result<File> {
    // Checked before it is opened, because opening can affect a device, and again afterwards, in
    // case the path has changed.
    if path.metadata().map_err(|e| io_error(path, &e))?.is_file() {
        // Opening a FIFO would otherwise wait for a writer.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let file = file.map_err(|e| io_error(path, &e))?;
        if file.metadata().map_err(|e| io_error(path, &e))?.is_file() {
            return Ok(file);
        }
    }
    Err(bad("file", format!("{} is no regular file", path.display())))
}

/// The header, and the state with its checksum checked.
pub(super) fn read_state(file: &File, path: &Path) -> Result<(Header, Vec<u8>)> {
    let length = file.metadata().map_err(|e| io_error(path, &e))?.len();
    let read = |bytes: &mut [u8], at| file.read_exact_at(bytes, at).map_err(|e| io_error(path, &e));
    if length < HEADER as u64 {
        return Err(bad("file", "it is too short for a snapshot"));
    }
    let mut bytes = [0; HEADER];
    read(&mut bytes, 0)?;
    let header = Header::decode(&bytes, length)?;
    // Not longer than the file: `decode` has checked that.
    let mut state = vec![0; usize::try_from(header.pages).unwrap_or(HEADER).saturating_sub(HEADER)];
    read(&mut state, HEADER as u64)?;
    let padding =
        state.split_off(usize::try_from(header.state_length).unwrap_or(0).min(state.len()));
    if crc32fast::hash(&state) != header.state_crc || padding.iter().any(|byte| *byte != 0) {
        return Err(damaged("state"));
    }
    Ok((header, state))
}

/// Call `look` with each record's kind, number and bytes.
pub(super) fn each_record<'a>(
    state: &'a [u8],
    mut look: impl FnMut(RecordKind, u16, &'a [u8]) -> Result<()>,
) -> Result<()> {
    let mut reader = Reader::new("state", state);
    while !reader.is_empty() {
        let (number, of, length) = (reader.u16()?, reader.u16()?, reader.u32()?);
        let bytes = reader.bytes(usize::try_from(length).unwrap_or(usize::MAX))?;
        let Some(kind) = RecordKind::of(number) else {
            return Err(bad("state", format!("it has a record of unknown kind {number:#x}")));
        };
        look(kind, of, bytes)?;
    }
    Ok(())
}

/// Call `piece` with all pages of a file, a part at a time, and check their checksum. `progress`
/// gets the number of bytes read and the total; its error ends the call.
///
/// # Errors
/// [`ErrorKind::Snapshot`] if the checksum is wrong; [`ErrorKind::Io`] if the file cannot be read;
/// any error of `piece` or `progress`.
pub(super) fn read_pages<E: From<Error>>(
    file: &File,
    header: &Header,
    path: &Path,
    mut piece: impl FnMut(&[u8], u64) -> Result<()>,
    mut progress: impl FnMut(u64, u64) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = header.pages;
    while at < header.file_length {
        let most = usize::try_from(header.file_length - at).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..most).unwrap_or(&mut []);
        file.read_exact_at(part, at).map_err(|e| io_error(path, &e))?;
        hasher.update(part);
        piece(part, at - header.pages)?;
        at += most as u64;
        progress(at - header.pages, header.file_length - header.pages)?;
    }
    if hasher.finalize() == header.pages_crc { Ok(()) } else { Err(damaged("pages").into()) }
}
