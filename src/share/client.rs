//! A guest's side of a session, for tests: a folder to share, and requests by name.

use std::path::PathBuf;
use std::sync::Arc;

use vmm_sys_util::tempdir::TempDir;

use super::directory::{Directory, Options};
use super::server::{MOST_BYTES, Server};

/// A folder that ends with the test.
pub(super) struct Folder(TempDir);

impl Folder {
    pub(super) fn new() -> Self {
        let prefix = std::env::temp_dir().join("pyvmm-share-");
        Self(TempDir::new_with_prefix(prefix).unwrap())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.as_path().join(name)
    }

    pub(super) fn write(&self, name: &str, data: &[u8]) {
        std::fs::write(self.path(name), data).unwrap();
    }

    pub(super) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    pub(super) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("")).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// A field of a request.
pub(super) enum Field<'a> {
    B(u8),
    S(&'a str),
    H(u16),
    W(u32),
    Q(u64),
    D(&'a [u8]),
}

use Field::{B, D, H, Q, S, W};

/// A request as bytes.
pub(super) fn request(kind: u8, tag: u16, fields: &[Field<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    for field in fields {
        match field {
            B(value) => body.push(*value),
            S(value) => {
                body.extend(u16::try_from(value.len()).unwrap().to_le_bytes());
                body.extend(value.as_bytes());
            }
            H(value) => body.extend(value.to_le_bytes()),
            W(value) => body.extend(value.to_le_bytes()),
            Q(value) => body.extend(value.to_le_bytes()),
            D(value) => body.extend(*value),
        }
    }
    let size = u32::try_from(7 + body.len()).unwrap().to_le_bytes();
    [&size[..], &[kind], &tag.to_le_bytes(), &body].concat()
}

/// What a request comes to; an error is its number.
pub(super) type Said<T> = Result<T, i32>;

/// A client that has attached to the root as number 0.
pub(super) struct Client {
    pub(super) server: Server,
    /// The number that requests are about.
    pub(super) fid: u32,
    /// The mode of what is created.
    pub(super) mode: u32,
}

/// A number that is free between requests.
const SPARE: u32 = 99;

impl Client {
    pub(super) fn new(folder: &Folder) -> Self {
        Self::with(folder, Options::default())
    }

    pub(super) fn with(folder: &Folder, options: Options) -> Self {
        let directory = Arc::new(Directory::open(&folder.path(""), options).unwrap());
        let mut client = Self { server: Server::new(directory), fid: 1, mode: 0o644 };
        client.send(100, &[W(1 << 20), S("9P2000.L")]).unwrap();
        client.send(104, &[W(0), W(u32::MAX), S(""), S(""), W(0)]).unwrap();
        client
    }

    /// The body of the reply.
    pub(super) fn send(&mut self, kind: u8, fields: &[Field<'_>]) -> Said<Vec<u8>> {
        let reply = self.server.answer(&request(kind, 7, fields), MOST_BYTES);
        assert_eq!(u32::from_le_bytes(reply[..4].try_into().unwrap()) as usize, reply.len());
        assert_eq!(reply[5..7], [7, 0]);
        if reply[4] == 7 {
            return Err(i32::from_le_bytes(reply[7..].try_into().unwrap()));
        }
        assert_eq!(reply[4], kind + 1);
        Ok(reply[7..].to_vec())
    }

    fn walk_to(&mut self, fid: u32, names: &[&str]) -> Said<()> {
        let count = u16::try_from(names.len()).unwrap();
        let mut fields = vec![W(0), W(fid), H(count)];
        fields.extend(names.iter().map(|name| S(name)));
        let reply = self.send(110, &fields)?;
        // Fewer names than were asked for.
        if reply[..2] == count.to_le_bytes() { Ok(()) } else { Err(0) }
    }

    pub(super) fn walk(&mut self, names: &[&str]) -> Said<()> {
        self.walk_to(self.fid, names)
    }

    pub(super) fn clunk(&mut self) {
        self.send(120, &[W(self.fid)]).unwrap();
    }

    pub(super) fn open(&mut self, flags: i32) -> Said<()> {
        self.send(12, &[W(self.fid), W(flags.cast_unsigned())]).map(drop)
    }

    pub(super) fn create(&mut self, name: &str, flags: i32) -> Said<()> {
        self.walk(&[])?;
        let fields = [W(self.fid), S(name), W(flags.cast_unsigned()), W(self.mode), W(0)];
        let created = self.send(14, &fields).map(drop);
        if created.is_err() {
            self.clunk();
        }
        created
    }

    pub(super) fn read(&mut self, offset: u64, count: u32) -> Said<Vec<u8>> {
        self.send(116, &[W(self.fid), Q(offset), W(count)]).map(|reply| reply[4..].to_vec())
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Said<u32> {
        let count = u32::try_from(data.len()).unwrap();
        let reply = self.send(118, &[W(self.fid), Q(offset), W(count), D(data)])?;
        Ok(u32::from_le_bytes(reply[..].try_into().unwrap()))
    }

    pub(super) fn read_directory(&mut self, offset: u64, count: u32) -> Said<Vec<u8>> {
        self.send(40, &[W(self.fid), Q(offset), W(count)]).map(|reply| reply[4..].to_vec())
    }

    /// The names and numbers of all entries, read in pieces of so many bytes.
    pub(super) fn entries(&mut self, count: u32) -> Vec<(String, u64)> {
        let (mut found, mut offset) = (Vec::new(), 0);
        loop {
            let piece = self.read_directory(offset, count).unwrap();
            assert!(piece.len() <= count as usize);
            if piece.is_empty() {
                return found;
            }
            let mut left = &piece[..];
            while !left.is_empty() {
                let word = |at: usize| u64::from_le_bytes(left[at..at + 8].try_into().unwrap());
                let length = usize::from(u16::from_le_bytes([left[22], left[23]]));
                let name = String::from_utf8(left[24..24 + length].to_vec()).unwrap();
                found.push((name, word(5)));
                offset = word(13);
                left = &left[24 + length..];
            }
        }
    }

    pub(super) fn attributes(&mut self) -> Said<Vec<u8>> {
        self.send(24, &[W(self.fid), Q(u64::MAX)])
    }

    pub(super) fn owner(&mut self) -> (u32, u32) {
        let reply = self.attributes().unwrap();
        let word = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().unwrap());
        (word(25), word(29))
    }

    pub(super) fn make_directory(&mut self, name: &str) -> Said<()> {
        self.send(72, &[W(0), S(name), W(0o755), W(0)]).map(drop)
    }

    pub(super) fn make_node(&mut self, name: &str, mode: u32) -> Said<()> {
        self.send(18, &[W(0), S(name), W(mode), W(0), W(0), W(0)]).map(drop)
    }

    pub(super) fn symlink(&mut self, name: &str, target: &str) -> Said<()> {
        self.send(16, &[W(0), S(name), S(target), W(0)]).map(drop)
    }

    /// A request about an entry of the root, by a number that is free afterwards.
    fn about(&mut self, name: &str, ask: impl FnOnce(&mut Self) -> Said<Vec<u8>>) -> Said<()> {
        self.walk_to(SPARE, &[name])?;
        let said = ask(self).map(drop);
        let _ = self.send(120, &[W(SPARE)]);
        said
    }

    pub(super) fn link(&mut self, old: &str, new: &str) -> Said<()> {
        self.about(old, |client| client.send(70, &[W(0), W(SPARE), S(new)]))
    }

    pub(super) fn rename(&mut self, old: &str, new: &str) -> Said<()> {
        self.about(old, |client| client.send(20, &[W(SPARE), W(0), S(new)]))
    }

    pub(super) fn remove(&mut self, name: &str) -> Said<()> {
        self.about(name, |client| client.send(122, &[W(SPARE)]))
    }

    pub(super) fn rename_at(&mut self, old: &str, new: &str) -> Said<()> {
        self.send(74, &[W(0), S(old), W(0), S(new)]).map(drop)
    }

    pub(super) fn unlink(&mut self, name: &str, flags: u32) -> Said<()> {
        self.send(76, &[W(0), S(name), W(flags)]).map(drop)
    }

    /// Set attributes; the times are 7 and 9 seconds.
    pub(super) fn set(&mut self, valid: u32, mode: u32, size: u64) -> Said<()> {
        let head = [W(self.fid), W(valid), W(mode), W(0), W(0), Q(size)];
        let fields: Vec<_> = head.into_iter().chain([Q(7), Q(0), Q(9), Q(0)]).collect();
        self.send(26, &fields).map(drop)
    }

    pub(super) fn lock(&mut self, kind: u8, start: u64, length: u64) -> Said<u8> {
        let fields = [W(self.fid), B(kind), W(1), Q(start), Q(length), W(5), S("guest")];
        self.send(52, &fields).map(|reply| reply[0])
    }

    pub(super) fn get_lock(&mut self, kind: u8, start: u64, length: u64) -> Said<(u8, u64, u64)> {
        let fields = [W(self.fid), B(kind), Q(start), Q(length), W(5), S("guest")];
        let reply = self.send(54, &fields)?;
        let word = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
        Ok((reply[0], word(1), word(9)))
    }
}
