//! The requests of 9P2000.L, parsed from a guest's bytes. Pure data.

use super::wire::{Answer, Errno, Fields, Name};

/// The most names of one walk.
const MOST_NAMES: u16 = 16;

/// What a request begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u8,
    pub(super) tag: u16,
}

/// New values of some attributes; None leaves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) accessed: Option<Time>,
    pub(super) modified: Option<Time>,
}

/// A time of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Time {
    Now,
    At { seconds: i64, nanoseconds: u64 },
}

/// A lock of a range, or a question about one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range<'a> {
    pub(super) kind: u8,
    pub(super) start: u64,
    /// 0 for up to the end.
    pub(super) length: u64,
    pub(super) process: u32,
    pub(super) client: &'a [u8],
}

/// A request. `fid` is the file that it is about, or the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request<'a> {
    Version {
        msize: u32,
        version: &'a [u8],
    },
    Attach {
        fid: u32,
        name: &'a [u8],
    },
    Flush,
    Walk {
        fid: u32,
        new: u32,
        names: Vec<Name>,
    },
    Open {
        fid: u32,
        flags: u32,
    },
    Create {
        fid: u32,
        name: Name,
        flags: u32,
        mode: u32,
    },
    Read {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Write {
        fid: u32,
        offset: u64,
        data: &'a [u8],
    },
    Clunk {
        fid: u32,
    },
    Remove {
        fid: u32,
    },
    StatFs {
        fid: u32,
    },
    Rename {
        fid: u32,
        directory: u32,
        name: Name,
    },
    RenameAt {
        from: u32,
        old: Name,
        to: u32,
        new: Name,
    },
    ReadLink {
        fid: u32,
    },
    GetAttributes {
        fid: u32,
        mask: u64,
    },
    SetAttributes {
        fid: u32,
        attributes: Attributes,
    },
    ReadDirectory {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Sync {
        fid: u32,
        data_only: bool,
    },
    Lock {
        fid: u32,
        range: Range<'a>,
    },
    GetLock {
        fid: u32,
        range: Range<'a>,
    },
    Link {
        directory: u32,
        fid: u32,
        name: Name,
    },
    MakeDirectory {
        fid: u32,
        name: Name,
        mode: u32,
    },
    MakeNode {
        fid: u32,
        name: Name,
        mode: u32,
    },
    Symlink {
        fid: u32,
        name: Name,
        target: &'a [u8],
    },
    UnlinkAt {
        fid: u32,
        name: Name,
        flags: u32,
    },
    /// Extended attributes, authentication, and the messages of other dialects.
    Unsupported,
}

/// The header of a message and its body. None if it is too short for a header, or shorter than it
/// says.
pub(super) fn split(message: &[u8]) -> Option<(Header, &[u8])> {
    let mut fields = Fields(message);
    let size = usize::try_from(fields.u32().ok()?).ok()?;
    let header = Header { kind: fields.u8().ok()?, tag: fields.u16().ok()? };
    Some((header, message.get(7..size)?))
}

impl<'a> Request<'a> {
    /// Parse the body of a message. What follows the fields is ignored.
    pub(super) fn parse(kind: u8, body: &'a [u8]) -> Answer<Self> {
        let mut fields = Fields(body);
        match kind {
            100..=122 => Self::of_9p2000(kind, &mut fields),
            8..=29 => Self::of_files(kind, &mut fields),
            _ => Self::of_directories(kind, &mut fields),
        }
    }

    fn of_9p2000(kind: u8, f: &mut Fields<'a>) -> Answer<Self> {
        Ok(match kind {
            100 => Self::Version { msize: f.u32()?, version: f.string()? },
            104 => {
                let fid = f.u32()?;
                let (_auth, _user) = (f.u32()?, f.string()?);
                Self::Attach { fid, name: f.string()? }
            }
            108 => Self::Flush,
            110 => {
                let (fid, new, count) = (f.u32()?, f.u32()?, f.u16()?);
                if count > MOST_NAMES {
                    return Err(Errno(libc::EINVAL));
                }
                let names = (0..count).map(|_| f.name()).collect::<Answer<_>>()?;
                Self::Walk { fid, new, names }
            }
            116 => Self::Read { fid: f.u32()?, offset: f.u64()?, count: f.u32()? },
            118 => {
                let (fid, offset, count) = (f.u32()?, f.u64()?, f.u32()?);
                Self::Write { fid, offset, data: f.bytes(count)? }
            }
            120 => Self::Clunk { fid: f.u32()? },
            122 => Self::Remove { fid: f.u32()? },
            _ => Self::Unsupported,
        })
    }

    fn of_files(kind: u8, f: &mut Fields<'a>) -> Answer<Self> {
        Ok(match kind {
            8 => Self::StatFs { fid: f.u32()? },
            12 => Self::Open { fid: f.u32()?, flags: f.u32()? },
            14 => {
                let (fid, name) = (f.u32()?, f.name()?);
                Self::Create { fid, name, flags: f.u32()?, mode: f.u32()? }
            }
            16 => Self::Symlink { fid: f.u32()?, name: f.name()?, target: f.string()? },
            18 => Self::MakeNode { fid: f.u32()?, name: f.name()?, mode: f.u32()? },
            20 => Self::Rename { fid: f.u32()?, directory: f.u32()?, name: f.name()? },
            22 => Self::ReadLink { fid: f.u32()? },
            24 => Self::GetAttributes { fid: f.u32()?, mask: f.u64()? },
            26 => Self::SetAttributes { fid: f.u32()?, attributes: attributes(f)? },
            _ => Self::Unsupported,
        })
    }

    fn of_directories(kind: u8, f: &mut Fields<'a>) -> Answer<Self> {
        Ok(match kind {
            40 => Self::ReadDirectory { fid: f.u32()?, offset: f.u64()?, count: f.u32()? },
            50 => {
                let fid = f.u32()?;
                // Old clients do not send it.
                Self::Sync { fid, data_only: !f.is_empty() && f.u32()? != 0 }
            }
            52 => {
                let (fid, kind, _flags) = (f.u32()?, f.u8()?, f.u32()?);
                Self::Lock { fid, range: range(kind, f)? }
            }
            54 => {
                let (fid, kind) = (f.u32()?, f.u8()?);
                Self::GetLock { fid, range: range(kind, f)? }
            }
            70 => Self::Link { directory: f.u32()?, fid: f.u32()?, name: f.name()? },
            72 => Self::MakeDirectory { fid: f.u32()?, name: f.name()?, mode: f.u32()? },
            74 => {
                let (from, old) = (f.u32()?, f.name()?);
                Self::RenameAt { from, old, to: f.u32()?, new: f.name()? }
            }
            76 => Self::UnlinkAt { fid: f.u32()?, name: f.name()?, flags: f.u32()? },
            _ => Self::Unsupported,
        })
    }
}

fn attributes(f: &mut Fields<'_>) -> Answer<Attributes> {
    let valid = f.u32()?;
    let has = |bit: u32| valid & bit != 0;
    let (mode, uid, gid, size) = (f.u32()?, f.u32()?, f.u32()?, f.u64()?);
    let mut time = |bit: u32, set: u32| {
        let (seconds, nanoseconds) = (f.u64()?.cast_signed(), f.u64()?);
        let time = if has(set) { Time::At { seconds, nanoseconds } } else { Time::Now };
        Ok(has(bit).then_some(time))
    };
    Ok(Attributes {
        mode: has(1).then_some(mode),
        uid: has(2).then_some(uid),
        gid: has(4).then_some(gid),
        size: has(8).then_some(size),
        accessed: time(0x10, 0x80)?,
        modified: time(0x20, 0x100)?,
    })
}

fn range<'a>(kind: u8, f: &mut Fields<'a>) -> Answer<Range<'a>> {
    let (start, length, process) = (f.u64()?, f.u64()?, f.u32()?);
    Ok(Range { kind, start, length, process, client: f.string()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_as_long_as_it_says() {
        let message = [8, 0, 0, 0, 120, 1, 0, 5, 6];
        assert_eq!(split(&message), Some((Header { kind: 120, tag: 1 }, &[5][..])));
        assert_eq!(split(&message[..7]), None);
        assert_eq!(split(&[6, 0, 0, 0, 120, 1, 0]), None);
        assert_eq!(split(&[255, 255, 255, 255, 120, 1, 0]), None);
        assert_eq!(split(&[]), None);
    }

    #[test]
    fn a_walk_of_too_many_names_is_refused() {
        let body = [&[0; 8][..], &[17, 0], &[1, 0, b'a'].repeat(17)].concat();
        assert_eq!(Request::parse(110, &body), Err(Errno(libc::EINVAL)));
    }

    #[test]
    fn attributes_are_those_that_are_valid() {
        let mut body = vec![0; 4];
        body.extend(0x1a1_u32.to_le_bytes());
        body.extend([0xff; 12]);
        body.extend([0; 40]);
        let found = Request::parse(26, &body).unwrap();
        let modified = Some(Time::At { seconds: 0, nanoseconds: 0 });
        let attributes = Attributes { mode: Some(u32::MAX), modified, ..Attributes::default() };
        assert_eq!(found, Request::SetAttributes { fid: 0, attributes });
        assert_eq!(Request::parse(26, &body[..50]), Err(Errno(libc::EPROTO)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(kind in any::<u8>(), body in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Request::parse(kind, &body);
        }
    }
}
