//! Requests that make, change, rename and remove files.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use super::entry::{Entry, Kind, qid};
use super::message::{Attributes, Request, Time};
use super::open::MODE;
use super::server::Server;
use super::system;
use super::wire::{Answer, Errno, Name, Reply};

/// That an entry to remove is a directory.
const REMOVE_DIRECTORY: u32 = 0x200;

impl Server {
    pub(super) fn change(&mut self, request: Request<'_>, reply: &mut Reply) -> Answer<()> {
        match request {
            Request::MakeDirectory { fid, name, mode } => {
                let directory = self.fids.entry(fid)?.directory()?;
                system::make_directory(directory, name.as_c_str(), mode & MODE)?;
                self.made(directory, &name, reply)
            }
            Request::MakeNode { fid, name, mode } => self.make_node(fid, &name, mode, reply),
            Request::Symlink { fid, name, target } => {
                let directory = self.fids.entry(fid)?.directory()?;
                let target = CString::new(target).map_err(|_| Errno(libc::EINVAL))?;
                system::make_symlink(directory, name.as_c_str(), &target)?;
                self.made(directory, &name, reply)
            }
            Request::Link { directory, fid, name } => {
                let (to, from) = (self.fids.entry(directory)?, self.fids.entry(fid)?);
                let proc = &self.directory.proc;
                system::make_link(proc, &from.fd, to.directory()?, name.as_c_str())
            }
            Request::UnlinkAt { fid, name, flags } => {
                let directory = self.fids.entry(fid)?.directory()?;
                system::unlink(directory, name.as_c_str(), flags & REMOVE_DIRECTORY != 0)
            }
            Request::Remove { fid } => self.remove(fid),
            Request::Rename { fid, directory, name } => {
                let (parent, old) = self.directory.place_of(self.fids.entry(fid)?)?;
                let to = self.fids.entry(directory)?;
                rename(&parent, &old, to, &name)
            }
            Request::RenameAt { from, old, to, new } => {
                rename(self.fids.entry(from)?, &old, self.fids.entry(to)?, &new)
            }
            Request::SetAttributes { fid, attributes } => self.set_attributes(fid, attributes),
            _ => Err(Errno(libc::EOPNOTSUPP)),
        }
    }

    /// The reply about what was just made.
    fn made(&self, directory: &OwnedFd, name: &Name, reply: &mut Reply) -> Answer<()> {
        let stat = system::stat_at(directory, name.as_c_str())?;
        reply.qid(qid(&stat, self.directory.device));
        Ok(())
    }

    /// Only regular files: a guest makes no devices, fifos or sockets on the host.
    fn make_node(&self, fid: u32, name: &Name, mode: u32, reply: &mut Reply) -> Answer<()> {
        if Kind::of(mode) != Kind::File && mode & libc::S_IFMT != 0 {
            return Err(Errno(libc::EPERM));
        }
        let directory = self.fids.entry(fid)?.directory()?;
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
        let file = system::open_beneath(directory, name.as_c_str(), flags, mode & MODE)?;
        reply.qid(qid(&system::stat(&file)?, self.directory.device));
        Ok(())
    }

    /// Tremove: the number is free afterwards, whether it succeeds or not.
    fn remove(&mut self, fid: u32) -> Answer<()> {
        let removed = self.fids.remove(fid)?;
        let entry = removed.entry()?;
        let (parent, name) = self.directory.place_of(entry)?;
        system::unlink(parent.directory()?, name.as_c_str(), entry.kind == Kind::Directory)
    }

    fn set_attributes(&self, fid: u32, new: Attributes) -> Answer<()> {
        let found = self.fids.get(fid)?;
        let (entry, proc) = (found.entry()?, &self.directory.proc);
        if let Some(mode) = new.mode {
            if entry.kind == Kind::Symlink {
                return Err(Errno(libc::EOPNOTSUPP));
            }
            system::set_mode(proc, &entry.fd, mode & MODE)?;
        }
        self.set_owner(entry, new.uid, new.gid)?;
        if let Some(size) = new.size {
            match &found.open {
                Some(open) if open.is_writable() => system::set_size(&open.file, size)?,
                _ => {
                    let open = self.directory.open_entry(entry, libc::O_WRONLY)?;
                    system::set_size(&open.file, size)?;
                }
            }
        }
        if new.accessed.is_some() || new.modified.is_some() {
            let times = [timespec(new.accessed)?, timespec(new.modified)?];
            system::set_times(proc, &entry.fd, times)?;
        }
        Ok(())
    }

    /// If the guest sees another owner than the host's, it cannot change it.
    fn set_owner(&self, entry: &Entry, uid: Option<u32>, gid: Option<u32>) -> Answer<()> {
        match self.directory.options.owner {
            _ if uid.is_none() && gid.is_none() => Ok(()),
            None => system::set_owner(&entry.fd, uid, gid),
            Some((own_uid, own_gid))
                if uid.is_none_or(|uid| uid == own_uid) && gid.is_none_or(|gid| gid == own_gid) =>
            {
                Ok(())
            }
            Some(_) => Err(Errno(libc::EPERM)),
        }
    }
}

