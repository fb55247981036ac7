//! Requests about what is in files and directories, and their attributes.

use super::entry::{Kind, qid_path};
use super::server::Server;
use super::system;
use super::wire::{Answer, Errno, QID_LENGTH, Qid, Reply};

/// What is known of the attributes: all that stat(2) has.
const BASIC: u64 = 0x7ff;
/// The file system's type, as the client's kernel knows it.
const V9FS_MAGIC: u32 = 0x0102_1997;
/// The most that one call reads of a directory.
const DIRECTORY_BYTES: usize = 32 << 10;
/// The bytes before the name in an entry of getdents64.
const DIRENT: usize = 19;

impl Server {
    pub(super) fn read(
        &self,
        fid: u32,
        offset: u64,
        count: usize,
        reply: &mut Reply,
    ) -> Answer<()> {
        let open = self.fids.get(fid)?.open()?;
        reply.counted(count, |room| system::read(&open.file, room, offset))
    }

    pub(super) fn write(
        &self,
        fid: u32,
        offset: u64,
        data: &[u8],
        reply: &mut Reply,
    ) -> Answer<()> {
        let open = self.fids.get(fid)?.open()?;
        let written = system::write(&open.file, data, offset)?;
        reply.u32(u32::try_from(written).unwrap_or(u32::MAX));
        Ok(())
    }

    pub(super) fn sync(&self, fid: u32, data_only: bool) -> Answer<()> {
        system::sync(&self.fids.get(fid)?.open()?.file, data_only)
    }

    pub(super) fn read_link(&self, fid: u32, reply: &mut Reply) -> Answer<()> {
        let entry = self.fids.entry(fid)?;
        if entry.kind != Kind::Symlink {
            return Err(Errno(libc::EINVAL));
        }
        reply.string(&system::read_link(&entry.fd)?);
        Ok(())
    }

    pub(super) fn get_attributes(&self, fid: u32, mask: u64, reply: &mut Reply) -> Answer<()> {
        let stat = self.fids.entry(fid)?.stat()?;
        let (uid, gid) = self.directory.options.owner.unwrap_or((stat.st_uid, stat.st_gid));
        reply
            .u64(mask & BASIC)
            .qid(super::entry::qid(&stat, self.directory.device))
            .u32(stat.st_mode)
            .u32(uid)
            .u32(gid)
            .u64(stat.st_nlink)
            .u64(stat.st_rdev);
        let times = [
            (stat.st_atime, stat.st_atime_nsec),
            (stat.st_mtime, stat.st_mtime_nsec),
            (stat.st_ctime, stat.st_ctime_nsec),
            // The time of creation is not known, and neither are generation and version.
            (0, 0),
            (0, 0),
        ];
        let sizes = [stat.st_size, stat.st_blksize, stat.st_blocks];
        for number in sizes.into_iter().chain(times.into_iter().flat_map(|(s, ns)| [s, ns])) {
            reply.u64(number.cast_unsigned());
        }
        Ok(())
    }

    pub(super) fn stat_fs(&self, fid: u32, reply: &mut Reply) -> Answer<()> {
        let stat = system::stat_fs(&self.fids.entry(fid)?.fd)?;
        let short = |number: i64| u32::try_from(number).unwrap_or(0);
        reply.u32(V9FS_MAGIC).u32(short(stat.f_bsize));
        for number in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            reply.u64(number);
        }
        reply.u64(self.directory.device).u32(short(stat.f_namelen));
        Ok(())
    }

    pub(super) fn read_directory(
        &self,
        fid: u32,
        offset: u64,
        count: usize,
        reply: &mut Reply,
    ) -> Answer<()> {
        let found = self.fids.get(fid)?;
        let directory = found.entry()?;
        directory.directory()?;
        let (file, own) = (&found.open()?.file, directory.stat()?);
        let mut bytes = vec![0; count.min(DIRECTORY_BYTES)];
        let length = system::read_directory(file, &mut bytes, offset)?;
        let mut left = bytes.get(..length).unwrap_or_default();
        let mut entries = Vec::new();
        while let Some(dirent) = Dirent::next(&mut left) {
            let start = entries.len();
            let path = match dirent.name {
                // The number of what is above the root is nobody's business.
                b"." | b".." => own.st_ino,
                _ => dirent.inode,
            };
            let kind = dirent.kind(file)?.qid_bits();
            let path = qid_path(own.st_dev, path, self.directory.device);
            push_entry(&mut entries, Qid { kind, version: 0, path }, &dirent);
            if entries.len() > count {
                entries.truncate(start);
                break;
            }
        }
        if entries.is_empty() && length > 0 {
            return Err(Errno(libc::EINVAL));
        }
        reply.counted(entries.len(), |room| {
            room.copy_from_slice(&entries);
            Ok(entries.len())
        })
    }
}

