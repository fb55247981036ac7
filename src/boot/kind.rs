//! Finds out what a file is, for a command line that does not say it.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::fields::u32_at;
use super::identify::{self, ELF_MAGIC, is_pe};
use super::multiboot;
use super::notes;
use super::program_headers::Executable;
use super::zero_page::HEADER_MAGIC;
use crate::error::{Error, ErrorKind, Result};

const AT: &str = "boot.kernel";
/// Whatever a file is, its head says it, except for an ELF file, whose notes may be anywhere.
const HEAD: u64 = 1 << 20;
const MAX_ELF: u64 = 1 << 30;

/// Which boot a kernel's file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`crate::config::LinuxBoot`].
    Linux,
    /// [`crate::config::KernelBoot`].
    Kernel,
}

/// What the file is. It must be a regular file.
///
/// # Errors
/// [`ErrorKind::Boot`] if it cannot be read, or is nothing that can be booted; the error says what
/// it is.
pub fn kind_of_file(path: &Path) -> Result<Kind> {
    let failed = |e: io::Error| {
        let error = Error::os(ErrorKind::Boot, AT, &e);
        Error { detail: format!("{}: {}", path.display(), error.detail), ..error }
    };
    let mut file = File::open(path).map_err(failed)?;
    let mut image = Vec::new();
    Read::by_ref(&mut file).take(HEAD).read_to_end(&mut image).map_err(failed)?;
    if image.starts_with(ELF_MAGIC) {
        file.take(MAX_ELF).read_to_end(&mut image).map_err(failed)?;
    }
    kind(&image).map_err(|e| Error { detail: format!("{}: {}", path.display(), e.detail), ..e })
}

/// What a file with these bytes is.
fn kind(image: &[u8]) -> Result<Kind> {
    if image.starts_with(ELF_MAGIC) {
        let notes = notes::read(Executable::new(image, AT)?)?;
        return Ok(if notes.is_linux { Kind::Linux } else { Kind::Kernel });
    }
    if u32_at(image, 0x202) == Some(HEADER_MAGIC) {
        return Ok(Kind::Linux);
    }
    // An EFI application may have a header for its other form, an ELF file.
    if multiboot::find(image).is_some_and(|header| header.has_addresses() || !is_pe(image)) {
        return Ok(Kind::Kernel);
    }
    Err(identify::refused(image, AT))
}

#[cfg(test)]
mod tests {
    use super::super::multiboot::tests::header;
    use super::super::notes::tests::note;
    use super::super::program_headers::tests::elf;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_file_is_known_by_its_magic_and_its_notes() {
        let mut linux = elf(0x10_0000, &note(b"Linux\0", 0x101, &[0]));
        linux[64] = 4;
        let mut bzimage = vec![0; 0x206];
        bzimage[0x202..].copy_from_slice(b"HdrS");
        for (image, expected) in [
            (&linux, Kind::Linux),
            (&bzimage, Kind::Linux),
            (&elf(0x10_0000, b"Linux version 3.2.0"), Kind::Linux),
            (&elf(0x10_0000, b"code"), Kind::Kernel),
            (&header(1 << 16, &[0; 5]), Kind::Kernel),
        ] {
            assert_eq!(kind(image).unwrap(), expected);
        }
        let efi = [&b"MZ"[..], &[0; 0x3a], b"\x40\0\0\0PE\0\0", &[0; 60], &header(0, &[])].concat();
        assert!(kind(&efi).unwrap_err().detail.contains("an EFI application"));
        assert!(kind(b"#!/bin/sh").unwrap_err().detail.contains("a script"));
        let error = kind_of_file(Path::new("/no/such/kernel")).unwrap_err();
        assert_eq!((error.at.as_str(), error.errno), (AT, Some(libc::ENOENT)));
        assert!(kind_of_file(&std::env::current_exe().unwrap()).is_ok());
    }

    proptest! {
        #[test]
        fn no_file_panics(mut image in prop::collection::vec(any::<u8>(), 0..700), is_elf: bool) {
            if is_elf && image.len() > 20 {
                image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
                image[16..20].copy_from_slice(&[2, 0, 62, 0]);
            }
            let _ = kind(&image);
        }
    }
}
