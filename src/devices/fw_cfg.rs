//! fw_cfg: files and facts for firmware and kernels, by QEMU's interface of a selector, a data port
//! and DMA. vCPU threads access it. Nothing can be written.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Device;
use crate::bytes::{Reader, bad};
use crate::error::Result;
use crate::exit_handler::Outcome;
use crate::layout;
use crate::memory::GuestMemory;
use crate::sync::{Mutex, rank};

/// Ports, as offsets from 0x510.
const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;

/// Keys of items.
const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_SIZE: u16 = 0x03;
const VCPUS: u16 = 0x05;
const MAX_CPUS: u16 = 0x0f;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// The most files: keys have fourteen bits.
const MAX_FILES: usize = 0x3fe0;

/// The id: the data port, and DMA.
const FEATURES: u32 = 0b11;
/// What a guest reads at the DMA ports.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// A name in the directory, with its closing zero.
const NAME_SIZE: usize = 56;
/// The file with the ranges of memory, and their type.
const E820: &str = "etc/e820";
const RAM: u32 = 1;

/// Bits of a DMA access; the upper half has the key to select.
mod control {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
}

/// The items by key.
type Items = BTreeMap<u16, Arc<[u8]>>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    items: Items,
    selected: u16,
    offset: usize,
    dma_high: u32,
}

impl State {
    fn select(&mut self, key: u16) {
        (self.selected, self.offset) = (key, 0);
    }

    /// What is left of the selected item, of at most this length, and skip this length.
    fn take(&mut self, length: usize) -> (Arc<[u8]>, std::ops::Range<usize>) {
        let item = self.items.get(&self.selected).cloned().unwrap_or_default();
        let start = self.offset.min(item.len());
        let end = start.saturating_add(length).min(item.len());
        self.offset = self.offset.saturating_add(length);
        (item, start..end)
    }

