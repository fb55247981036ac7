//! Requests that walk, open and create files. Only regular files and directories are opened: a
//! device, a fifo or a socket of the host could block, or have effects.

use super::directory::Directory;
use super::entry::{Entry, Kind, qid};
use super::fids::Open;
use super::server::Server;
use super::system;
use super::wire::{Answer, Errno, Name, Qid, Reply};

/// The flags of open(2) that a guest may choose, which 9P2000.L has with the same numbers.
const CHOSEN: i32 = libc::O_ACCMODE | libc::O_TRUNC | libc::O_APPEND | libc::O_DSYNC | libc::O_SYNC;
/// The bits of a mode that a guest may choose: no file runs as another user of the host.
pub(super) const MODE: u32 = 0o1777;
/// How often to look for an existing file that is removed and made again meanwhile.
const ATTEMPTS: usize = 16;

impl Server {
    pub(super) fn attach(&mut self, fid: u32, name: &[u8], reply: &mut Reply) -> Answer<()> {
        if !matches!(name, b"" | b"/") {
            return Err(Errno(libc::ENOENT));
        }
        self.fids.check_free(fid)?;
        let root = self.directory.root.clone();
        reply.qid(root.qid(self.directory.device)?);
        self.fids.set(fid, Some(root), None);
        Ok(())
    }

    /// A walk that ends early has the part that there is in its reply, and sets nothing.
    pub(super) fn walk(
        &mut self,
        fid: u32,
        new: u32,
        names: &[Name],
        reply: &mut Reply,
    ) -> Answer<()> {
        let mut entry = self.fids.entry(fid)?.clone();
        if new != fid {
            self.fids.check_free(new)?;
        }
        let mut qids: Vec<Qid> = Vec::new();
        for name in names {
            let step = entry.walk(name).and_then(|found| {
                let qid = found.qid(self.directory.device)?;
                Ok((found, qid))
            });
            match step {
                Ok((found, qid)) => {
                    entry = found;
                    qids.push(qid);
                }
                Err(number) if qids.is_empty() => return Err(number),
                Err(_) => break,
            }
        }
        reply.u16(u16::try_from(qids.len()).unwrap_or(0));
        qids.iter().for_each(|qid| {
            reply.qid(*qid);
        });
        let moves = new != fid || !names.is_empty();
        if qids.len() == names.len() && moves {
            self.fids.set(new, Some(entry), None);
        }
        Ok(())
    }

    pub(super) fn open(&mut self, fid: u32, flags: u32, reply: &mut Reply) -> Answer<()> {
        let found = self.fids.get(fid)?;
        if found.open.is_some() {
            return Err(Errno(libc::EBADF));
        }
        let entry = found.entry()?.clone();
        if flags.cast_signed() & libc::O_DIRECTORY != 0 {
            entry.directory()?;
        }
        let open = self.directory.open_entry(&entry, flags.cast_signed())?;
        reply.qid(entry.qid(self.directory.device)?).u32(0);
        self.fids.get_mut(fid)?.open = Some(open);
        Ok(())
    }

    /// Tlcreate: the number then stands for the new file, which is open.
    pub(super) fn create(
        &mut self,
        fid: u32,
        name: &Name,
        (flags, mode): (u32, u32),
        reply: &mut Reply,
    ) -> Answer<()> {
        let found = self.fids.get(fid)?;
        if found.open.is_some() {
            return Err(Errno(libc::EBADF));
        }
        let parent = found.entry()?.clone();
        let (entry, open) = self.directory.create(&parent, name, flags.cast_signed(), mode)?;
        reply.qid(qid(&entry.stat()?, self.directory.device)).u32(0);
        self.fids.set(fid, Some(entry), Some(open));
        Ok(())
    }
}

impl Directory {
    /// Open a file for reading or writing.
    pub(super) fn open_entry(&self, entry: &Entry, flags: i32) -> Answer<Open> {
        let mut flags = flags & CHOSEN;
        let writes = flags & (libc::O_ACCMODE | libc::O_TRUNC) != libc::O_RDONLY;
        match entry.kind {
            Kind::Directory if writes => return Err(Errno(libc::EISDIR)),
            Kind::Directory => flags = libc::O_RDONLY | libc::O_DIRECTORY,
            Kind::File => {}
            Kind::Symlink => return Err(Errno(libc::ELOOP)),
            Kind::Special => return Err(Errno(libc::EACCES)),
        }
        if flags & libc::O_ACCMODE == libc::O_ACCMODE {
            return Err(Errno(libc::EINVAL));
        }
        if writes {
            self.check_writable()?;
        }
        let file = system::reopen(&self.proc, &entry.fd, flags)?;
        Ok(Open { file, flags: flags & !libc::O_TRUNC })
    }

