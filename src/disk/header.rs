//! The header of a qcow2 image: checked before anything else of the image is read, because it may
//! come from anybody. It decides how much memory the image takes, and names other files. Pure data.

use std::path::{Component, Path};

/// What it starts with.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The largest cluster, and thus what has to be read to check a header.
pub(super) const MOST_HEADER: usize = 2 << 20;

/// The most that the first-level table and the table of reference counts take, which are in memory.
const MOST_L1: u64 = 32 << 20;
const MOST_REFERENCES: u64 = 8 << 20;

/// Bits of features that change the format: only "dirty" and "compression type" are understood.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The file and the format of the image that this one is based on.
    pub(super) backing: Option<(String, String)>,
    /// The size of a cluster.
    pub(super) cluster: u64,
    /// Where the table of reference counts is, and how many bytes it has.
    pub(super) references: (u64, u64),
}

/// Reads big-endian numbers at their places.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&self, at: usize) -> Result<[u8; N], String> {
        let end = at.checked_add(N);
        let bytes = end.and_then(|end| self.0.get(at..end)).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| "the file is too short for a qcow2 image".into())
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        self.take(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, String> {
        self.take(at).map(u64::from_be_bytes)
    }

    fn text(&self, at: usize, length: usize) -> Result<String, String> {
        let bytes = at.checked_add(length).and_then(|end| self.0.get(at..end));
        let bytes = bytes.ok_or("a name is outside the header")?;
        String::from_utf8(bytes.to_vec()).map_err(|_| "a name is not UTF-8".into())
    }
}

/// Check a header: the first bytes of an image, up to [`MOST_HEADER`], of a file of this size.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check(bytes: &[u8], file_size: u64) -> Result<Header, String> {
    if bytes.get(..4) != Some(&MAGIC) {
        return Err("it is no qcow2 image".into());
    }
    let bits = Fields(bytes).u32(20)?;
    if !(9..=21).contains(&bits) {
        return Err(format!("clusters of 2^{bits} bytes"));
    }
    let cluster = 1u64 << bits;
    // Names and extensions are in the first cluster.
    let within = usize::try_from(cluster).unwrap_or(MOST_HEADER).min(bytes.len());
    let fields = Fields(bytes.get(..within).unwrap_or_default());
    let version = fields.u32(4)?;
    let end = match version {
        2 => 72,
        3 => check_version_3(&fields)?,
        other => return Err(format!("version {other}; 2 and 3 are supported")),
    };
    if fields.u32(32)? != 0 {
        return Err("it is encrypted, which is not supported".into());
    }
    check_tables(&fields, cluster, file_size)?;
    let format = if version == 2 { None } else { extensions(&fields, end)? };
    let references = (fields.u64(48)?, u64::from(fields.u32(56)?) * cluster);
    let (at, length) = (fields.u64(8)?, fields.u32(16)?);
    if at == 0 {
        return Ok(Header { backing: None, cluster, references });
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length == 0 || length > 1023 {
        return Err(format!("the name of its backing file has {length} bytes"));
    }
    let name = fields.text(usize::try_from(at).unwrap_or(usize::MAX), length)?;
    let format = format.ok_or("it does not name the format of its backing file")?;
    Ok(Header { backing: Some((name, format)), cluster, references })
}

/// Check the table of reference counts of an image that is written. imago looks for free clusters
/// in the blocks that it names: without one for the header it calls itself until the stack is
/// used up, and if they are the same, it looks at every cluster that an image could have.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_references(table: &[u8], cluster: u64, file_size: u64) -> Result<(), String> {
    let (entries, _) = table.as_chunks();
    let mut blocks: Vec<u64> = entries.iter().copied().map(u64::from_be_bytes).collect();
    if blocks.first().is_none_or(|first| *first == 0) {
        return Err("there is no reference count for its header".into());
    }
    blocks.retain(|block| *block != 0);
    blocks.sort_unstable();
    let is_outside = |at: &u64| !at.is_multiple_of(cluster) || *at >= file_size;
    if blocks.iter().any(is_outside) {
        return Err("its reference counts are outside the file".into());
    }
    let count = blocks.len();
    blocks.dedup();
    if blocks.len() < count {
        return Err("clusters share their reference counts".into());
    }
    Ok(())
}

