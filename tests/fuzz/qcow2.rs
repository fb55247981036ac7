//! `make fuzz`: qcow2 images that are damaged at random, in their headers and their tables, which a
//! machine then reads and writes. A panic that the disk does not catch, a request that takes too
//! long, a large allocation, and any access to another file are findings. See campaign.rs for the
//! arguments.

// A program for tests: what it cannot do it says by a panic.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

mod allocations;
mod campaign;
mod chance;
mod corpus;
mod coverage;
mod panics;
mod qcow2_run;

use campaign::Target;
use chance::Chance;
use qcow2_run::{Count, Folder};

const MOST_BYTES: usize = 1 << 16;
/// The fields of a header: where they are and how many bytes they have.
const FIELDS: [(usize, usize); 20] = [
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    (112, 4),
    (116, 4),
];

struct Images {
    folder: Folder,
    count: Count,
}

impl Chance {
    fn value(&mut self) -> u64 {
        const USUAL: [u64; 14] = [
            0,
            1,
            3,
            9,
            21,
            0x200,
            0x600,
            0x800,
            0x1_0000,
            0xffff_ffff,
            1 << 56,
            1 << 62,
            1 << 63,
            u64::MAX,
        ];
        match self.below(4) {
            0 => self.below(32) as u64,
            // A cluster that is there, with the flags of an entry.
            1 => (self.below(64) as u64) << 9 | (self.below(8) as u64) << 61,
            2 => 1 << self.below(64),
            _ => USUAL[self.below(USUAL.len())].wrapping_add(self.below(3) as u64).wrapping_sub(1),
        }
    }
}

/// Write a big-endian number of so many bytes.
fn put(bytes: &mut [u8], at: usize, size: usize, value: u64) {
    let value = value.to_be_bytes();
    if let Some(place) = bytes.get_mut(at..at + size) {
        place.copy_from_slice(&value[8 - size..]);
    }
}

impl Target for Images {
    type Input = Vec<u8>;
    const NAME: &'static str = "qcow2";
    /// What the check of a header admits: a first-level table of 32 MiB.
    const MAX_ALLOCATION: usize = 48 << 20;

    fn parse(&self, bytes: &[u8]) -> Vec<u8> {
        bytes.to_vec()
    }

    fn print(&self, input: &Vec<u8>) -> Vec<u8> {
        input.clone()
    }

    fn change(&self, input: &mut Vec<u8>, other: &Vec<u8>, chance: &mut Chance) {
        for _ in 0..=chance.below(5) {
            let at = chance.below(input.len());
            let rest = input.len() - at;
            match chance.below(10) {
                _ if rest < 8 => input.extend([0; 512]),
                0..=2 => {
                    let (at, size) = FIELDS[chance.below(FIELDS.len())];
                    put(input, at, size, chance.value());
                }
                // An entry of a table.
                3..=5 => put(input, at & !7, 8, chance.value()),
                6 => input[at] ^= 1 << chance.below(8),
                7 => {
                    let size = [8, 64, 512][chance.below(3)].min(rest);
                    let to = chance.below(input.len() - size + 1) & !7;
                    input.copy_within(at..at + size, to);
                }
                8 => {
                    let from = chance.below(other.len());
                    let size = 512.min(other.len() - from).min(rest);
                    input[at..at + size].copy_from_slice(&other[from..from + size]);
                }
                _ if chance.below(4) == 0 => input.truncate(at),
                _ => input.extend(vec![0; chance.below(4096)]),
            }
        }
        input.truncate(MOST_BYTES);
    }

    fn run(&mut self, input: &Vec<u8>) -> Result<(), String> {
        let found = qcow2_run::run(input, &self.folder)?;
        self.count.images += found.images;
        self.count.opened += found.opened;
        self.count.requests += found.requests;
        self.count.failed += found.failed;
        Ok(())
    }

    fn report(&self) -> Vec<String> {
        let Count { images, opened, requests, failed } = self.count;
        let caught = panics::take_caught();
        vec![format!(
            "{images} images, opened {opened} times; {requests} requests, {failed} failed; {caught} panics of imago caught"
        )]
    }
}

fn main() {
    let corpus = std::env::args().nth(1).expect("a corpus, seconds, a seed");
    let base = std::fs::read(format!("{corpus}/plain")).unwrap();
    campaign::run(&mut Images { folder: Folder::new(&base), count: Count::default() });
}
