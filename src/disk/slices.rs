//! The buffers of a read or a write: pieces of guest memory, which a guest may change at any time,
//! or of this process. No reference to their bytes is made. Any thread.

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

/// A piece of memory.
pub type Slice<'a> = VolatileSlice<'a>;

/// Some pieces, in order.
pub(super) type Slices<'a> = SmallVec<[Slice<'a>; 8]>;

/// Bytes of this process, to be read only.
#[must_use]
pub fn of_bytes(bytes: &[u8]) -> [Slice<'_>; 1] {
    // SAFETY: the bytes live as long as the slice, and a write to a disk only reads its buffers.
    [unsafe { Slice::new(bytes.as_ptr().cast_mut(), bytes.len()) }]
}

/// Bytes of this process, to be filled.
#[must_use]
pub fn of_bytes_mut(bytes: &mut [u8]) -> [Slice<'_>; 1] {
    [Slice::from(bytes)]
}

/// The bytes in all of them.
pub(super) fn length(buffers: &[Slice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

/// The pieces of some of the bytes.
pub(super) fn part<'a>(buffers: &[Slice<'a>], mut skip: u64, mut count: u64) -> Slices<'a> {
    let mut found = Slices::new();
    for buffer in buffers {
        let length = buffer.len() as u64;
        if skip >= length {
            skip -= length;
            continue;
        }
        let take = (length - skip).min(count);
        let bounds = (usize::try_from(skip), usize::try_from(take));
        if let (Ok(start), Ok(size)) = bounds
            && size > 0
            && let Ok(piece) = buffer.subslice(start, size)
        {
            found.push(piece);
        }
        (skip, count) = (0, count - take);
        if count == 0 {
            break;
        }
    }
    found
}

/// Copy bytes into the buffers, from this position on.
pub(super) fn fill(buffers: &[Slice<'_>], at: u64, mut bytes: &[u8]) {
    for piece in part(buffers, at, bytes.len() as u64) {
        let (now, rest) = bytes.split_at(piece.len().min(bytes.len()));
        piece.copy_from(now);
        bytes = rest;
    }
}

/// Copy bytes out of the buffers, from this position on.
pub(super) fn take(buffers: &[Slice<'_>], at: u64, mut bytes: &mut [u8]) {
    for piece in part(buffers, at, bytes.len() as u64) {
        let (now, rest) = bytes.split_at_mut(piece.len().min(bytes.len()));
        piece.copy_to(now);
        bytes = rest;
    }
}

/// Set a part of the buffers to zero.
pub(super) fn clear(buffers: &[Slice<'_>], at: u64, count: u64) {
    for piece in part(buffers, at, count) {
        let start = piece.ptr_guard_mut();
        // SAFETY: the slice has these bytes, and they belong to no Rust object.
        unsafe { std::ptr::write_bytes(start.as_ptr(), 0, piece.len()) };
    }
}

/// All bytes of the buffers.
pub(super) fn to_vec(buffers: &[Slice<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length(buffers)).unwrap_or(0)];
    take(buffers, 0, &mut bytes);
    bytes
}

/// As the kernel takes them.
pub(super) fn iovecs(buffers: &[Slice<'_>]) -> SmallVec<[libc::iovec; 8]> {
    let iovec = |buffer: &Slice<'_>| libc::iovec {
        iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
        iov_len: buffer.len(),
    };
    buffers.iter().map(iovec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cross_the_pieces() {
        let (mut one, mut two, mut three) = ([1u8, 2], [3u8], [4u8, 5, 6]);
        let buffers =
            [Slice::from(&mut one[..]), Slice::from(&mut two[..]), Slice::from(&mut three[..])];
        assert_eq!(length(&buffers), 6);
        assert_eq!(to_vec(&part(&buffers, 1, 3)), [2, 3, 4]);
        assert_eq!(to_vec(&part(&buffers, 5, 9)), [6]);
        assert!(part(&buffers, 6, 1).is_empty() && part(&buffers, 0, 0).is_empty());
        fill(&buffers, 1, &[7, 8, 9]);
        clear(&buffers, 4, 1);
        assert_eq!(to_vec(&buffers), [1, 7, 8, 9, 0, 6]);
        let mut out = [0; 2];
        take(&buffers, 2, &mut out);
        assert_eq!(out, [8, 9]);
        assert_eq!(iovecs(&buffers).iter().map(|iovec| iovec.iov_len).sum::<usize>(), 6);
    }
}
