//! Packs a directory as a cpio archive in memory: everything below it, in the order of the names,
//! so that the same directory gives the same archive. Symbolic links are packed, never followed.

use std::collections::HashMap;
use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::cpio::{Archive, Attributes, MAX_FILE, MAX_NAME};
use super::files::{Files, is_of_the_kernel};
use crate::error::{Error, ErrorKind, Result};

const AT: &str = "boot.initrd";
/// How many entries are packed between two checks for an interruption.
const BATCH: usize = 256;
/// A file of the directory.
struct Node {
    path: PathBuf,
    /// Its name in the archive.
    name: Vec<u8>,
    found: Metadata,
}

/// The names of a file: their number, which of the nodes has the last, and the file's inode number
/// in the archive.
struct Names {
    count: u32,
    last: usize,
    inode: u32,
}

/// Pack the directory into at most `most` bytes. Returns None if they are not enough.
///
/// # Errors
/// [`ErrorKind::Boot`], with the path, if a file cannot be read or cannot be in an archive; what
/// the interruption returns.
pub(super) fn pack(directory: &Path, files: &Files<'_>, most: u64) -> Result<Option<Vec<u8>>> {
    let Some(nodes) = walk(directory, files, most)? else { return Ok(None) };
    let mut linked: HashMap<_, Names> = HashMap::new();
    for (n, node) in nodes.iter().enumerate() {
        let inode = u32::try_from(linked.len() + 1).unwrap_or(u32::MAX);
        let names = linked.entry(node.key(n)).or_insert(Names { count: 0, last: n, inode });
        names.count += 1;
        names.last = n;
    }
    let mut archive = Archive::default();
    for (n, node) in nodes.iter().enumerate() {
        if n % BATCH == 0 {
            (files.interrupted)()?;
        }
        let Some(names) = linked.get(&node.key(n)) else { continue };
        let left = most.saturating_sub(archive.size() + Archive::end_size());
        // The last name has the bytes: the others are made before it, empty.
        let data = if names.last == n { node.data(left)? } else { Vec::new() };
        if Archive::size_of(&node.name, data.len() as u64) > left {
            return Ok(None);
        }
        archive.push(&node.name, &node.attributes(names), &data);
    }
    Ok(Some(archive.finish()))
}

/// Everything below the directory, and itself first, as ".". None if that is too much.
fn walk(directory: &Path, files: &Files<'_>, most: u64) -> Result<Option<Vec<Node>>> {
    let found = std::fs::metadata(directory).map_err(|error| failed(directory, &error))?;
    let root = Node { path: directory.into(), name: b".".to_vec(), found };
    let mut size = root.size() + Archive::end_size();
    let mut waiting = vec![(root.path.clone(), Vec::new())];
    let mut nodes = vec![root];
    while let Some((path, prefix)) = waiting.pop() {
        (files.interrupted)()?;
        if is_of_the_kernel(&path) {
            continue;
        }
        let entries = std::fs::read_dir(&path).map_err(|error| failed(&path, &error))?;
        for entry in entries {
            let entry = entry.map_err(|error| failed(&path, &error))?;
            let path = entry.path();
            let found = std::fs::symlink_metadata(&path).map_err(|error| failed(&path, &error))?;
            let mut name = prefix.clone();
            name.extend_from_slice(entry.file_name().as_bytes());
            let node = Node { path, name, found };
            node.check()?;
            // A tree that is too large is refused before it is read, and before its names are all
            // in memory.
            size = size.saturating_add(node.size());
            if size > most {
                return Ok(None);
            }
            if node.found.is_dir() {
                let mut prefix = node.name.clone();
                prefix.push(b'/');
                waiting.push((node.path.clone(), prefix));
            }
            nodes.push(node);
        }
    }
    // A directory comes before what is in it, because its name is the beginning of theirs.
    nodes.sort_by(|a, b| (a.name != b".").cmp(&(b.name != b".")).then(a.name.cmp(&b.name)));
    Ok(Some(nodes))
}

