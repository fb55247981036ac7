//! The table of the files that a guest has walked to and opened, by its numbers. Bounded by the
//! descriptors that the process may have.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::entry::Entry;
use super::system;
use super::wire::{Answer, Errno};

/// The number that stands for no file.
const NO_FID: u32 = u32::MAX;
/// The most files, if the process may have so many descriptors.
const MOST: usize = 1 << 16;

/// A file that is open for reading or writing.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) file: OwnedFd,
    /// As open(2) has them.
    pub(super) flags: i32,
}

impl Open {
    pub(super) fn is_writable(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }
}

/// What a number of the guest stands for.
#[derive(Debug)]
pub(super) struct Fid {
    /// None if a snapshot had the file, and it is gone.
    pub(super) entry: Option<Entry>,
    pub(super) open: Option<Open>,
}

impl Fid {
    pub(super) fn entry(&self) -> Answer<&Entry> {
        self.entry.as_ref().ok_or(Errno(libc::ESTALE))
    }

    /// The open file.
    pub(super) fn open(&self) -> Answer<&Open> {
        self.entry()?;
        self.open.as_ref().ok_or(Errno(libc::EBADF))
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Fids(BTreeMap<u32, Fid>);

impl Fids {
    /// The most numbers that a guest may use: each may need two descriptors, and the program needs
    /// some too.
    fn limit() -> usize {
        (system::descriptor_limit() / 4).min(MOST)
    }

    pub(super) fn get(&self, fid: u32) -> Answer<&Fid> {
        self.0.get(&fid).ok_or(Errno(libc::EBADF))
    }

    pub(super) fn get_mut(&mut self, fid: u32) -> Answer<&mut Fid> {
        self.0.get_mut(&fid).ok_or(Errno(libc::EBADF))
    }

    pub(super) fn entry(&self, fid: u32) -> Answer<&Entry> {
        self.get(fid)?.entry()
    }

    /// Whether a number can be given to another file.
    pub(super) fn check_free(&self, fid: u32) -> Answer<()> {
        if fid == NO_FID || self.0.contains_key(&fid) {
            return Err(Errno(libc::EBADF));
        }
        if self.0.len() >= Self::limit() { Err(Errno(libc::EMFILE)) } else { Ok(()) }
    }

    /// Let a number stand for a file; what it stood for is closed.
    pub(super) fn set(&mut self, fid: u32, entry: Option<Entry>, open: Option<Open>) {
        self.0.insert(fid, Fid { entry, open });
    }

    pub(super) fn remove(&mut self, fid: u32) -> Answer<Fid> {
        self.0.remove(&fid).ok_or(Errno(libc::EBADF))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Fid)> {
        self.0.iter().map(|(number, fid)| (*number, fid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_once() {
        let mut fids = Fids::default();
        assert_eq!(fids.check_free(NO_FID), Err(Errno(libc::EBADF)));
        fids.check_free(1).unwrap();
        fids.set(1, None, None);
        assert_eq!(fids.check_free(1), Err(Errno(libc::EBADF)));
        assert_eq!(fids.entry(1).map(drop), Err(Errno(libc::ESTALE)));
        assert_eq!(fids.get(1).unwrap().open().map(drop), Err(Errno(libc::ESTALE)));
        fids.remove(1).unwrap();
        assert_eq!(fids.remove(1).map(drop), Err(Errno(libc::EBADF)));
        assert_eq!(fids.len(), 0);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut fids = Fids::default();
        let most = u32::try_from(Fids::limit()).unwrap();
        for fid in 0..most {
            fids.check_free(fid).unwrap();
            fids.set(fid, None, None);
        }
        assert_eq!(fids.check_free(most), Err(Errno(libc::EMFILE)));
    }
}
