//! The initial RAM disk: files and directories, one after the other, loaded as high in low memory
//! as possible.

use std::path::{Path, PathBuf};

use super::files::Files;
use super::tree;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{self, PAGE};
use crate::memory::GuestMemory;

const AT: &str = "boot.initrd";

/// Where an initial RAM disk may be: behind the kernel, up to what the kernel allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// The end of the kernel.
    pub(super) start: u64,
    /// The highest address that the kernel allows for the last byte.
    pub(super) last: u64,
}

impl Room {
    /// Its first page, the end of its last one, and the end of memory below 4 GiB.
    fn pages(self, memory: &GuestMemory) -> (u64, u64, u64) {
        let low = memory.size().min(layout::MMIO_GAP_START);
        let end = low.min(self.last.saturating_add(1)) & !(PAGE - 1);
        (self.start.next_multiple_of(PAGE), end, low)
    }
}

/// Load them there. Returns the address and the size.
pub(super) fn load(
    paths: &[PathBuf],
    memory: &GuestMemory,
    files: &Files<'_>,
    room: Room,
) -> Result<(u32, u32)> {
    let bytes = read(paths, memory, files, room)?;
    let (_, end, _) = room.pages(memory);
    let size = bytes.len() as u64;
    // Rounding down by less than a page stays above the start, which is a multiple of it.
    let address = end.saturating_sub(size) & !(PAGE - 1);
    let (Ok(address), Ok(length)) = (u32::try_from(address), u32::try_from(size)) else {
        return Err(Error::new(ErrorKind::Boot, AT, format!("{size} bytes are too many")));
    };
    if size > 0 {
        memory.write(u64::from(address), &bytes)?;
    }
    Ok((address, length))
}

/// Read them, one after the other, if they fit in the room.
pub(super) fn read(
    paths: &[PathBuf],
    memory: &GuestMemory,
    files: &Files<'_>,
    room: Room,
) -> Result<Vec<u8>> {
    let (start, end, low) = room.pages(memory);
    let most = end.saturating_sub(start);
    let mut bytes = Vec::new();
    for path in paths {
        // The kernel looks for the next archive at a multiple of four.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let left = most.saturating_sub(bytes.len() as u64);
        let next =
            read_one(path, files, left)?.ok_or_else(|| too_large(path, (start, end), low))?;
        if bytes.is_empty() {
            bytes = next;
        } else {
            bytes.extend_from_slice(&next);
        }
    }
    Ok(bytes)
}

/// A file, or a directory as an archive. None if it is too large.
fn read_one(path: &Path, files: &Files<'_>, most: u64) -> Result<Option<Vec<u8>>> {
    if path.is_dir() {
        return tree::pack(path, files, most);
    }
    files.read_within(path, AT, most)
}

fn too_large(path: &Path, (start, end): (u64, u64), low: u64) -> Error {
    let room = end.saturating_sub(start);
    let is_kernels = end < low & !(PAGE - 1);
    let limit = if is_kernels {
        "the kernel's limit (initrd_addr_max)"
    } else if low == layout::MMIO_GAP_START {
        "the end of memory below 4 GiB"
    } else {
        "the end of memory"
    };
    let detail = format!(
        "{}: does not fit: from the end of the kernel, {start:#x}, to {limit}, {end:#x}, there are \
         {room} bytes for all of the initial RAM disk",
        path.display()
    );
    Error::new(ErrorKind::Boot, AT, detail).hint(if is_kernels {
        "make the initial RAM disk smaller"
    } else {
        "give the machine more memory (memory.size_mib)"
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::cpio::tests::entries;

    const WHOLE: Room = Room { start: 0x20_0000, last: 0x7fff_ffff };

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pyvmm-initrd-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        path
    }

    fn load_from(paths: &[PathBuf], room: Room) -> Result<(GuestMemory, u32, u32)> {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let files = Files { most: memory.size(), interrupted: &|| Ok(()) };
        let (address, size) = load(paths, &memory, &files, room)?;
        Ok((memory, address, size))
    }

    #[test]
    fn files_follow_one_another_at_multiples_of_four() {
        let directory = scratch("several");
        let paths: Vec<PathBuf> = ["a", "b", "c"].map(|name| directory.join(name)).to_vec();
        for (path, bytes) in paths.iter().zip([&b"12345"[..], b"", b"678"]) {
            std::fs::write(path, bytes).unwrap();
        }
        let (memory, address, size) = load_from(&paths, WHOLE).unwrap();
        assert_eq!((address, size), (0x3f_f000, 11));
        let mut bytes = [0; 11];
        memory.read(0x3f_f000, &mut bytes).unwrap();
        assert_eq!(bytes.as_slice(), [&b"12345\0\0\0"[..], b"678"].concat().as_slice());
        let (_, address, size) = load_from(&paths[1..2], WHOLE).unwrap();
        assert_eq!((address, size), (0x40_0000, 0));
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_directory_is_packed() {
        let directory = scratch("directory");
        std::fs::write(directory.join("init"), "program").unwrap();
        let first = directory.join("init");
        let (memory, address, size) = load_from(&[first, directory.clone()], WHOLE).unwrap();
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        memory.read(u64::from(address), &mut bytes).unwrap();
        assert_eq!(bytes[..8], *b"program\0");
        let found = entries(&bytes[8..]);
        assert_eq!((found[0].0.as_slice(), found[1].0.as_slice()), (&b"."[..], &b"init"[..]));
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn one_that_does_not_fit_says_how_much_does() {
        let directory = scratch("limits");
        let path = directory.join("initrd");
        std::fs::write(&path, [7; 0x3000]).unwrap();
        let room = |start, last| load_from(std::slice::from_ref(&path), Room { start, last });
        // The last byte may be at the limit itself.
        assert_eq!(room(0x20_0000, 0x20_2fff).unwrap().1, 0x20_0000);
        let error = room(0x20_0000, 0x20_2ffe).unwrap_err();
        assert!(error.detail.contains("(initrd_addr_max), 0x202000, there are 8192 b"), "{error}");
        assert_eq!(room(0x3f_d000, u64::MAX).unwrap().1, 0x3f_d000);
        let error = room(0x3f_d001, u64::MAX).unwrap_err();
        assert!(error.detail.contains("the end of memory, 0x400000"), "{error}");
        assert!(error.hint.unwrap().contains("memory.size_mib"));
        assert!(room(0x80_0000, u64::MAX).unwrap_err().detail.contains("there are 0 bytes"));
        let twice = [path.clone(), path.clone()];
        let error = load_from(&twice, Room { start: 0x3f_b000, last: u64::MAX }).unwrap_err();
        assert_eq!(error.at, "boot.initrd");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