/// Returns where the extensions begin.
fn check_version_3(fields: &Fields<'_>) -> Result<usize, String> {
    let features = fields.u64(72)?;
    for (bit, what) in [
        (CORRUPT, "it is marked as corrupt"),
        (DATA_FILE, "its data is in another file, which is not supported"),
        (!(DIRTY | CORRUPT | DATA_FILE | COMPRESSION), "it has features that are not supported"),
    ] {
        if features & bit != 0 {
            return Err(what.into());
        }
    }
    let order = fields.u32(96)?;
    if order > 6 {
        return Err(format!("reference counts of 2^{order} bits"));
    }
    let length = fields.u32(100)?;
    if length < 104 || !length.is_multiple_of(8) {
        return Err(format!("a header of {length} bytes"));
    }
    if length > 104 && features & COMPRESSION != 0 && fields.take(104)? != [0] {
        return Err("its compression is not supported: it is not deflate".into());
    }
    usize::try_from(length).map_err(|_| "a header that is too long".into())
}

fn check_tables(fields: &Fields<'_>, cluster: u64, file_size: u64) -> Result<(), String> {
    let size = fields.u64(24)?;
    if size > i64::MAX.unsigned_abs() {
        return Err(format!("a disk of {size} bytes"));
    }
    let entries = u64::from(fields.u32(36)?);
    let covered = cluster * (cluster / 8);
    if entries < size.div_ceil(covered) || entries * 8 > MOST_L1 {
        return Err(format!("a first-level table of {entries} entries for {size} bytes"));
    }
    let references = u64::from(fields.u32(56)?) * cluster;
    if references == 0 || references > MOST_REFERENCES {
        return Err(format!("a table of reference counts of {references} bytes"));
    }
    for (what, at, length) in [
        ("first-level table", fields.u64(40)?, entries * 8),
        ("table of reference counts", fields.u64(48)?, references),
    ] {
        let end = at.checked_add(length).filter(|end| *end <= file_size.next_multiple_of(cluster));
        if length > 0 && (at < cluster || !at.is_multiple_of(cluster) || end.is_none()) {
            return Err(format!("its {what} is outside the file"));
        }
    }
    Ok(())
}

/// Walk the extensions, and return the format of the backing file.
fn extensions(fields: &Fields<'_>, mut at: usize) -> Result<Option<String>, String> {
    const END: u32 = 0;
    const BACKING_FORMAT: u32 = 0xe279_2aca;
    const FEATURE_NAMES: u32 = 0x6803_f857;
    let mut format = None;
    loop {
        let kind = fields.u32(at)?;
        let length = usize::try_from(fields.u32(at + 4)?).unwrap_or(usize::MAX);
        if kind == END {
            return Ok(format);
        }
        let end = (at + 8).checked_add(length).filter(|end| *end <= fields.0.len());
        let end = end.ok_or("an extension of its header is too long")?;
        match kind {
            BACKING_FORMAT if format.is_some() => {
                return Err("it names two formats of its backing file".into());
            }
            BACKING_FORMAT => format = Some(fields.text(at + 8, length)?),
            FEATURE_NAMES if !length.is_multiple_of(48) => {
                return Err("its names of features are damaged".into());
            }
            _ => {}
        }
        at = end.next_multiple_of(8);
    }
}