/// An entry of Rreaddir.
fn push_entry(entries: &mut Vec<u8>, qid: Qid, dirent: &Dirent<'_>) {
    entries.reserve(QID_LENGTH + 11 + dirent.name.len());
    entries.push(qid.kind);
    entries.extend(qid.version.to_le_bytes());
    entries.extend(qid.path.to_le_bytes());
    entries.extend(dirent.next.to_le_bytes());
    entries.push(dirent.kind);
    entries.extend(u16::try_from(dirent.name.len()).unwrap_or(0).to_le_bytes());
    entries.extend(dirent.name);
}

/// An entry as getdents64 writes it.
#[derive(Debug)]
struct Dirent<'a> {
    inode: u64,
    /// Where the next one is.
    next: u64,
    kind: u8,
    name: &'a [u8],
}

impl<'a> Dirent<'a> {
    fn next(left: &mut &'a [u8]) -> Option<Self> {
        let number = |at: usize| left.get(at..)?.first_chunk().copied().map(u64::from_le_bytes);
        let length = u16::from_le_bytes(*left.get(16..)?.first_chunk()?);
        let (record, rest) = left.split_at_checked(usize::from(length))?;
        let name = record.get(DIRENT..)?.split(|byte| *byte == 0).next()?;
        let found = Self { inode: number(0)?, next: number(8)?, kind: *record.get(18)?, name };
        *left = rest;
        Some(found)
    }

    fn kind(&self, directory: &std::os::fd::OwnedFd) -> Answer<Kind> {
        Ok(match self.kind {
            libc::DT_DIR => Kind::Directory,
            libc::DT_LNK => Kind::Symlink,
            libc::DT_UNKNOWN if !matches!(self.name, b"." | b"..") => {
                let name = super::wire::Name::new(self.name)?;
                // It may be gone by now.
                system::stat_at(directory, name.as_c_str())
                    .map_or(Kind::File, |stat| Kind::of(stat.st_mode))
            }
            _ => Kind::File,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::{Client, Folder};
    use super::super::directory::Options;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_file_is_read_and_written_at_any_offset() {
        let folder = Folder::new();
        folder.write("file", b"Hello");
        let mut client = Client::new(&folder);
        client.walk(&["file"]).unwrap();
        assert_eq!(client.read(0, 4), Err(libc::EBADF), "it is not open");
        client.open(libc::O_RDWR).unwrap();
        assert_eq!(client.read(1, 100).unwrap(), b"ello");
        assert_eq!(client.write(5, b" there"), Ok(6));
        assert_eq!(client.read(0, 100).unwrap(), b"Hello there");
        assert_eq!(client.read(100, 100).unwrap(), b"");
        assert_eq!(client.read(u64::MAX, 1), Err(libc::EINVAL));
        assert_eq!(client.write(u64::MAX, b"x"), Err(libc::EINVAL));
        assert_eq!(client.read(0, u32::MAX).unwrap(), b"Hello there");
    }

    #[test]
    fn a_directory_is_read_in_pieces() {
        let folder = Folder::new();
        let names: BTreeSet<String> = (0..100).map(|n| format!("file {n}")).collect();
        names.iter().for_each(|name| folder.write(name, b""));
        let mut client = Client::new(&folder);
        client.walk(&[]).unwrap();
        client.open(libc::O_RDONLY).unwrap();
        for count in [100, 333, 100_000] {
            let entries = client.entries(count);
            let above = entries.iter().find(|(name, _)| name == "..").unwrap();
            let own = entries.iter().find(|(name, _)| name == ".").unwrap();
            assert_eq!(above.1, own.1, "what is above the share is not told");
            let found: BTreeSet<_> = entries.into_iter().map(|(name, _)| name).collect();
            assert_eq!(found.len(), 102);
            assert!(found.is_superset(&names));
        }
        assert_eq!(client.read_directory(0, 8), Err(libc::EINVAL));
    }

    #[test]
    fn the_owner_is_the_hosts_or_another() {
        let folder = Folder::new();
        let mut client = Client::new(&folder);
        client.walk(&[]).unwrap();
        // SAFETY: it has no arguments.
        assert_eq!(client.owner(), unsafe { (libc::geteuid(), libc::getegid()) });
        let options = Options { read_only: false, owner: Some((12, 34)) };
        client = Client::with(&folder, options);
        client.walk(&[]).unwrap();
        assert_eq!(client.owner(), (12, 34));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn what_is_written_is_read(pieces in prop::collection::vec((0..5000_u64, prop::collection::vec(any::<u8>(), 0..3000)), 1..8)) {
            let folder = Folder::new();
            let mut client = Client::new(&folder);
            client.create("file", libc::O_RDWR).unwrap();
            let mut model = Vec::new();
            for (offset, data) in pieces {
                let at = usize::try_from(offset).unwrap();
                if !data.is_empty() {
                    model.resize(model.len().max(at + data.len()), 0);
                    model[at..at + data.len()].copy_from_slice(&data);
                }
                prop_assert_eq!(client.write(offset, &data), Ok(u32::try_from(data.len()).unwrap()));
            }
            prop_assert_eq!(&folder.read("file"), &model);
            let head = client.read(0, 4000).unwrap();
            prop_assert_eq!(&head[..], &model[..model.len().min(4000)]);
        }
    }
}