impl Node {
    /// Nodes with the same key are the same file. The kernel links only files that have several
    /// names, and never directories or symbolic links.
    fn key(&self, n: usize) -> (u64, u64, Option<usize>) {
        let kind = self.found.file_type();
        let is_linked = self.found.nlink() > 1 && !kind.is_dir() && !kind.is_symlink();
        (self.found.dev(), self.found.ino(), (!is_linked).then_some(n))
    }

    fn check(&self) -> Result<()> {
        let kind: FileType = self.found.file_type();
        if kind.is_socket() {
            return Err(refused(&self.path, "a socket, which no archive can hold")
                .hint("remove it from the directory"));
        }
        if self.name.len() >= MAX_NAME {
            let (length, most) = (self.name.len(), MAX_NAME - 1);
            let detail = format!("its name has {length} bytes, and Linux unpacks at most {most}");
            return Err(refused(&self.path, &detail));
        }
        if kind.is_file() && self.found.len() > MAX_FILE {
            let length = self.found.len();
            let detail = format!("{length} bytes; a file of a cpio archive has less than 4 GiB");
            return Err(refused(&self.path, &detail));
        }
        Ok(())
    }

    /// What it takes in the archive at least.
    fn size(&self) -> u64 {
        let is_counted = self.found.is_file() && self.found.nlink() == 1;
        Archive::size_of(&self.name, if is_counted { self.found.len() } else { 0 })
    }

    fn attributes(&self, names: &Names) -> Attributes {
        let device = self.found.rdev();
        let seconds = self.found.mtime().max(0);
        Attributes {
            inode: names.inode,
            mode: self.found.mode(),
            uid: self.found.uid(),
            gid: self.found.gid(),
            links: if self.found.is_dir() { 2 } else { names.count },
            mtime: u32::try_from(seconds).unwrap_or(u32::MAX),
            device: (libc::major(device), libc::minor(device)),
        }
    }

    /// The bytes of a file, at most `left` and one more, or the target of a symbolic link.
    fn data(&self, left: u64) -> Result<Vec<u8>> {
        if self.found.is_symlink() {
            let target = std::fs::read_link(&self.path).map_err(|e| failed(&self.path, &e))?;
            return Ok(target.as_os_str().as_bytes().to_vec());
        }
        if !self.found.is_file() {
            return Ok(Vec::new());
        }
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(&self.path);
        let file = opened.map_err(|error| failed(&self.path, &error))?;
        let now = file.metadata().map_err(|error| failed(&self.path, &error))?;
        if (now.dev(), now.ino()) != (self.found.dev(), self.found.ino()) {
            return Err(refused(&self.path, "another file took its name while it was packed")
                .hint("pack a directory that nobody changes meanwhile"));
        }
        self.read(file, left).map_err(|error| failed(&self.path, &error))
    }

