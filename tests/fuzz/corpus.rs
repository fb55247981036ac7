//! The inputs that a fuzzer of this folder starts from, and what it is asked for.

use std::path::Path;
use std::time::{Duration, Instant};

use super::chance::Chance;

/// The arguments of a program: the corpus, seconds, a seed, and optionally a folder for the inputs
/// that reach new code.
pub(crate) struct Arguments {
    pub(crate) corpus: String,
    pub(crate) keep: Option<String>,
    pub(crate) chance: Chance,
    time: Duration,
}

impl Arguments {
    pub(crate) fn of_program() -> Self {
        let mut arguments = std::env::args().skip(1);
        let mut next = || arguments.next().expect("a corpus, seconds, a seed");
        let (corpus, seconds, seed) = (next(), next(), next());
        let chance = Chance(seed.parse::<u64>().unwrap() | 1);
        let time = Duration::from_secs(seconds.parse().unwrap());
        Self { corpus, keep: arguments.next(), chance, time }
    }

    /// When the program ends, if it begins now.
    pub(crate) fn until(&self) -> Instant {
        Instant::now() + self.time
    }
}

/// The files of a folder, by name.
pub(crate) fn read(folder: impl AsRef<Path>) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}
