//! The session of a guest with its share: one request in, one reply out. A call may block for as
//! long as the host's file system does. On one thread at a time.

use std::sync::Arc;

use super::directory::Directory;
use super::fids::Fids;
use super::message::{Header, Request, split};
use super::wire::{Answer, Errno, Reply};

/// The longest message that a session may have.
pub const MOST_BYTES: usize = 512 << 10;
/// The least room of a reply: that of an error.
pub const LEAST_ROOM: usize = 11;

/// The shortest limit of messages that a guest may choose.
const LEAST_MSIZE: u32 = 4096;
const MOST_MSIZE: u32 = 512 << 10;
const R_ERROR: u8 = 7;
const NO_TAG: u16 = u16::MAX;

/// See the module.
#[derive(Debug)]
pub struct Server {
    pub(super) directory: Arc<Directory>,
    pub(super) fids: Fids,
    /// The longest message, as the guest has chosen.
    pub(super) msize: u32,
}

impl Server {
    /// A server that no guest has begun a session with.
    #[must_use]
    pub fn new(directory: Arc<Directory>) -> Self {
        Self { directory, fids: Fids::default(), msize: LEAST_MSIZE }
    }

    /// End the session: close all files.
    pub fn reset(&mut self) {
        self.fids.clear();
        self.msize = LEAST_MSIZE;
    }

    /// What it shares.
    #[must_use]
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// How many files the guest has walked to.
    #[must_use]
    pub fn files(&self) -> usize {
        self.fids.len()
    }

    /// The reply to a request, of at most `room` bytes, which are at least [`LEAST_ROOM`].
    #[must_use]
    pub fn answer(&mut self, message: &[u8], room: usize) -> Vec<u8> {
        let Some((header, body)) = split(message) else {
            return error(NO_TAG, Errno(libc::EPROTO));
        };
        // An answer to Tversion is short, and comes before any limit.
        let most = room.min(usize::try_from(self.msize).unwrap_or(room));
        let mut reply = Reply::new(header.tag);
        let done = self.serve(header, body, &mut reply, most);
        match done.map(|()| reply.finish(header.kind | 1)) {
            Ok(reply) if reply.len() <= most => reply,
            Ok(_) => error(header.tag, Errno(libc::EMSGSIZE)),
            Err(number) => error(header.tag, number),
        }
    }

    fn serve(&mut self, header: Header, body: &[u8], reply: &mut Reply, most: usize) -> Answer<()> {
        // What a reply with data has room for: it has a count before it.
        let most = most.saturating_sub(Reply::HEADER + 4);
        let count = |count: u32| usize::try_from(count).unwrap_or(most).min(most);
        let request = Request::parse(header.kind, body)?;
        if self.directory.options.read_only && request.changes() {
            return Err(Errno(libc::EROFS));
        }
        match request {
            Request::Version { msize, version } => self.begin(msize, version, reply),
            Request::Attach { fid, name } => self.attach(fid, name, reply),
            // Requests are served one after the other: the one that it is about has its reply.
            Request::Flush => Ok(()),
            Request::Walk { fid, new, names } => self.walk(fid, new, &names, reply),
            Request::Clunk { fid } => self.fids.remove(fid).map(drop),
            Request::Open { fid, flags } => self.open(fid, flags, reply),
            Request::Create { fid, name, flags, mode } => {
                self.create(fid, &name, (flags, mode), reply)
            }
            Request::Read { fid, offset, count: wanted } => {
                self.read(fid, offset, count(wanted), reply)
            }
            Request::ReadDirectory { fid, offset, count: wanted } => {
                self.read_directory(fid, offset, count(wanted), reply)
            }
            Request::Write { fid, offset, data } => self.write(fid, offset, data, reply),
            Request::Sync { fid, data_only } => self.sync(fid, data_only),
            Request::StatFs { fid } => self.stat_fs(fid, reply),
            Request::GetAttributes { fid, mask } => self.get_attributes(fid, mask, reply),
            Request::ReadLink { fid } => self.read_link(fid, reply),
            Request::Lock { fid, range } => self.lock(fid, range, reply),
            Request::GetLock { fid, range } => self.get_lock(fid, range, reply),
            other => self.change(other, reply),
        }
    }