    /// A file that grows meanwhile is read to its former end. One without a size, to its end.
    fn read(&self, file: File, left: u64) -> io::Result<Vec<u8>> {
        let most = match self.found.len() {
            0 => left.saturating_add(1),
            length => length.min(left.saturating_add(1)),
        };
        let mut bytes = Vec::new();
        file.take(most.min(MAX_FILE)).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

fn refused(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Boot, AT, format!("{}: {why}", path.display()))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    let mut failed = Error::os(ErrorKind::Boot, AT, error);
    failed.detail = format!("{}: {}", path.display(), failed.detail);
    failed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::cpio::tests::entries;
    use proptest::prelude::*;
    use std::ffi::{CString, OsStr};
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    /// A directory that is removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let own = format!("pyvmm-tree-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(own);
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn write(&self, name: &str, bytes: &[u8]) {
            std::fs::write(self.0.join(name), bytes).unwrap();
        }

        fn pack(&self) -> Result<Vec<u8>> {
            self.pack_within(1 << 20).map(Option::unwrap)
        }

        fn pack_within(&self, most: u64) -> Result<Option<Vec<u8>>> {
            pack(&self.0, &Files { most, interrupted: &|| Ok(()) }, most)
        }

        fn entries(&self) -> Vec<(String, Attributes, Vec<u8>)> {
            let named = |(name, of, data): (Vec<u8>, _, _)| {
                (String::from_utf8_lossy(&name).into_owned(), of, data)
            };
            entries(&self.pack().unwrap()).into_iter().map(named).collect()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn everything_is_packed_in_the_order_of_names_as_it_is() {
        let tree = Scratch::new("all");
        tree.write("init", b"#!/bin/sh\n");
        std::fs::set_permissions(tree.0.join("init"), Permissions::from_mode(0o4755)).unwrap();
        std::fs::create_dir(tree.0.join("a")).unwrap();
        tree.write("a-b", b"");
        tree.write("a/.hidden", b"12345");
        symlink("../nowhere", tree.0.join("a/link")).unwrap();
        symlink(".", tree.0.join("a/loop")).unwrap();
        let fifo = CString::new(tree.0.join("pipe").as_os_str().as_bytes()).unwrap();
        // SAFETY: the path ends in a zero byte.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::options().write(true).open(tree.0.join("init")).unwrap().set_modified(time).unwrap();
        let found = tree.entries();
        let names: Vec<&str> = found.iter().map(|(name, ..)| name.as_str()).collect();
        let expected = [".", "a", "a-b", "a/.hidden", "a/link", "a/loop", "init", "pipe"];
        assert_eq!(names, expected);
        let of = |name: &str| found.iter().find(|(found, ..)| found == name).unwrap();
        let own = std::fs::metadata(tree.0.join("init")).unwrap();
        let init = of("init").1;
        assert_eq!((init.mode, init.mtime, init.links), (0o104_755, 1_000_000_000, 1));
        assert_eq!((init.uid, init.gid), (own.uid(), own.gid()));
        assert_eq!((of("a").1.mode & 0o170_000, of("a").1.links), (0o040_000, 2));
        assert_eq!(of("a/.hidden").2, b"12345");
        assert_eq!(
            (of("a/link").1.mode, of("a/link").2.as_slice()),
            (0o120_777, &b"../nowhere"[..])
        );
        assert_eq!(of("a/loop").2, b".");
        assert_eq!((of("pipe").1.mode & 0o170_000, of("pipe").2.len()), (0o010_000, 0));
        assert_eq!(tree.pack().unwrap(), tree.pack().unwrap());
    }

    #[test]
    fn names_of_one_file_are_linked_and_the_last_has_its_bytes() {
        let tree = Scratch::new("links");
        tree.write("b", b"data");
        std::fs::hard_link(tree.0.join("b"), tree.0.join("a")).unwrap();
        std::fs::hard_link(tree.0.join("b"), tree.0.join("c")).unwrap();
        tree.write("d", b"data");
        let found = tree.entries();
        let of: Vec<_> = found.iter().skip(1).map(|(_, of, data)| (of.links, data.len())).collect();
        assert_eq!(of, [(3, 0), (3, 0), (3, 4), (1, 4)]);
        let inodes: Vec<u32> = found.iter().map(|(_, of, _)| of.inode).collect();
        assert_eq!(inodes, [1, 2, 2, 2, 3]);
    }

    #[test]
    fn a_name_that_is_not_utf8_stays_as_it_is() {
        let tree = Scratch::new("bytes");
        std::fs::write(tree.0.join(OsStr::from_bytes(b"\xff\xfe")), "").unwrap();
        assert_eq!(entries(&tree.pack().unwrap())[1].0, b"\xff\xfe");
    }

    #[test]
    fn a_socket_is_refused_by_its_name() {
        let tree = Scratch::new("socket");
        let _socket = UnixListener::bind(tree.0.join("control")).unwrap();
        let error = tree.pack().unwrap_err();
        assert!(error.detail.contains("control: a socket"), "{error}");
    }

    #[test]
    fn a_directory_that_is_too_large_is_refused_before_it_is_read() {
        let tree = Scratch::new("large");
        tree.write("sparse", b"");
        let sparse = File::options().write(true).open(tree.0.join("sparse")).unwrap();
        sparse.set_len(3 << 30).unwrap();
        assert_eq!(tree.pack_within(1 << 20).unwrap(), None);
        sparse.set_len(5 << 30).unwrap();
        assert!(tree.pack().unwrap_err().detail.contains("less than 4 GiB"));
        sparse.set_len(0).unwrap();
        let size = tree.pack().unwrap().len() as u64;
        assert_eq!(tree.pack_within(size - 1).unwrap(), None);
        assert_eq!(tree.pack_within(size).unwrap().unwrap().len() as u64, size);
    }

    #[test]
    fn a_file_that_changes_while_it_is_packed_leaves_the_archive_whole() {
        let tree = Scratch::new("changing");
        tree.write("log", b"12345678");
        let found = std::fs::symlink_metadata(tree.0.join("log")).unwrap();
        let node = Node { path: tree.0.join("log"), name: b"log".to_vec(), found };
        tree.write("log", b"12345678 and more");
        assert_eq!(node.data(1000).unwrap(), b"12345678");
        tree.write("log", b"123");
        assert_eq!(node.data(1000).unwrap(), b"123");
        // Another file of the name, or something that is not to be opened.
        std::fs::rename(tree.0.join("log"), tree.0.join("old")).unwrap();
        tree.write("log", b"other");
        assert!(node.data(1000).unwrap_err().detail.contains("another file"));
        std::fs::remove_file(tree.0.join("log")).unwrap();
        symlink("old", tree.0.join("log")).unwrap();
        assert_eq!(node.data(1000).unwrap_err().errno, Some(libc::ELOOP));
        std::fs::remove_file(tree.0.join("log")).unwrap();
        assert_eq!(node.data(1000).unwrap_err().errno, Some(libc::ENOENT));
    }

    #[test]
    fn file_systems_of_the_kernel_are_empty_and_an_interruption_ends_it() {
        let files = Files { most: 1 << 20, interrupted: &|| Ok(()) };
        let archive = pack(Path::new("/proc"), &files, 1 << 20).unwrap();
        assert_eq!(entries(&archive.unwrap()).len(), 1);
        let stop = || Err(Error::new(ErrorKind::State, "test", "interrupted"));
        let files = Files { most: 1 << 20, interrupted: &stop };
        assert_eq!(pack(Path::new("/"), &files, 1 << 20).unwrap_err().detail, "interrupted");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_tree_comes_back_from_its_archive(
            made in prop::collection::btree_map("[a-c./]{1,9}", (0u8..4, prop::collection::vec(any::<u8>(), 0..9)), 0..12),
            most in 0u64..4096,
        ) {
            let tree = Scratch::new("any");
            let mut files = 0;
            for (name, (kind, bytes)) in &made {
                let path = tree.0.join(name.trim_matches('/'));
                if !path.starts_with(&tree.0) || name.contains("..") {
                    continue;
                }
                let is_made = match kind {
                    0 => std::fs::create_dir(&path),
                    1 => symlink(name, &path),
                    2 => std::fs::hard_link(tree.0.join("a"), &path),
                    _ if path.exists() => continue,
                    _ => std::fs::write(&path, bytes),
                };
                files += usize::from(is_made.is_ok());
            }
            prop_assert_eq!(tree.entries().len(), files + 1);
            if let Some(archive) = tree.pack_within(most).unwrap() {
                prop_assert!(archive.len() as u64 <= most);
            }
        }
    }
}
