//! A file of the share, held by a descriptor that only names it (`O_PATH`): a walk from a directory
//! to an entry, and what the guest learns of it. Nothing is opened for reading or writing here.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::system;
use super::wire::{Answer, Errno, Name, Qid};

const QID_DIRECTORY: u8 = 0x80;
const QID_SYMLINK: u8 = 0x02;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
    Symlink,
    /// A device, a fifo or a socket, which is never opened.
    Special,
}

impl Kind {
    pub(super) fn of(mode: u32) -> Self {
        match mode & libc::S_IFMT {
            libc::S_IFDIR => Self::Directory,
            libc::S_IFREG => Self::File,
            libc::S_IFLNK => Self::Symlink,
            _ => Self::Special,
        }
    }

    pub(super) fn qid_bits(self) -> u8 {
        match self {
            Self::Directory => QID_DIRECTORY,
            Self::Symlink => QID_SYMLINK,
            Self::File | Self::Special => 0,
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) kind: Kind,
}

impl Entry {
    /// The file of an `O_PATH` descriptor.
    pub(super) fn new(fd: OwnedFd) -> Answer<Self> {
        let kind = Kind::of(system::stat(&fd)?.st_mode);
        Ok(Self { fd: Arc::new(fd), kind })
    }

    /// The descriptor of a directory.
    pub(super) fn directory(&self) -> Answer<&OwnedFd> {
        if self.kind == Kind::Directory { Ok(&self.fd) } else { Err(Errno(libc::ENOTDIR)) }
    }

    /// An entry of this directory.
    pub(super) fn walk(&self, name: &Name) -> Answer<Self> {
        let fd = system::open_beneath(self.directory()?, name.as_c_str(), libc::O_PATH, 0)?;
        Self::new(fd)
    }

    pub(super) fn stat(&self) -> Answer<libc::stat> {
        system::stat(&self.fd)
    }

    pub(super) fn qid(&self, own_device: u64) -> Answer<Qid> {
        self.stat().map(|stat| qid(&stat, own_device))
    }

    /// Whether both are the same file.
    pub(super) fn is(&self, stat: &libc::stat) -> bool {
        self.stat().is_ok_and(|own| (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino))
    }
}

/// What identifies a file to the guest.
pub(super) fn qid(stat: &libc::stat, own_device: u64) -> Qid {
    let parts = [stat.st_mtime, stat.st_mtime_nsec, stat.st_size];
    let mixed = parts.into_iter().fold(0_u64, |mixed, part| {
        mixed.rotate_left(21).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ part.cast_unsigned()
    });
    Qid {
        kind: Kind::of(stat.st_mode).qid_bits(),
        version: u32::try_from((mixed ^ mixed >> 32) & 0xffff_ffff).unwrap_or(0),
        path: qid_path(stat.st_dev, stat.st_ino, own_device),
    }
}

/// The number of a file: its inode's, except on another file system that is mounted in the share.
pub(super) fn qid_path(device: u64, inode: u64, own_device: u64) -> u64 {
    inode ^ (device ^ own_device).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::super::system::open_path;
    use super::*;

    #[test]
    fn an_entry_is_reached_from_its_directory_only() {
        let root = open_path(c"/proc/self", libc::O_PATH | libc::O_DIRECTORY).unwrap();
        let root = Entry::new(root).unwrap();
        let status = root.walk(&Name::new(b"status").unwrap()).unwrap();
        assert_eq!((root.kind, status.kind), (Kind::Directory, Kind::File));
        assert_eq!(status.walk(&Name::new(b"x").unwrap()).map(drop), Err(Errno(libc::ENOTDIR)));
        let link = root.walk(&Name::new(b"cwd").unwrap()).unwrap();
        assert_eq!(link.kind, Kind::Symlink);
        assert_eq!(link.walk(&Name::new(b"src").unwrap()).map(drop), Err(Errno(libc::ENOTDIR)));
        let own = root.stat().unwrap().st_dev;
        assert_eq!(status.qid(own).unwrap().path, status.stat().unwrap().st_ino);
        assert!(status.is(&status.stat().unwrap()) && !status.is(&root.stat().unwrap()));
    }

    #[test]
    fn files_of_other_file_systems_have_other_numbers() {
        assert_eq!(qid_path(5, 7, 5), 7);
        assert_ne!(qid_path(6, 7, 5), 7);
    }
}
