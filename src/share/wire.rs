//! The fields of 9P2000.L messages: little-endian numbers, and strings with a length of 16 bits.
//! Pure data.

use std::ffi::CString;

/// An error number of the host, which is what an Rlerror has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Errno(pub(super) i32);

/// What a request comes to.
pub(super) type Answer<T> = Result<T, Errno>;

impl Errno {
    /// That of the last system call.
    pub(super) fn last() -> Self {
        Self(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }

    pub(super) fn number(self) -> u32 {
        u32::try_from(self.0).unwrap_or(5)
    }
}

/// The name of an entry of a directory: not empty, not `.` or `..`, with no `/` and no NUL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name(CString);

impl Name {
    pub(super) fn new(bytes: &[u8]) -> Answer<Self> {
        if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
            return Err(Errno(libc::EINVAL));
        }
        CString::new(bytes).map(Self).map_err(|_| Errno(libc::EINVAL))
    }

    pub(super) fn as_c_str(&self) -> &std::ffi::CStr {
        &self.0
    }
}

/// Takes fields from the front of a request.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Answer<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Errno(libc::EPROTO))?;
        self.0 = rest;
        Ok(*first)
    }

    pub(super) fn u8(&mut self) -> Answer<u8> {
        self.take().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Answer<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Answer<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Answer<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn bytes(&mut self, length: u32) -> Answer<&'a [u8]> {
        let length = usize::try_from(length).map_err(|_| Errno(libc::EPROTO))?;
        let (first, rest) = self.0.split_at_checked(length).ok_or(Errno(libc::EPROTO))?;
        self.0 = rest;
        Ok(first)
    }

    pub(super) fn string(&mut self) -> Answer<&'a [u8]> {
        let length = self.u16()?;
        self.bytes(u32::from(length))
    }

    pub(super) fn name(&mut self) -> Answer<Name> {
        self.string().and_then(Name::new)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What identifies a file to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Qid {
    pub(super) kind: u8,
    pub(super) version: u32,
    pub(super) path: u64,
}

pub(super) const QID_LENGTH: usize = 13;

/// A reply that is being written.
#[derive(Debug)]
pub(super) struct Reply(Vec<u8>);

impl Reply {
    /// Size, type and tag.
    pub(super) const HEADER: usize = 7;

    pub(super) fn new(tag: u16) -> Self {
        let mut bytes = vec![0; 5];
        bytes.extend(tag.to_le_bytes());
        Self(bytes)
    }

    /// The reply as bytes, with its type and size.
    pub(super) fn finish(mut self, kind: u8) -> Vec<u8> {
        let size = u32::try_from(self.0.len()).unwrap_or(u32::MAX).to_le_bytes();
        self.0.iter_mut().zip(size.into_iter().chain([kind])).for_each(|(to, from)| *to = from);
        self.0
    }

    pub(super) fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A string. What is longer than 64 KiB is cut.
    pub(super) fn string(&mut self, bytes: &[u8]) -> &mut Self {
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.u16(length);
        self.0.extend(bytes.iter().take(usize::from(length)));
        self
    }

    pub(super) fn qid(&mut self, qid: Qid) -> &mut Self {
        self.u8(qid.kind).u32(qid.version).u64(qid.path)
    }

    /// A count of 32 bits and so many bytes, of at most `most`, which `fill` writes.
    pub(super) fn counted(
        &mut self,
        most: usize,
        fill: impl FnOnce(&mut [u8]) -> Answer<usize>,
    ) -> Answer<()> {
        let start = self.0.len() + 4;
        self.0.resize(start + most, 0);
        let filled = fill(self.0.get_mut(start..).unwrap_or_default())?.min(most);
        self.0.truncate(start + filled);
        let count = u32::try_from(filled).unwrap_or(0).to_le_bytes();
        self.0.iter_mut().skip(start - 4).zip(count).for_each(|(to, from)| *to = from);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_are_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"../x", b"a\0b", b"\0"] {
            assert_eq!(Name::new(bad), Err(Errno(libc::EINVAL)), "{bad:?}");
        }
        for good in [&b"a"[..], b"...", b"..a", b" ", b"\xff\xfe", b"a\\b"] {
            assert_eq!(Name::new(good).unwrap().as_c_str().to_bytes(), good);
        }
    }

    #[test]
    fn a_reply_has_its_size_type_and_tag() {
        let mut reply = Reply::new(0x1234);
        reply.u8(1).string(b"ab");
        assert_eq!(reply.finish(9), [12, 0, 0, 0, 9, 0x34, 0x12, 1, 2, 0, b'a', b'b']);
        let mut reply = Reply::new(0);
        reply
            .counted(9, |room| {
                room[..2].fill(7);
                Ok(2)
            })
            .unwrap();
        assert_eq!(reply.finish(1)[7..], [2, 0, 0, 0, 7, 7]);
    }

    #[test]
    fn fields_end_where_the_bytes_do() {
        let mut fields = Fields(&[3, 0, b'a', b'b']);
        assert_eq!(fields.string(), Err(Errno(libc::EPROTO)));
        assert_eq!(Fields(&[1]).u16(), Err(Errno(libc::EPROTO)));
    }
}