    /// Tversion: a new session.
    fn begin(&mut self, msize: u32, version: &[u8], reply: &mut Reply) -> Answer<()> {
        self.reset();
        if msize < LEAST_MSIZE {
            return Err(Errno(libc::EMSGSIZE));
        }
        self.msize = msize.min(MOST_MSIZE);
        let is_known = version == b"9P2000.L";
        reply.u32(self.msize).string(if is_known { version } else { b"unknown" });
        Ok(())
    }
}

impl Request<'_> {
    /// Whether it changes anything in the directory. A file that is opened checks by itself.
    fn changes(&self) -> bool {
        matches!(
            self,
            Self::Create { .. }
                | Self::Write { .. }
                | Self::Remove { .. }
                | Self::Rename { .. }
                | Self::RenameAt { .. }
                | Self::SetAttributes { .. }
                | Self::Link { .. }
                | Self::MakeDirectory { .. }
                | Self::MakeNode { .. }
                | Self::Symlink { .. }
                | Self::UnlinkAt { .. }
        )
    }
}

/// Whether a session may have messages of at most so many bytes.
pub(super) fn is_possible(msize: u32) -> bool {
    (LEAST_MSIZE..=MOST_MSIZE).contains(&msize)
}

/// Rlerror.
fn error(tag: u16, number: Errno) -> Vec<u8> {
    let mut reply = Reply::new(tag);
    reply.u32(number.number());
    reply.finish(R_ERROR)
}

#[cfg(test)]
mod tests {
    //! Sessions with guests that do what they must not, on hosts that change files meanwhile.
    //! Covers src/share/client.rs.

    use std::fs;
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::super::client::{Client, Field::*, Folder, request};
    use super::*;

    #[test]
    fn a_session_begins_with_a_version() {
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        client.walk(&[]).unwrap();
        assert_eq!(client.server.files(), 2);
        let reply = client.send(100, &[W(u32::MAX), S("9P2000.u")]).unwrap();
        assert_eq!(reply, [&[0, 0, 8, 0, 7, 0][..], b"unknown"].concat());
        assert_eq!(client.server.files(), 0);
        assert_eq!(client.send(100, &[W(4095), S("9P2000.L")]), Err(libc::EMSGSIZE));
        assert_eq!(client.walk(&[]), Err(libc::EBADF));
        assert_eq!(client.send(104, &[W(0), W(0), S(""), S("etc"), W(0)]), Err(libc::ENOENT));
        assert_eq!(client.send(104, &[W(u32::MAX), W(0), S(""), S(""), W(0)]), Err(libc::EBADF));
    }

    #[test]
    fn what_is_not_supported_says_so() {
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        for kind in [0, 30, 32, 102, 112, 124, 126, 200, 254] {
            assert_eq!(client.send(kind, &[]), Err(libc::EOPNOTSUPP), "{kind}");
        }
        assert_eq!(client.send(108, &[H(3)]), Ok(Vec::new()));
        assert_eq!(client.send(120, &[]), Err(libc::EPROTO));
    }

    #[test]
    fn a_reply_fits_into_its_room() {
        let folder = Folder::new();
        folder.write("file", &[7; 9000]);
        let mut client = Client::new(&folder);
        client.walk(&["file"]).unwrap();
        client.open(libc::O_RDONLY).unwrap();
        let read = request(116, 1, &[W(1), Q(0), W(u32::MAX)]);
        assert_eq!(client.server.answer(&read, 100).len(), 100);
        assert_eq!(client.server.answer(&read, LEAST_ROOM).len(), LEAST_ROOM);
        let attributes = request(24, 1, &[W(1), Q(0)]);
        let reply = client.server.answer(&attributes, 100);
        assert_eq!(reply[7..], libc::EMSGSIZE.to_le_bytes());
        client.server.msize = 5000;
        assert_eq!(client.server.answer(&read, MOST_BYTES).len(), 5000);
        assert_eq!(client.server.answer(&read[..3], 100)[5..7], [255, 255]);
    }

    #[test]
    fn the_file_system_is_described() {
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        assert_eq!(client.send(8, &[W(0)]).unwrap().len(), 60);
        assert_eq!(client.send(22, &[W(0)]), Err(libc::EINVAL), "no symlink");
        client.symlink("link", "over/there").unwrap();
        client.walk(&["link"]).unwrap();
        assert_eq!(client.send(22, &[W(1)]).unwrap(), [&[10, 0][..], b"over/there"].concat());
        assert_eq!(client.send(50, &[W(1), W(0)]), Err(libc::EBADF), "it is not open");
        client.clunk();
        client.create("file", libc::O_RDWR).unwrap();
        assert_eq!(client.send(50, &[W(1), W(1)]), Ok(Vec::new()));
    }

