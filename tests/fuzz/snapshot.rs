//! `make fuzz`: changes a snapshot's file at random and loads it, for so many seconds. A panic or a
//! crash is a finding; what the files came to is counted. Arguments: a file to start from, seconds,
//! and a seed.

// A program for tests: what it cannot do it says by a panic.
#![allow(clippy::expect_used, clippy::print_stdout, clippy::unwrap_used)]

mod chance;

use std::path::Path;
use std::time::{Duration, Instant};

use chance::Chance;
use pyvmm::snapshot::{Load, load};
use pyvmm::vmm::ForkConfig;
use pyvmm::vmm::Vmm;

const HEADER: usize = 128;

fn mutate(bytes: &mut Vec<u8>, chance: &mut Chance) {
    // What is behind the state is pages, of which nothing is read.
    let state = usize::try_from(word(bytes, 24)).unwrap_or(0).clamp(8, 1 << 16);
    for _ in 0..=chance.below(6) {
        let at = chance.below((HEADER + state).min(bytes.len().saturating_sub(8)));
        match chance.below(8) {
            0 => bytes[at] ^= 1 << chance.below(8),
            1 => bytes[at] = u8::try_from(chance.below(256)).unwrap(),
            2 => bytes[at..at + 8].fill(0xff),
            3 => bytes[at..at + 8].fill(0),
            4 => bytes[at..at + 4]
                .copy_from_slice(&u32::try_from(chance.below(1 << 20)).unwrap().to_le_bytes()),
            5 => bytes[at..at + 8]
                .copy_from_slice(&(chance.below(1 << 40) as u64 & !4095).to_le_bytes()),
            6 => {
                let to = (at + 8 * chance.below(64)).min(bytes.len() - 8);
                bytes.copy_within(at..at + 8, to);
            }
            _ => bytes.truncate(bytes.len().saturating_sub(chance.below(64)).max(HEADER + 16)),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Make both checksums right, and mostly the length too.
fn mend(bytes: &mut [u8], chance: &mut Chance) {
    if chance.below(8) > 0 {
        let length = bytes.len() as u64;
        bytes[16..24].copy_from_slice(&length.to_le_bytes());
    }
    let end = word(bytes, 24).saturating_add(HEADER as u64).min(bytes.len() as u64);
    let state = crc32fast::hash(&bytes[HEADER..usize::try_from(end).unwrap()]);
    bytes[40..44].copy_from_slice(&state.to_le_bytes());
    bytes[12..16].fill(0);
    let header = crc32fast::hash(&bytes[..HEADER]);
    bytes[12..16].copy_from_slice(&header.to_le_bytes());
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().expect("a file, seconds, a seed");
    let (sample, seconds, seed) = (next(), next(), next());
    let original = std::fs::read(&sample).unwrap();
    let name = format!("{sample}.fuzzed");
    let path = Path::new(&name);
    let mut chance = Chance(seed.parse::<u64>().unwrap() | 1);
    let until = Instant::now() + Duration::from_secs(seconds.parse().unwrap());
    let (mut executions, mut loaded, mut forked) = (0u64, 0u64, 0u64);
    while Instant::now() < until {
        let mut bytes = original.clone();
        mutate(&mut bytes, &mut chance);
        if chance.below(16) > 0 && bytes.len() > HEADER {
            mend(&mut bytes, &mut chance);
        }
        std::fs::write(path, &bytes).unwrap();
        let copy = chance.below(4) == 0;
        let how = Load { base: None, force: chance.below(2) == 0, copy, verify: false };
        executions += 1;
        let Ok(snapshot) = load(path, &how, |_, _| Ok::<_, pyvmm::error::Error>(())) else {
            continue;
        };
        loaded += 1;
        let _ = snapshot.flatten();
        if loaded.is_multiple_of(16)
            && let Ok(vmm) = Vmm::fork(&snapshot, ForkConfig::default())
        {
            let _ = vmm.restore_devices(&snapshot);
            forked += 1;
        }
    }
    std::fs::remove_file(path).unwrap();
    println!("{executions} files, {loaded} loaded, {forked} of those forked; no panic");
}
