//! What a disk's driver learns of it: the feature bits and the configuration space (virtio 1.2,
//! 5.2.3 and 5.2.4). Pure data.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::blk_request::{MOST_SECTORS, MOST_SEGMENTS, SECTOR};
use crate::disk::Disk;

/// The maximum size of the only queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// The offset of `writeback` in the configuration space.
pub(super) const WRITE_BACK: u64 = 32;
const SIZE: usize = 60;

/// The feature bits.
pub(super) fn features(disk: &Disk) -> u64 {
    let own: &[u32] = if disk.is_read_only() {
        &[VIRTIO_BLK_F_RO]
    } else {
        &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_F_CONFIG_WCE]
    };
    let all =
        [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_TOPOLOGY];
    all.iter().chain(own).fold(0, |bits, bit| bits | 1 << bit)
}

/// The configuration space.
pub(super) fn space(disk: &Disk, block_size: u32, is_write_back: bool) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    let mut put = |at: usize, value: &[u8]| {
        let place = bytes.iter_mut().skip(at);
        place.zip(value).for_each(|(to, from)| *to = *from);
    };
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    // Besides the header and the status.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &block_size.to_le_bytes());
    let best = disk.best_block().clamp(block_size, 1 << 20);
    let exponent = best.ilog2() - block_size.ilog2();
    put(24, &[u8::try_from(exponent).unwrap_or(0)]);
    put(26, &u16::try_from(best / block_size).unwrap_or(1).to_le_bytes());
    put(32, &[u8::from(is_write_back)]);
    put(34, &1u16.to_le_bytes());
    put(36, &MOST_SECTORS.to_le_bytes());
    put(40, &MOST_SEGMENTS.to_le_bytes());
    let alignment = u64::from(best) / SECTOR;
    put(44, &u32::try_from(alignment).unwrap_or(1).to_le_bytes());
    put(48, &MOST_SECTORS.to_le_bytes());
    put(52, &MOST_SEGMENTS.to_le_bytes());
    put(56, &[1]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Contents, Layer, open};

    #[test]
    fn a_disk_describes_itself() {
        let contents = Contents::Bytes(vec![0; 1 << 20]);
        let disk = open(contents.clone(), &Layer::None, false).unwrap();
        let bytes = space(&disk, 512, true);
        assert_eq!((&bytes[..8], &bytes[20..24]), (&2048u64.to_le_bytes()[..], &[0, 2, 0, 0][..]));
        // 4096 bytes are 2^3 blocks, and 8 of them.
        assert_eq!((bytes[24], bytes[26], bytes[32], bytes[34]), (3, 8, 1, 1));
        assert_eq!(space(&disk, 4096, false)[24..33], [0, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(features(&disk) & 1 << 5, 0);
        let reader = open(contents, &Layer::None, true).unwrap();
        assert_eq!(features(&reader) & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    }
}