    fn to_bytes(&self) -> Vec<u8> {
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = self.selected.to_le_bytes().to_vec();
        bytes.extend(number(self.offset));
        bytes.extend(self.dma_high.to_le_bytes());
        for (key, item) in &self.items {
            bytes.extend(key.to_le_bytes());
            bytes.extend(number(item.len()));
            bytes.extend(item.iter());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("fw_cfg", bytes);
        let selected = reader.u16()?;
        let size = |reader: &mut Reader<'_>| {
            reader.u32().map(|size| usize::try_from(size).unwrap_or(usize::MAX))
        };
        let offset = size(&mut reader)?;
        let dma_high = reader.u32()?;
        let mut items = Items::new();
        while !reader.is_empty() {
            let (key, length) = (reader.u16()?, size(&mut reader)?);
            items.insert(key, reader.bytes(length)?.into());
        }
        Ok(Self { items, selected, offset, dma_high })
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct FwCfg {
    state: Mutex<State, rank::FwCfg>,
    memory: GuestMemory,
}

impl FwCfg {
    /// For a machine with this many vCPUs, and these files besides its own.
    pub(crate) fn new(
        memory: GuestMemory,
        (size, vcpus): (u64, u64),
        files: &[(String, Vec<u8>)],
    ) -> Self {
        let state = State { items: items(size, vcpus, files), ..State::default() };
        Self { state: Mutex::new(state), memory }
    }

    /// A DMA access, whose description is at this address.
    fn access(&self, at: u64) {
        let mut description = [0; 16];
        // What is not in memory cannot be told of its error either, nor what is in ROM.
        if self.memory.read(at, &mut description).is_ok() {
            let result = if self.transfer(description).is_ok() { 0 } else { control::ERROR };
            if self.memory.check_guest_writes(at, 4).is_ok() {
                let _ = self.memory.write(at, &result.to_be_bytes());
            }
        }
    }

    fn transfer(&self, description: [u8; 16]) -> Result<()> {
        let mut reader = Reader::new("fw_cfg", &description);
        let mut next = || reader.take::<4>().map(u32::from_be_bytes);
        let (bits, length, high, low) = (next()?, next()?, next()?, next()?);
        let address = u64::from(high) << 32 | u64::from(low);
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        // The state's lock ranks above the memory's.
        let (item, part) = {
            let mut state = self.state.lock();
            if bits & control::SELECT != 0 {
                state.select(u16::try_from(bits >> 16).unwrap_or(0));
            }
            match bits & (control::READ | control::WRITE | control::SKIP) {
                0 => return Ok(()),
                bits if bits & control::READ != 0 => {}
                bits if bits & control::WRITE != 0 => {
                    return Err(bad("fw_cfg", "nothing can be written"));
                }
                _ => {
                    state.take(count);
                    return Ok(());
                }
            }
            state.take(count)
        };
        self.memory.check_guest_writes(address, u64::from(length))?;
        let data = item.get(part).unwrap_or_default();
        self.memory.write(address, data)?;
        let done = data.len() as u64;
        match u64::from(length) - done {
            0 => Ok(()),
            rest => self.memory.fill(address + done, rest, 0),
        }
    }
}

/// The items of a machine.
fn items(size: u64, vcpus: u64, files: &[(String, Vec<u8>)]) -> Items {
    let vcpus = u16::try_from(vcpus).unwrap_or(u16::MAX).to_le_bytes();
    let mut items = Items::from([
        (SIGNATURE, Arc::from(*b"QEMU")),
        (ID, Arc::from(FEATURES.to_le_bytes())),
        (RAM_SIZE, Arc::from(size.to_le_bytes())),
        (VCPUS, Arc::from(vcpus)),
        (MAX_CPUS, Arc::from(vcpus)),
    ]);
    let e820: Vec<u8> = layout::ram_ranges(size)
        .into_iter()
        .flat_map(|(start, length)| {
            let numbers = [start.to_le_bytes(), length.to_le_bytes()].concat();
            numbers.into_iter().chain(RAM.to_le_bytes())
        })
        .collect();
    let mut all: Vec<(&str, &[u8])> = vec![(E820, &e820)];
    all.extend(files.iter().map(|(name, data)| (name.as_str(), data.as_slice())));
    all.sort_unstable();
    all.truncate(MAX_FILES);
    let mut directory = u32::try_from(all.len()).unwrap_or(0).to_be_bytes().to_vec();
    for (key, (name, data)) in (FIRST_FILE..).zip(all) {
        let mut entry = [0; NAME_SIZE];
        entry.iter_mut().zip(name.bytes().take(NAME_SIZE - 1)).for_each(|(to, from)| *to = from);
        directory.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        directory.extend(key.to_be_bytes());
        directory.extend([0; 2]);
        directory.extend(entry);
        items.insert(key, Arc::from(data));
    }
    items.insert(DIRECTORY, Arc::from(directory));
    items
}

/// Check the names of files.
///
/// # Errors
/// What is wrong with the first bad one.
pub(crate) fn check_names<'a>(
    names: impl Iterator<Item = &'a str>,
) -> std::result::Result<(), String> {
    let mut count = 1;
    for name in names {
        count += 1;
        if name == E820 {
            return Err(format!("{name}: pyvmm provides this file"));
        }
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("{name:?} is not a name of printable ASCII without blanks"));
        }
        if name.len() >= NAME_SIZE {
            return Err(format!("{name}: {} bytes, at most {} fit", name.len(), NAME_SIZE - 1));
        }
    }
    if count > MAX_FILES { Err(format!("more than {} files", MAX_FILES - 1)) } else { Ok(()) }
}

impl Device for FwCfg {
    fn name(&self) -> &str {
        "fw_cfg"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        for (offset, byte) in (offset..).zip(data) {
            *byte = match offset {
                DATA => {
                    let (item, part) = self.state.lock().take(1);
                    item.get(part).and_then(<[u8]>::first).copied().unwrap_or(0)
                }
                DMA_HIGH.. => usize::try_from(offset - DMA_HIGH)
                    .ok()
                    .and_then(|at| DMA_SIGNATURE.get(at).copied())
                    .unwrap_or(0),
                _ => 0,
            };
        }
        Outcome::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match (offset, data) {
            (SELECTOR, [low, high]) => self.state.lock().select(u16::from_le_bytes([*low, *high])),
            (DMA_HIGH, [a, b, c, d]) => {
                self.state.lock().dma_high = u32::from_be_bytes([*a, *b, *c, *d]);
            }
            (DMA_LOW, [a, b, c, d]) => {
                let low = u32::from_be_bytes([*a, *b, *c, *d]);
                let high = std::mem::take(&mut self.state.lock().dma_high);
                self.access(u64::from(high) << 32 | u64::from(low));
            }
            _ => {}
        }
        Outcome::Continue
    }

    /// The selected key, the offset in its item, and the upper half of the next DMA address; then
    /// each item, with its key and length.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.state.lock().to_bytes())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let restored = State::from_bytes(state)?;
        if restored.items.len() > usize::from(u16::MAX) {
            return Err(bad("fw_cfg", "it has too many items"));
        }
        *self.state.lock() = restored;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn device(files: &[(String, Vec<u8>)]) -> FwCfg {
        FwCfg::new(GuestMemory::new(1 << 20).unwrap(), (5 << 30, 3), files)
    }

