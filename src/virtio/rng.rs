//! The entropy device (virtio 1.2, 5.4): fills the driver's buffers with random bytes, of the
//! kernel's generator or, for tests that must repeat, of a seed. On the loop's thread.

use std::io::Write;
use std::sync::Arc;

use event_manager::EventOps;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::buffers::ChainWriter;
use super::device::VirtioDevice;
use super::queues::Queues;
use crate::bytes::Reader;
use crate::config::RngConfig;
use crate::error::Result;
use crate::sync::{Mutex, rank};

/// The most that one chain gets; a driver asks again.
const MOST: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub struct Rng {
    /// The state of the generator with a seed.
    seeded: Option<Mutex<SplitMix, rank::VirtioDevice>>,
}

/// SplitMix64: repeatable, and no more than that.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

impl Rng {
    /// With the kernel's generator, or the seed of the configuration.
    #[must_use]
    pub fn new(config: RngConfig) -> Self {
        Self { seeded: config.seed.map(|seed| Mutex::new(SplitMix(seed))) }
    }

    pub(super) fn from_spec(spec: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("rng", spec);
        let seed = if reader.is_empty() { None } else { Some(reader.u64()?) };
        reader.end()?;
        Ok(Self::new(RngConfig { seed }))
    }

    fn fill(&self, bytes: &mut [u8]) -> usize {
        if let Some(seeded) = &self.seeded {
            let mut seeded = seeded.lock();
            for word in bytes.chunks_mut(8) {
                let next = seeded.next().to_le_bytes();
                word.iter_mut().zip(next).for_each(|(byte, next)| *byte = next);
            }
            return bytes.len();
        }
        // SAFETY: the pointer and length are those of the slice.
        let got =
            unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
        usize::try_from(got).unwrap_or(0)
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn process_queue(&self, queues: &Arc<Queues>, queue: usize, _ops: &mut EventOps<'_>) {
        let Some(access) = queues.access() else { return };
        while let Some(chain) = access.pop(queue) {
            let mut writer = ChainWriter::new(&access, &chain);
            let wanted = usize::try_from(writer.left()).unwrap_or(MOST).min(MOST);
            let mut bytes = vec![0; wanted];
            let got = self.fill(&mut bytes);
            // Fails only if memory has been removed: what was written is counted.
            let _ = writer.write_all(bytes.get(..got).unwrap_or_default());
            let written = writer.written();
            access.complete(chain, written);
        }
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = self.seeded.as_ref().map(|seeded| seeded.lock().0.to_le_bytes().to_vec());
        Ok(state.unwrap_or_default())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = Reader::new("rng", state);
        if let Some(seeded) = &self.seeded {
            seeded.lock().0 = reader.u64()?;
        }
        reader.end()
    }

    fn spec(&self) -> Vec<u8> {
        self.seeded
            .as_ref()
            .map(|seeded| seeded.lock().0.to_le_bytes().to_vec())
            .unwrap_or_default()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}