    /// Read files by a path that leads into a trap half of the time.
    fn walk_into_exchanges(client: &mut Client) {
        let (mut read, mut traps) = (0, 0);
        while read < 200 || traps < 200 {
            match client.walk(&["way", "secret"]) {
                Ok(()) => {
                    client.open(libc::O_RDONLY).unwrap();
                    assert_eq!(client.read(0, 100).unwrap(), b"shared");
                    read += 1;
                    client.clunk();
                }
                // It is the symlink: a walk of one name.
                Err(0) => traps += 1,
                Err(number) => assert_eq!(number, libc::ENOENT),
            }
            if client.walk(&["way"]).is_ok() {
                let made = client.send(72, &[W(1), S("made"), W(0o700), W(0)]);
                let removed = client.send(76, &[W(1), S("secret"), W(0x200)]);
                assert!(made.is_ok() || made == Err(libc::EEXIST) || made == Err(libc::ENOTDIR));
                assert_eq!(removed.map(drop), Err(libc::ENOTDIR));
                client.clunk();
            }
        }
    }

    /// The host exchanges a directory of the share, a symlink out of it and another directory, as
    /// fast as it can, while a guest walks, creates, renames and removes by that name.
    #[test]
    fn nothing_outside_is_reached_while_the_host_exchanges_directories() {
        let (folder, outside) = (Folder::new(), Folder::new());
        outside.write("secret", b"secret");
        fs::create_dir(folder.path("real")).unwrap();
        folder.write("real/secret", b"shared");
        std::os::unix::fs::symlink(outside.path(""), folder.path("trap")).unwrap();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Relaxed: only the end matters.
                while !is_over.load(Ordering::Relaxed) {
                    for name in ["real", "trap"] {
                        let _ = fs::rename(folder.path(name), folder.path("way"));
                        let _ = fs::rename(folder.path("way"), folder.path(name));
                    }
                }
            });
            walk_into_exchanges(&mut Client::new(&folder));
            is_over.store(true, Ordering::Relaxed);
        });
        assert_eq!(outside.names(), ["secret"]);
        assert_eq!(outside.read("secret"), b"secret");
    }

    /// The fuzzer's corpus, tests/fuzz/share.
    #[test]
    fn the_corpus_reaches_nothing_outside() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/share");
        let mut count = 0;
        for entry in fs::read_dir(corpus).unwrap() {
            let input = fs::read(entry.unwrap().path()).unwrap();
            let folder = Folder::new();
            folder.write("secret", b"a secret of the host");
            fs::create_dir_all(folder.path("shared/a/b")).unwrap();
            folder.write("shared/file", b"Hello");
            std::os::unix::fs::symlink("..", folder.path("shared/out")).unwrap();
            std::os::unix::fs::symlink("../secret", folder.path("shared/direct")).unwrap();
            let directory = Directory::open(&folder.path("shared"), Default::default()).unwrap();
            let mut server = Server::new(Arc::new(directory));
            let mut left = &input[..];
            while let Some(size) = left.first_chunk().copied().map(u32::from_le_bytes) {
                let (message, rest) = left.split_at((size as usize).clamp(4, left.len()));
                let reply = server.answer(message, MOST_BYTES);
                assert!(!reply.windows(8).any(|found| found == b"a secret"));
                left = rest;
            }
            let saved = server.save();
            server.restore(&saved).unwrap();
            assert_eq!(folder.names(), ["secret", "shared"]);
            assert_eq!(folder.read("secret"), b"a secret of the host");
            count += 1;
        }
        assert!(count > 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn no_message_makes_it_panic(messages in prop::collection::vec(
            (prop::sample::select((0..128_u8).collect::<Vec<_>>()), prop::collection::vec(prop_oneof![0..3_u8, any::<u8>()], 0..60)),
            1..40,
        ), room in LEAST_ROOM..9000) {
            let folder = Folder::new();
            let mut client = Client::new(&folder);
            for (kind, body) in messages {
                let reply = client.server.answer(&request(kind, 1, &[D(&body)]), room);
                prop_assert!((7..=room).contains(&reply.len()));
            }
        }
    }
}