fn rename(from: &Entry, old: &Name, to: &Entry, new: &Name) -> Answer<()> {
    system::rename(from.directory()?, old.as_c_str(), to.directory()?, new.as_c_str())
}

fn timespec(time: Option<Time>) -> Answer<libc::timespec> {
    Ok(match time {
        None => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
        Some(Time::Now) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
        Some(Time::At { seconds, nanoseconds }) => libc::timespec {
            tv_sec: seconds,
            // The two numbers with a meaning of their own are larger.
            tv_nsec: i64::try_from(nanoseconds)
                .ok()
                .filter(|nanoseconds| *nanoseconds < 1_000_000_000)
                .ok_or(Errno(libc::EINVAL))?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::client::{Client, Folder};
    use super::super::directory::Options;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn files_are_made_renamed_and_removed() {
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        assert_eq!(client.make_directory("a"), Ok(()));
        assert_eq!(client.make_directory("a"), Err(libc::EEXIST));
        assert_eq!(client.make_node("file", libc::S_IFREG | 0o640), Ok(()));
        assert_eq!(client.symlink("link", "/etc/passwd"), Ok(()));
        assert_eq!(client.link("file", "second"), Ok(()));
        assert_eq!(std::fs::metadata(folder.path("second")).unwrap().nlink(), 2);
        assert_eq!(client.link("link", "other link"), Ok(()));
        assert_eq!(
            std::fs::read_link(folder.path("other link")).unwrap().to_str(),
            Some("/etc/passwd")
        );
        assert_eq!(client.rename_at("second", "third"), Ok(()));
        assert_eq!(client.rename("third", "fourth"), Ok(()));
        assert_eq!(client.unlink("fourth", 0), Ok(()));
        assert_eq!(client.unlink("a", 0), Err(libc::EISDIR));
        assert_eq!(client.unlink("a", 0x200), Ok(()));
        assert_eq!(client.remove("link"), Ok(()));
        assert_eq!(client.remove("other link"), Ok(()));
        assert_eq!(folder.names(), ["file"]);
    }

    #[test]
    fn a_guest_makes_no_devices() {
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFDIR] {
            assert_eq!(client.make_node("node", kind | 0o600), Err(libc::EPERM));
        }
        assert_eq!(folder.names(), Vec::<String>::new());
    }

    #[test]
    fn attributes_are_set() {
        let folder = Folder::new();
        folder.write("file", b"0123456789");
        let mut client = Client::new(&folder);
        client.walk(&["file"]).unwrap();
        assert_eq!(client.set(1, 0o6751, 0), Ok(()));
        assert_eq!(client.set(8, 0, 4), Ok(()));
        assert_eq!(client.set(0x1b0, 0, 0), Ok(()));
        let found = std::fs::metadata(folder.path("file")).unwrap();
        assert_eq!((found.permissions().mode() & 0o7777, found.len()), (0o751, 4));
        assert_eq!((found.atime(), found.mtime()), (7, 9));
        assert_eq!(client.set(8, 0, u64::MAX), Err(libc::EFBIG));
        for (owner, said) in [((0, 0), Ok(())), ((1, 0), Err(libc::EPERM))] {
            let options = Options { read_only: false, owner: Some(owner) };
            let mut client = Client::with(&folder, options);
            client.walk(&["file"]).unwrap();
            assert_eq!(client.owner(), owner);
            assert_eq!(client.set(6, 0, 0), said, "only the owner that it sees already");
        }
    }

    #[test]
    fn a_share_for_reading_is_not_changed() {
        let folder = Folder::new();
        folder.write("file", b"Hello");
        let mut client = Client::with(&folder, Options { read_only: true, owner: None });
        let refused = Err(libc::EROFS);
        assert_eq!(client.make_directory("a"), refused);
        assert_eq!(client.make_node("a", libc::S_IFREG), refused);
        assert_eq!(client.symlink("a", "b"), refused);
        assert_eq!(client.link("file", "a"), refused);
        assert_eq!(client.rename_at("file", "a"), refused);
        assert_eq!(client.rename("file", "a"), refused);
        assert_eq!(client.unlink("file", 0), refused);
        assert_eq!(client.remove("file"), refused);
        assert_eq!(client.create("a", libc::O_RDONLY), refused);
        client.walk(&["file"]).unwrap();
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
            assert_eq!(client.open(flags), refused);
        }
        assert_eq!(client.set(1, 0o777, 0), refused);
        assert_eq!(client.open(libc::O_RDONLY), Ok(()));
        assert_eq!(client.write(0, b"x").map(drop), refused);
        assert_eq!(client.read(0, 9).unwrap(), b"Hello");
        assert_eq!(folder.names(), ["file"]);
    }
}