    /// Create a file and open it; or, unless the guest refuses that, open the one that is there.
    fn create(&self, parent: &Entry, name: &Name, flags: i32, mode: u32) -> Answer<(Entry, Open)> {
        let directory = parent.directory()?;
        if flags & libc::O_ACCMODE == libc::O_ACCMODE {
            return Err(Errno(libc::EINVAL));
        }
        let chosen = flags & CHOSEN & !libc::O_TRUNC;
        let new = chosen | libc::O_CREAT | libc::O_EXCL;
        for _ in 0..ATTEMPTS {
            match system::open_beneath(directory, name.as_c_str(), new, mode & MODE) {
                Ok(file) => {
                    let named = system::reopen(&self.proc, &file, libc::O_PATH)?;
                    return Ok((Entry::new(named)?, Open { file, flags: chosen }));
                }
                Err(Errno(libc::EEXIST)) if flags & libc::O_EXCL == 0 => {}
                Err(number) => return Err(number),
            }
            match parent.walk(name) {
                Ok(entry) => {
                    let open = self.open_entry(&entry, flags)?;
                    return Ok((entry, open));
                }
                Err(Errno(libc::ENOENT)) => {}
                Err(number) => return Err(number),
            }
        }
        Err(Errno(libc::EBUSY))
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::{Client, Folder};

    #[test]
    fn what_is_neither_a_file_nor_a_directory_is_not_opened() {
        let folder = Folder::new();
        let path = std::ffi::CString::new(folder.path("fifo").to_str().unwrap()).unwrap();
        // SAFETY: the path ends with NUL.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        std::os::unix::fs::symlink("/etc/passwd", folder.path("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.path("socket")).unwrap();
        let mut client = Client::new(&folder);
        for (name, flags, number) in [
            ("fifo", libc::O_RDONLY, libc::EACCES),
            ("fifo", libc::O_WRONLY, libc::EACCES),
            ("socket", libc::O_RDWR, libc::EACCES),
            ("link", libc::O_RDONLY, libc::ELOOP),
        ] {
            assert_eq!(client.walk(&[name]), Ok(()));
            assert_eq!(client.open(flags), Err(number), "{name}");
            client.clunk();
            assert_eq!(client.create(name, flags | libc::O_CREAT), Err(number), "{name}");
        }
    }

    #[test]
    fn a_file_is_created_once_and_opened_after() {
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        assert_eq!(client.create("new", libc::O_RDWR), Ok(()));
        assert_eq!(client.write(0, b"Hello"), Ok(5));
        client.clunk();
        assert_eq!(client.create("new", libc::O_RDWR | libc::O_EXCL), Err(libc::EEXIST));
        assert_eq!(client.create("new", libc::O_WRONLY | libc::O_APPEND), Ok(()));
        assert_eq!(client.write(0, b", you"), Ok(5));
        client.clunk();
        assert_eq!(folder.read("new"), b"Hello, you");
        assert_eq!(client.create("new", libc::O_WRONLY | libc::O_TRUNC), Ok(()));
        client.clunk();
        assert_eq!(folder.read("new"), b"");
        assert_eq!(client.create("x", libc::O_ACCMODE), Err(libc::EINVAL));
    }

    #[test]
    fn no_file_runs_as_another_user() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        client.mode = 0o6755;
        assert_eq!(client.create("program", libc::O_RDWR), Ok(()));
        let mode = std::fs::metadata(folder.path("program")).unwrap().permissions().mode();
        assert_eq!(mode & 0o6000, 0);
    }

    #[test]
    fn a_walk_goes_as_far_as_it_can() {
        let folder = Folder::new();
        std::fs::create_dir_all(folder.path("a/b")).unwrap();
        let mut client = Client::new(&folder);
        assert_eq!(client.walk(&["a", "b"]), Ok(()));
        client.clunk();
        assert_eq!(client.walk(&["a", "missing"]), Err(0), "it sets nothing");
        assert_eq!(client.walk(&["missing", "a"]), Err(libc::ENOENT));
        assert_eq!(client.walk(&["a", ".."]), Err(libc::EINVAL));
        assert_eq!(client.walk(&[".."]), Err(libc::EINVAL));
        assert_eq!(client.walk(&["a/b"]), Err(libc::EINVAL));
        assert_eq!(client.walk(&["a\0b"]), Err(libc::EINVAL));
        assert_eq!(client.walk(&[]), Ok(()));
    }
}