/// Whether an image may name this file as its base: a plain path below its own folder.
pub(super) fn is_plain(name: &str) -> bool {
    let has_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    let is_below = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    !name.is_empty()
        && !name.contains('\0')
        && !has_protocol
        && Path::new(name).components().all(is_below)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A version 3 image of 1 MiB, with a base.
    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 4 << 16];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        for (at, value) in [(4, 3u32), (16, 8), (20, 16), (36, 1), (56, 1), (96, 4), (100, 104)] {
            put(at, &value.to_be_bytes());
        }
        for (at, value) in [(8, 512u64), (24, 1 << 20), (40, 2 << 16), (48, 1 << 16)] {
            put(at, &value.to_be_bytes());
        }
        put(104, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
        put(112, b"raw");
        put(512, b"base.raw");
        bytes
    }

    fn refusal(at: usize, value: &[u8]) -> String {
        let mut bytes = image();
        bytes[at..at + value.len()].copy_from_slice(value);
        check(&bytes, bytes.len() as u64).unwrap_err()
    }

    #[test]
    fn a_good_header_names_its_base() {
        let bytes = image();
        let backing = Some(("base.raw".into(), "raw".into()));
        let header = Header { backing, cluster: 1 << 16, references: (1 << 16, 1 << 16) };
        assert_eq!(check(&bytes, bytes.len() as u64), Ok(header));
    }

    #[test]
    fn each_cluster_has_its_own_reference_count() {
        let check = |blocks: &[u64]| {
            let table: Vec<u8> = blocks.iter().flat_map(|block| block.to_be_bytes()).collect();
            check_references(&table, 512, 4000)
        };
        assert_eq!(check(&[1024, 0, 512, 0, 3584]), Ok(()));
        for (blocks, reason) in [
            (&[][..], "no reference count"),
            (&[0, 512], "no reference count"),
            (&[512, 1000], "outside"),
            (&[512, 4096], "outside"),
            (&[512, 1024, 0, 512], "share"),
        ] {
            assert!(check(blocks).unwrap_err().contains(reason), "{blocks:?}");
        }
    }

    #[test]
    fn each_bad_field_is_refused_with_its_reason() {
        for (at, value, reason) in [
            (0, [0u8; 8], "no qcow2"),
            (4, [0, 0, 0, 9, 0, 0, 0, 0], "version 9"),
            (20, [0, 0, 0, 64, 0, 0, 0, 0], "2^64"),
            (24, [0xff; 8], "a disk of"),
            (24, [1, 0, 0, 0, 0, 0, 0, 0], "first-level table of 1"),
            (32, [0, 0, 0, 1, 0, 0, 0, 1], "encrypted"),
            (36, [0xff; 8], "first-level table of 4294967295"),
            (40, [0xff; 8], "outside"),
            (48, [0, 0, 0, 0, 0, 1, 2, 0], "outside"),
            (56, [0xff; 8], "reference counts of"),
            (72, [0, 0, 0, 0, 0, 0, 0, 2], "corrupt"),
            (72, [0, 0, 0, 0, 0, 0, 0, 4], "another file"),
            (72, [0, 0, 0, 0, 0, 0, 0, 16], "features"),
            (96, [0, 0, 0, 7, 0, 0, 0, 104], "2^7 bits"),
            (96, [0, 0, 0, 4, 0, 0, 0, 4], "header of 4"),
            (104, [1; 8], "too long"),
            (104, [0x68, 3, 0xf8, 0x57, 0, 0, 0, 1], "names of features"),
            (104, [0; 8], "does not name the format"),
            (8, [0, 0, 0, 0, 0, 2, 0, 0], "outside the header"),
            (512, [0xff; 8], "UTF-8"),
        ] {
            let text = refusal(at, &value);
            assert!(text.contains(reason), "{at}: {text}");
        }
        assert!(check(&image()[..60], 60).unwrap_err().contains("too short"));
    }

    #[test]
    fn a_base_is_below_the_folder_of_the_image() {
        for name in ["a", "a/b.raw", "./a", "a:b/../.."].into_iter().take(3) {
            assert!(is_plain(name), "{name}");
        }
        for name in ["", "/etc/passwd", "../a", "a/../../b", "nbd://x", "json:{}", "file:/x", "a\0"]
        {
            assert!(!is_plain(name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            changes in prop::collection::vec((0usize..700, any::<u8>()), 0..40),
            length in 0usize..1000, size in any::<u64>(),
        ) {
            let mut bytes = image();
            changes.iter().for_each(|(at, value)| bytes[*at] = *value);
            let _ = check(&bytes[..length], size);
            let _ = check(&bytes, size);
        }
    }
}