    fn item(device: &FwCfg, key: u16, length: usize) -> Vec<u8> {
        device.write(SELECTOR, &key.to_le_bytes());
        let mut byte = [0];
        (0..length)
            .map(|_| {
                device.read(DATA, &mut byte);
                byte[0]
            })
            .collect()
    }

    /// A DMA access; returns the control field after it.
    fn dma(device: &FwCfg, bits: u32, length: u32, address: u64) -> u32 {
        let description =
            [&bits.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()].concat();
        device.memory.write(0x100, &description).unwrap();
        device.write(DMA_HIGH, &[0; 4]);
        device.write(DMA_LOW, &0x100_u32.to_be_bytes());
        let mut control = [0; 4];
        device.memory.read(0x100, &mut control).unwrap();
        u32::from_be_bytes(control)
    }

    #[test]
    fn the_items_and_the_directory_are_as_drivers_expect() {
        let device = device(&[("opt/org.example/x".into(), b"hello".to_vec())]);
        assert_eq!(item(&device, SIGNATURE, 5), b"QEMU\0");
        assert_eq!(item(&device, ID, 4), 3_u32.to_le_bytes());
        assert_eq!(item(&device, RAM_SIZE, 8), (5_u64 << 30).to_le_bytes());
        assert_eq!(item(&device, VCPUS, 2), [3, 0]);
        let directory = item(&device, DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..4], 2_u32.to_be_bytes());
        assert_eq!(directory[4..12], [0, 0, 0, 40, 0, 0x20, 0, 0]);
        assert!(directory[12..].starts_with(b"etc/e820\0"));
        assert_eq!(directory[68..76], [0, 0, 0, 5, 0, 0x21, 0, 0]);
        assert!(directory[76..].starts_with(b"opt/org.example/x\0"));
        assert_eq!(item(&device, 0x21, 7), b"hello\0\0", "zeros follow");
        let e820 = item(&device, 0x20, 40);
        assert_eq!(e820[20..28], (4_u64 << 30).to_le_bytes());
        assert_eq!(e820[28..36], (2_u64 << 30).to_le_bytes());
    }

    #[test]
    fn dma_selects_reads_and_skips_and_nothing_else() {
        let device = device(&[("a".into(), b"0123456789".to_vec())]);
        let select = control::SELECT | 0x20 << 16;
        assert_eq!(dma(&device, select | control::READ, 4, 0x200), 0);
        assert_eq!(dma(&device, control::SKIP, 2, 0), 0);
        assert_eq!(dma(&device, control::READ, 6, 0x204), 0);
        let mut read = [0; 10];
        device.memory.read(0x200, &mut read).unwrap();
        assert_eq!(&read, b"01236789\0\0");
        assert_eq!(dma(&device, select | control::WRITE, 4, 0x200), control::ERROR);
        assert_eq!(dma(&device, select | control::READ, 4, 0xffff_fffd), control::ERROR);
        assert_eq!(dma(&device, select | control::READ, u32::MAX, 0x200), control::ERROR);
        assert_eq!(dma(&device, 0x99 << 16 | control::SELECT | control::READ, 4, 0x200), 0);
        device.write(DMA_HIGH, &[0xff; 4]);
        device.write(DMA_LOW, &[0xff; 4]);
        let mut signature = [0; 8];
        device.read(DMA_HIGH, &mut signature);
        assert_eq!(&signature, b"QEMU CFG");
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let check = |name: &str| check_names(std::iter::once(name));
        assert!(check(&"n".repeat(55)).is_ok());
        for name in ["", "a b", "\0", "ä", "etc/e820", &"n".repeat(56)] {
            assert!(check(name).is_err(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn no_accesses_panic_and_what_is_saved_comes_back(
            accesses in prop::collection::vec((any::<bool>(), 0u64..14, any::<[u8; 4]>(), 1usize..5), 0..40),
            dmas in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u64>()), 0..4),
        ) {
            let device = device(&[("a".into(), vec![7; 300])]);
            for (is_write, offset, mut data, size) in accesses {
                let data = &mut data[..size];
                if is_write { device.write(offset, data); } else { device.read(offset, data); }
            }
            for (bits, length, address) in dmas {
                prop_assert!([0, control::ERROR].contains(&dma(&device, bits, length, address)));
            }
            let other = self::device(&[]);
            other.restore(&device.save().unwrap()).unwrap();
            prop_assert_eq!(other.save().unwrap(), device.save().unwrap());
        }

        #[test]
        fn no_bytes_make_a_restore_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = device(&[]).restore(&bytes);
        }
    }
}
