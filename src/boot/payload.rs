//! Unpacks the compressed kernel of a bzImage, as the kernel's own code would. Hostile bytes get an
//! error here, and never more memory than the bzImage says that it needs.

use std::io::{self, Read};

use flate2::read::GzDecoder;
use lzma_rust2::{LzmaReader, XzReader};
use ruzstd::decoding::StreamingDecoder;

use super::fields::u32_at;
use super::identify::ELF_MAGIC;

/// The largest window of a decoder: what `zstd -22 --ultra` writes, and twice what `xz -9` does.
const MAX_WINDOW: u64 = 128 << 20;
/// What each block of LZ4's legacy format may unpack to.
const MAX_LZ4_BLOCK: usize = 8 << 20;
/// Behind each format but gzip, which has one of its own, the kernel has the unpacked size.
const TRAILER: usize = 4;

/// Why there is no unpacked kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is in no format that is known here; which one, as far as that is known.
    Unknown(&'static str),
    /// It is in this format and cannot be unpacked.
    Damaged(String),
}

type Decoder = fn(&[u8], usize) -> io::Result<Vec<u8>>;

/// The formats: magic number, name, and what unpacks it.
const FORMATS: &[(&[u8], &str, Decoder)] = &[
    (b"\x1f\x8b", "gzip", |packed, size| read(GzDecoder::new(packed), size)),
    (b"\x28\xb5\x2f\xfd", "zstd", zstd),
    (b"\x02\x21\x4c\x18", "lz4", lz4),
    (b"\xfd7zXZ\0", "xz", |packed, size| {
        read(XzReader::new_mem_limit(packed, false, window_kib()), size)
    }),
    (b"\x5d\0\0", "lzma", |packed, size| {
        read(LzmaReader::new_mem_limit(packed, window_kib(), None)?, size)
    }),
];

/// Formats of the kernel that no decoder here knows.
const OTHERS: &[(&[u8], &str)] = &[(b"BZh", "bzip2"), (b"\x89LZO", "lzo")];

/// Unpack to at most `most` bytes.
pub(super) fn unpack(payload: &[u8], most: u64) -> Result<Vec<u8>, Refused> {
    if payload.starts_with(ELF_MAGIC) {
        return Ok(payload.to_vec());
    }
    let Some((_, name, decode)) = FORMATS.iter().find(|(magic, ..)| payload.starts_with(magic))
    else {
        let other = OTHERS.iter().find(|(magic, _)| payload.starts_with(magic));
        return Err(Refused::Unknown(other.map_or("an unknown format", |(_, name)| name)));
    };
    let damaged = |why: String| Refused::Damaged(format!("its payload ({name}) {why}"));
    let split = payload.len().saturating_sub(TRAILER);
    let said = u32_at(payload, split).unwrap_or_default();
    let size = usize::try_from(said).ok().filter(|size| *size as u64 <= most);
    let Some(size) = size else {
        return Err(damaged(format!("says that it unpacks to {said} bytes, more than {most}")));
    };
    let packed = if *name == "gzip" { Some(payload) } else { payload.get(..split) };
    let unpacked = decode(packed.unwrap_or_default(), size)
        .map_err(|error| damaged(format!("cannot be unpacked: {error}")))?;
    if unpacked.len() != size {
        let count = unpacked.len();
        let count = if count > size { "more".into() } else { count.to_string() };
        return Err(damaged(format!("unpacks to {count} bytes, not the {said} that it says")));
    }
    Ok(unpacked)
}

fn window_kib() -> u32 {
    u32::try_from(MAX_WINDOW >> 10).unwrap_or(u32::MAX)
}

