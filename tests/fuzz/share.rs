//! `make fuzz`: messages of a hostile guest to the 9P server of a shared directory, made of the
//! corpus by changes at random, for so many seconds. A panic is a finding, and so is anything that
//! changes outside the directory, or is read from there. An input that gives a sequence of replies
//! that is new is kept, and written beside the corpus if a folder is given for that. Arguments: the
//! corpus, seconds, a seed, and that folder.

// A program for tests: what it cannot do it says by a panic.
#![allow(clippy::expect_used, clippy::print_stdout, clippy::unwrap_used)]

mod chance;
mod corpus;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use chance::Chance;
use corpus::Arguments;
use pyvmm::share::{Directory, MOST_BYTES, Options, Server};

/// The kinds of requests that the server knows.
const KINDS: [u8; 26] = [
    8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 40, 50, 52, 54, 70, 72, 74, 76, 100, 104, 108, 110, 116,
    118, 120, 122,
];
const NAMES: [&[u8]; 12] = [
    b"..",
    b".",
    b"/",
    b"../secret",
    b"a",
    b"file",
    b"out",
    b"direct",
    b"fifo",
    b"secret",
    b"\0",
    b"new",
];
/// The executions in one folder.
const ROUND: u64 = 64;

impl Chance {
    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }
}

/// The messages of an input, by the sizes that they begin with.
fn split(mut input: &[u8]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some(size) = input.first_chunk().copied().map(u32::from_le_bytes) {
        let size = usize::try_from(size).unwrap().clamp(4, input.len());
        let (message, rest) = input.split_at(size);
        messages.push(message.to_vec());
        input = rest;
    }
    messages
}

/// A folder with one that is shared in it, and what a guest must not reach beside it.
fn prepare(folder: &Path) {
    let _ = std::fs::remove_dir_all(folder);
    let shared = folder.join("shared");
    std::fs::create_dir_all(shared.join("a/b")).unwrap();
    std::fs::write(folder.join("secret"), "a secret of the host").unwrap();
    std::fs::write(shared.join("file"), "Hello").unwrap();
    std::fs::write(shared.join("a/b/file"), "there").unwrap();
    std::os::unix::fs::symlink("..", shared.join("out")).unwrap();
    std::os::unix::fs::symlink("../secret", shared.join("direct")).unwrap();
    let _ = std::os::unix::net::UnixListener::bind(shared.join("fifo"));
}

fn check_outside(folder: &Path) {
    let names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(std::fs::read(folder.join("secret")).unwrap(), b"a secret of the host");
}

/// Send all messages, save and restore the session, and send them again. Returns what was replied:
/// pairs of kinds and errors.
fn execute(folder: &Path, messages: &[Vec<u8>], read_only: bool) -> HashSet<(u8, u8, u8, u8)> {
    let options = Options { read_only, owner: None };
    let directory = Arc::new(Directory::open(&folder.join("shared"), options).unwrap());
    let mut server = Server::new(Arc::clone(&directory));
    let (mut seen, mut last) = (HashSet::new(), (0, 0));
    for turn in 0..2 {
        for message in messages {
            let reply = server.answer(message, MOST_BYTES);
            let find = reply.windows(20).any(|found| found == b"a secret of the host");
            assert!(!find, "a guest reads outside of the share");
            let kind = message.get(4).copied().unwrap_or(0);
            let said = if reply[4] == 7 { reply[7] } else { 0 };
            seen.insert((last.0, last.1, kind, said));
            last = (kind, said);
        }
        if turn == 0 {
            let state = server.save();
            server = Server::new(Arc::clone(&directory));
            server.restore(&state).unwrap();
        }
    }
    seen
}

fn mutate(corpus: &[Vec<Vec<u8>>], chance: &mut Chance) -> Vec<Vec<u8>> {
    let mut messages = corpus[chance.below(corpus.len())].clone();
    for _ in 0..=chance.below(6) {
        if messages.is_empty() {
            messages.push(vec![7, 0, 0, 0, 120, 0, 0]);
        }
        let at = chance.below(messages.len());
        match chance.below(8) {
            0 => {
                let other = &corpus[chance.below(corpus.len())];
                let start = chance.below(other.len());
                let piece = other[start..].iter().take(1 + chance.below(4)).cloned();
                messages.splice(at..at, piece.collect::<Vec<_>>());
            }
            1 => drop(messages.remove(at)),
            2 => messages.truncate(at + 1),
            3 => {
                let name = NAMES[chance.below(NAMES.len())];
                let from = chance.below(messages[at].len());
                let to = (from + chance.below(8)).min(messages[at].len());
                let length = u16::try_from(name.len()).unwrap().to_le_bytes();
                messages[at].splice(from..to, length.into_iter().chain(name.iter().copied()));
            }
            4 => {
                if let Some(kind) = messages[at].get_mut(4) {
                    *kind = KINDS[chance.below(KINDS.len())];
                }
            }
            _ => {
                let from = chance.below(messages[at].len());
                if let Some(byte) = messages[at].get_mut(from) {
                    *byte = if chance.below(2) == 0 { chance.byte() } else { *byte ^ 1 };
                }
            }
        }
    }
    messages.truncate(64);
    if chance.below(8) > 0 {
        messages.iter_mut().for_each(mend);
    }
    messages
}

/// Make the size right that a message begins with.
fn mend(message: &mut Vec<u8>) {
    message.resize(message.len().max(7), 0);
    let size = u32::try_from(message.len()).unwrap().to_le_bytes();
    message[..4].copy_from_slice(&size);
}

fn main() {
    let mut arguments = Arguments::of_program();
    let mut corpus: Vec<_> =
        corpus::read(&arguments.corpus).iter().map(|bytes| split(bytes)).collect();
    let folder = std::env::temp_dir().join(format!("pyvmm-fuzz-share-{}", std::process::id()));
    let until = arguments.until();
    let Arguments { chance, keep, .. } = &mut arguments;
    let (mut executions, mut messages, mut seen) = (0_u64, 0_usize, HashSet::new());
    let given = corpus.len();
    while Instant::now() < until || executions < given as u64 {
        if executions.is_multiple_of(ROUND) {
            prepare(&folder);
        }
        let input = match corpus.get(usize::try_from(executions).unwrap()) {
            Some(input) if executions < given as u64 => input.clone(),
            _ => mutate(&corpus, chance),
        };
        let found = execute(&folder, &input, chance.below(8) == 0);
        check_outside(&folder);
        executions += 1;
        messages += 2 * input.len();
        if !found.is_subset(&seen) {
            if let Some(keep) = keep {
                std::fs::write(format!("{keep}/{executions:08}"), input.concat()).unwrap();
            }
            seen.extend(found);
            corpus.push(input);
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
    let (inputs, pairs) = (corpus.len(), seen.len());
    println!(
        "share: {executions} executions with {messages} messages, {inputs} inputs, {pairs} pairs of replies"
    );
}
