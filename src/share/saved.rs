//! A session in a snapshot: its numbers, with where each file is in the share and how it is open.
//! Parsed from untrusted bytes; what they name is walked to as for a guest.

use super::entry::{Entry, Kind};
use super::fids::Open;
use super::server::Server;
use super::wire::Errno;
use crate::bytes::{Reader, bad};
use crate::error::Result;

/// In place of the flags of a file that is not open.
const CLOSED: i32 = -1;
const GONE: u32 = u32::MAX;

impl Server {
    /// The session as bytes.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let mut bytes = self.msize.to_le_bytes().to_vec();
        bytes.extend(u32::try_from(self.fids.len()).unwrap_or(0).to_le_bytes());
        for (number, fid) in self.fids.iter() {
            bytes.extend(number.to_le_bytes());
            let flags = fid.open.as_ref().map_or(CLOSED, |open| open.flags);
            bytes.extend(flags.to_le_bytes());
            let entry = fid.entry.as_ref();
            bytes.push(entry.map_or(0, |entry| number_of(entry.kind)));
            match entry.and_then(|entry| self.directory.names_of(entry)) {
                None => bytes.extend(GONE.to_le_bytes()),
                Some(names) => {
                    let path = names.join(&b'/');
                    bytes.extend(u32::try_from(path.len()).unwrap_or(GONE).to_le_bytes());
                    bytes.extend(path);
                }
            }
        }
        bytes
    }

    /// Continue a saved session. What is not there any more, or cannot be opened, answers ESTALE.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Snapshot`] if the bytes are not those of `save`.
    pub fn restore(&mut self, state: &[u8]) -> Result<()> {
        self.reset();
        let mut reader = Reader::new("share", state);
        let (msize, count) = (reader.u32()?, reader.u32()?);
        if !super::server::is_possible(msize) {
            return Err(bad("share", format!("messages of {msize} bytes")));
        }
        self.msize = msize;
        for _ in 0..count {
            let (number, flags) = (reader.u32()?, reader.u32()?.cast_signed());
            let ([kind], length) = (reader.take()?, reader.u32()?);
            let path = if length == GONE {
                None
            } else {
                Some(reader.bytes(usize::try_from(length).unwrap_or(usize::MAX))?)
            };
            self.fids.check_free(number).map_err(|Errno(errno)| {
                bad("share", format!("file {number} cannot be restored: error {errno}"))
            })?;
            let (entry, open) = path.and_then(|path| self.find(path, kind, flags)).unzip();
            self.fids.set(number, entry, open.flatten());
        }
        reader.end()
    }

    fn find(&self, path: &[u8], kind: u8, flags: i32) -> Option<(Entry, Option<Open>)> {
        let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        let entry = self.directory.walk(names).ok()?;
        if number_of(entry.kind) != kind {
            return None;
        }
        let open = match flags {
            CLOSED => None,
            flags => Some(self.directory.open_entry(&entry, flags & !libc::O_TRUNC).ok()?),
        };
        Some((entry, open))
    }
}

fn number_of(kind: Kind) -> u8 {
    match kind {
        Kind::Directory => 1,
        Kind::File => 2,
        Kind::Symlink => 3,
        Kind::Special => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::{Client, Folder};
    use super::super::directory::Options;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_session_continues_from_its_bytes() {
        let folder = Folder::new();
        std::fs::create_dir(folder.path("a")).unwrap();
        for name in ["a/file", "a/other", "gone"] {
            folder.write(name, name.as_bytes());
        }
        let mut client = Client::new(&folder);
        for (fid, names) in [(1, &["a", "file"][..]), (2, &["gone"]), (3, &["a", "other"])] {
            client.fid = fid;
            client.walk(names).unwrap();
            client.open(libc::O_RDWR).unwrap();
        }
        std::fs::rename(folder.path("a"), folder.path("b")).unwrap();
        let saved = client.server.save();
        std::fs::remove_file(folder.path("gone")).unwrap();
        std::fs::remove_file(folder.path("b/other")).unwrap();
        std::fs::create_dir(folder.path("b/other")).unwrap();
        let mut other = Client::new(&folder);
        other.server.restore(&saved).unwrap();
        assert_eq!(other.server.files(), 4);
        other.fid = 1;
        assert_eq!(other.read(0, 100).unwrap(), b"a/file");
        assert_eq!(other.write(0, b"A"), Ok(1));
        for fid in [2, 3] {
            other.fid = fid;
            assert_eq!(other.read(0, 100), Err(libc::ESTALE), "{fid}");
            other.clunk();
        }
        assert_eq!(folder.read("b/file"), b"A/file");
        // It is gone in the next copy too.
        other.server.restore(&client.server.save()).unwrap();
        let again = other.server.save();
        other.server.restore(&again).unwrap();
        assert_eq!(other.server.save(), again);
    }

    #[test]
    fn a_snapshot_does_not_lead_out_of_the_share_or_write_to_it() {
        let folder = Folder::new();
        folder.write("file", b"Hello");
        std::os::unix::fs::symlink("/etc", folder.path("link")).unwrap();
        let options = Options { read_only: true, owner: None };
        let mut client = Client::with(&folder, options);
        for (path, flags) in [
            (&b"../x"[..], CLOSED),
            (b"link/passwd", CLOSED),
            (b"/etc/passwd", CLOSED),
            (b"file", libc::O_RDWR),
            (b"file", libc::O_ACCMODE),
        ] {
            let length = u32::try_from(path.len()).unwrap();
            let head = [4096_u32.to_le_bytes(), 1_u32.to_le_bytes(), 1_u32.to_le_bytes()].concat();
            let flags = flags.to_le_bytes();
            let state = [&head, &flags[..], &[2], &length.to_le_bytes(), path].concat();
            client.server.restore(&state).unwrap();
            client.fid = 1;
            assert_eq!(client.attributes().map(drop), Err(libc::ESTALE), "{path:?}");
        }
        assert_eq!(folder.read("file"), b"Hello");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(state in prop::collection::vec(any::<u8>(), 0..60)) {
            let folder = Folder::new();
            let _ = Client::new(&folder).server.restore(&[&[0, 16, 0, 0][..], &state].concat());
        }
    }
}