/// Read at most one byte more than there should be.
fn read(reader: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(size);
    reader.take(size as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn zstd(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let decoder = StreamingDecoder::new_with_max_window_size(packed, MAX_WINDOW);
    let mut decoder = decoder.map_err(io::Error::other)?;
    let bytes = read(&mut decoder, size)?;
    let frame = &decoder.decoder;
    if let Some(checksum) = frame.get_checksum_from_data()
        && bytes.len() == size
        && frame.get_calculated_checksum() != Some(checksum)
    {
        return Err(io::Error::other("wrong checksum"));
    }
    Ok(bytes)
}

/// LZ4's legacy format: the magic number, and blocks with their sizes in front.
fn lz4(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    let mut done = 0usize;
    let mut rest = packed.get(4..).unwrap_or_default();
    while !rest.is_empty() {
        let length = u32_at(rest, 0).and_then(|length| usize::try_from(length).ok());
        let block = length.and_then(|length| rest.get(4..length.checked_add(4)?));
        let block = block.ok_or_else(|| io::Error::other("a block is truncated"))?;
        let end = done.saturating_add(MAX_LZ4_BLOCK).min(size);
        let target = bytes.get_mut(done..end).unwrap_or_default();
        done += lz4_flex::block::decompress_into(block, target).map_err(io::Error::other)?;
        rest = rest.get(4 + block.len()..).unwrap_or_default();
    }
    bytes.truncate(done);
    Ok(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    // `data()`, by the commands with which the kernel is built: gzip -n -9, zstd -22 --ultra,
    // lz4 -l -9, xz --check=crc32 --x86 --lzma2=dict=64KiB, lzma -9.
    const GZIP: &[u8] = b"\
        \x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xab\x77\xf5\x71\x63\x62\x60\x64\x62\x66\
        \x61\x65\x63\xe7\xe0\xe4\xe2\xe6\xe1\xe5\xe3\x17\x10\x14\x12\x16\x11\x15\x13\x97\
        \x90\x94\x92\x96\x91\x95\x93\x57\x50\x54\x52\x56\x51\x55\x53\xa7\xb6\xba\xec\xd4\
        \xa2\xbc\xd4\x1c\x52\x49\x00\x2e\x93\x90\x1f\xb3\x00\x00\x00";
    const ZSTD: &[u8] = b"\
        \x28\xb5\x2f\xfd\x04\x88\xf5\x01\x00\x34\x03\x7f\x45\x4c\x46\x02\x00\x01\x02\x03\
        \x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17\
        \x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x20\x21\x22\x23\x24\x25\x26\x27\x6b\x65\x72\x6e\
        \x65\x6c\x02\x00\xa5\x44\xa5\xbd\x50\x55\x06\x27\xec\xf3\x3c\xb3\x00\x00\x00";
    const LZ4: &[u8] = b"\
        \x02\x21\x4c\x18\x42\x00\x00\x00\xff\x1e\x7f\x45\x4c\x46\x02\x00\x01\x02\x03\x04\
        \x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17\x18\
        \x19\x1a\x1b\x1c\x1d\x1e\x1f\x20\x21\x22\x23\x24\x25\x26\x27\x28\x00\x3d\x6f\x6b\
        \x65\x72\x6e\x65\x6c\x06\x00\x18\x50\x65\x72\x6e\x65\x6c\xb3\x00\x00\x00";
    const XZ: &[u8] = b"\
        \xfd\x37\x7a\x58\x5a\x00\x00\x01\x69\x22\xde\x36\x02\x01\x04\x00\x21\x01\x08\x00\
        \xd2\xb9\x74\xcb\xe0\x00\xb2\x00\x3b\x5d\x00\x3f\x91\x45\x84\x68\x3d\x81\x83\x12\
        \xc2\xb8\x73\xe4\x85\xf5\x62\x8c\x27\xee\xe0\xd3\xc3\x59\xce\x89\xda\x87\x22\x3b\
        \x8a\xfb\x0d\x8d\xc1\x32\xcc\x11\x67\xef\x0f\xdb\x73\x53\x40\x08\xd1\xfb\xcf\x1f\
        \xfc\x56\x27\xa8\x36\x98\xd8\xec\x50\x00\x00\x00\x2e\x93\x90\x1f\x00\x01\x53\xb3\
        \x01\x00\x00\x00\x25\xbb\x94\xa6\x3e\x30\x0d\x8b\x02\x00\x00\x00\x00\x01\x59\x5a\
        \xb3\x00\x00\x00";
    const LZMA: &[u8] = b"\
        \x5d\x00\x00\x00\x04\xff\xff\xff\xff\xff\xff\xff\xff\x00\x3f\x91\x45\x84\x68\x3d\
        \x81\x83\x12\xc2\xb8\x73\xe4\x85\xf5\x62\x8c\x27\xee\xe0\xd3\xc3\x59\xce\x89\xda\
        \x87\x22\x3b\x8a\xfb\x0d\x8d\xc1\x32\xcc\x11\x67\xef\x0f\xdb\x73\x53\x40\x08\xd1\
        \xfb\xcf\x1f\xfc\x56\x27\xa8\x36\x98\xda\xfd\x10\xa7\xff\xff\x0e\xf4\x00\x00\xb3\
        \x00\x00\x00";
    const ALL: [&[u8]; 5] = [GZIP, ZSTD, LZ4, XZ, LZMA];

    fn data() -> Vec<u8> {
        let counted: Vec<u8> = (0..40).collect();
        [b"\x7fELF\x02", counted.repeat(3).as_slice(), b"kernel".repeat(9).as_slice()].concat()
    }

    /// A payload of LZ4 that unpacks to these bytes.
    pub(in crate::boot) fn packed(data: &[u8]) -> Vec<u8> {
        let block = lz4_flex::block::compress(data);
        let mut packed = b"\x02\x21\x4c\x18".to_vec();
        packed.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend_from_slice(&block);
        packed.extend_from_slice(&u32::try_from(data.len()).unwrap().to_le_bytes());
        packed
    }

    fn damaged(payload: &[u8], most: u64) -> String {
        match unpack(payload, most) {
            Err(Refused::Damaged(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_format_of_the_kernel_is_unpacked() {
        for payload in ALL {
            assert_eq!(unpack(payload, 1000).unwrap(), data(), "{payload:x?}");
            assert_eq!(unpack(payload, data().len() as u64).unwrap(), data());
        }
        assert_eq!(unpack(&packed(&data()), 1000).unwrap(), data());
        assert_eq!(unpack(&data(), 1000).unwrap(), data(), "one that is not compressed");
    }

    #[test]
    fn several_blocks_of_lz4_follow_one_another() {
        let (first, second) = (vec![1; MAX_LZ4_BLOCK], vec![2; 100]);
        let mut payload = packed(&first);
        payload.truncate(payload.len() - TRAILER);
        let block = lz4_flex::block::compress(&second);
        payload.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend_from_slice(&block);
        let size = first.len() + second.len();
        payload.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
        assert_eq!(unpack(&payload, 16 << 20).unwrap(), [first, second].concat());
        // A block is never larger than the format allows.
        let large = packed(&vec![1; MAX_LZ4_BLOCK + 1]);
        assert!(damaged(&large, 16 << 20).contains("cannot be unpacked"));
    }

    #[test]
    fn other_formats_are_named() {
        assert_eq!(unpack(b"BZh91AY", 1000), Err(Refused::Unknown("bzip2")));
        assert_eq!(unpack(b"\x89LZO\0\r\n", 1000), Err(Refused::Unknown("lzo")));
        assert_eq!(unpack(b"", 1000), Err(Refused::Unknown("an unknown format")));
    }

    #[test]
    fn a_bomb_is_refused_and_what_says_too_little_ends_there() {
        for payload in ALL {
            assert!(damaged(payload, 178).contains("more than 178"));
            let mut less = payload.to_vec();
            let at = less.len() - TRAILER;
            less[at] = 100;
            let why = damaged(&less, 1000);
            let is_expected = why.contains("more bytes") || why.contains("cannot be unpacked");
            assert!(is_expected, "{why}");
        }
    }

    #[test]
    fn a_changed_byte_is_found_by_the_checksum_of_the_format() {
        for payload in [GZIP, ZSTD, XZ] {
            for at in 12..payload.len() - TRAILER {
                let mut changed = payload.to_vec();
                changed[at] ^= 0x40;
                // Some bytes say only how the rest is packed, such as gzip's time.
                if let Ok(unpacked) = unpack(&changed, 1000) {
                    assert_eq!(unpacked, data(), "{at} of {payload:x?}");
                }
            }
        }
    }

    #[test]
    fn one_cut_anywhere_is_refused() {
        for payload in ALL {
            for length in 0..payload.len() {
                assert!(unpack(&payload[..length], 1000).is_err(), "{length} of {payload:x?}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_mutated_payload_never_panics_and_stays_within_its_limit(
            which in 0usize..5,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let mut payload = ALL[which].to_vec();
            for (at, value) in changes {
                let at = at.index(payload.len());
                payload[at] = value;
            }
            if let Ok(unpacked) = unpack(&payload, 4096) {
                prop_assert!(unpacked.len() <= 4096);
            }
        }
    }
}
