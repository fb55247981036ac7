//! Writes a cpio archive in the format "newc", which the kernel unpacks as its initial file system
//! (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).

const MAGIC: &[u8] = b"070701";
const TRAILER: &[u8] = b"TRAILER!!!";
/// Bytes of an entry without its name: the magic number and 13 numbers of 8 digits.
const HEADER: u64 = 110;
/// The kernel skips an entry whose name is longer than this, with the closing zero.
pub(super) const MAX_NAME: usize = 4096;
/// The largest size that fits in an entry.
pub(super) const MAX_FILE: u64 = u32::MAX as u64;

/// What an entry says about its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    /// Entries with the same number are the same file.
    pub(super) inode: u32,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
    pub(super) mtime: u32,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
}

/// An archive in memory.
#[derive(Debug, Default)]
pub(super) struct Archive(Vec<u8>);

impl Archive {
    /// The bytes that an entry takes.
    pub(super) fn size_of(name: &[u8], data: u64) -> u64 {
        padded(HEADER + name.len() as u64 + 1).saturating_add(padded(data))
    }

    /// The bytes that the end takes.
    pub(super) fn end_size() -> u64 {
        Self::size_of(TRAILER, 0)
    }

    /// Append an entry. Its data has at most `MAX_FILE` bytes.
    pub(super) fn push(&mut self, name: &[u8], of: &Attributes, data: &[u8]) {
        let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let (size, length) = (number(data.len()), number(name.len() + 1));
        self.0.extend_from_slice(MAGIC);
        for value in [
            of.inode,
            of.mode,
            of.uid,
            of.gid,
            of.links,
            of.mtime,
            size,
            0, // The device that the file is on: inode numbers of an archive are unique.
            0,
            of.device.0,
            of.device.1,
            length,
            0, // A checksum, which this format does not have.
        ] {
            self.0.extend_from_slice(format!("{value:08x}").as_bytes());
        }
        self.0.extend_from_slice(name);
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(data);
        self.pad();
    }

    /// The archive with its end.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.push(TRAILER, &Attributes { links: 1, ..Attributes::default() }, &[]);
        self.0
    }

    pub(super) fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

fn padded(size: u64) -> u64 {
    size.saturating_add(3) & !3
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The entries of an archive: name, attributes and data.
    pub(in crate::boot) fn entries(archive: &[u8]) -> Vec<(Vec<u8>, Attributes, Vec<u8>)> {
        let mut found = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(at % 4, 0);
            assert_eq!(&archive[at..at + 6], MAGIC);
            let number = |n: usize| {
                let digits = &archive[at + 6 + 8 * n..at + 14 + 8 * n];
                u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
            };
            let size = |n| usize::try_from(number(n)).unwrap();
            let name = archive[at + 110..at + 109 + size(11)].to_vec();
            assert_eq!(archive[at + 109 + size(11)], 0);
            let data = (at + 110 + size(11)).next_multiple_of(4);
            let end = data + size(6);
            if name == TRAILER {
                assert_eq!(end, archive.len());
                return found;
            }
            let attributes = Attributes {
                inode: number(0),
                mode: number(1),
                uid: number(2),
                gid: number(3),
                links: number(4),
                mtime: number(5),
                device: (number(9), number(10)),
            };
            found.push((name, attributes, archive[data..end].to_vec()));
            at = end.next_multiple_of(4);
        }
    }

    #[test]
    fn entries_are_padded_and_as_large_as_calculated() {
        let mut archive = Archive::default();
        let attributes = Attributes {
            inode: 7,
            mode: 0o100_644,
            mtime: 9,
            device: (4, 64),
            ..Default::default()
        };
        for (name, data) in [(&b"a"[..], &b""[..]), (b"bc", b"1"), (b"\xff\xfe/d", b"12345")] {
            let before = archive.size();
            archive.push(name, &attributes, data);
            assert_eq!(archive.size() - before, Archive::size_of(name, data.len() as u64));
        }
        let found = entries(&archive.finish());
        assert_eq!(found.len(), 3);
        assert_eq!(found[2], (b"\xff\xfe/d".to_vec(), attributes, b"12345".to_vec()));
    }
}
