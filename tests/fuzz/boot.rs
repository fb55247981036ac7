//! `make fuzz`: loads changed kernels, initial RAM disks, firmware and command lines, for so many
//! seconds. A panic, a slow input or a large allocation is a finding, and its input is saved.
//! Compiled with counters of LLVM's SanitizerCoverage, it keeps the inputs that reach new code.
//! Arguments: the folder of the corpus, seconds, a seed, and optionally a folder for the inputs
//! that were kept. Zero seconds only replay the corpus.

// A program for tests: what it cannot do it says by a panic.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

mod allocations;
mod chance;
mod corpus;
mod coverage;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chance::Chance;
use corpus::Arguments;
use coverage::{Coverage, pick};
use pyvmm::config::{
    Boot, ElfBoot, FirmwareBoot, KernelBoot, LinuxBoot, LinuxProtocol, MemoryConfig, Module,
    VmmConfig,
};
use pyvmm::vmm::Vmm;

const MEMORY_MIB: u64 = 8;
/// A file of guest memory's size is read, and so is what a payload unpacks to. Decoders have
/// windows of up to 128 MiB.
const MAX_ALLOCATION: usize = 192 << 20;
const MAX_TIME: Duration = Duration::from_secs(5);
const MAX_INPUT: usize = 1 << 16;

impl Chance {
    fn value(&mut self) -> u64 {
        const USUAL: [u64; 12] = [
            0,
            1,
            0x0fff,
            0x1000,
            0x8_0000,
            0x10_0000,
            0x80_0000,
            0x7fff_ffff,
            0xc000_0000,
            0xffff_ffff,
            1 << 47,
            u64::MAX,
        ];
        match self.below(4) {
            0 => self.below(1 << 16) as u64,
            1 => self.below(1 << 40) as u64,
            _ => USUAL[self.below(USUAL.len())].wrapping_add(self.below(3) as u64).wrapping_sub(1),
        }
    }
}

fn mutate(bytes: &mut Vec<u8>, other: &[u8], chance: &mut Chance) {
    for _ in 0..=chance.below(5) {
        // Headers are at the beginning.
        let end = if chance.below(2) == 0 { bytes.len().min(0x280) } else { bytes.len() };
        let at = chance.below(end);
        let rest = bytes.len().saturating_sub(at);
        match chance.below(10) {
            _ if rest == 0 => bytes.push(u8::try_from(chance.below(256)).unwrap()),
            0 | 1 => bytes[at] ^= 1 << chance.below(8),
            2 => bytes[at] = u8::try_from(chance.below(256)).unwrap(),
            3 | 4 => {
                let size = [1, 2, 4, 8][chance.below(4)].min(rest);
                let value = chance.value().to_le_bytes();
                bytes[at..at + size].copy_from_slice(&value[..size]);
            }
            5 => {
                let size = chance.below(64).min(rest);
                let to = chance.below(bytes.len() - size + 1);
                bytes.copy_within(at..at + size, to);
            }
            6 => bytes.truncate(bytes.len() - chance.below(rest.min(64) + 1)),
            7 => {
                let new = vec![u8::try_from(chance.below(256)).unwrap(); chance.below(64)];
                bytes.splice(at..at, new);
            }
            8 => {
                let from = chance.below(other.len());
                let size = chance.below(64).min(other.len() - from).min(rest);
                bytes[at..at + size].copy_from_slice(&other[from..from + size]);
            }
            _ => {
                let from = chance.below(other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes.truncate(MAX_INPUT);
}

/// What an input is loaded as.
const TARGETS: [&str; 8] =
    ["linux", "bzimage", "linux32", "pvh", "kernel", "module", "program", "firmware"];

/// A configuration with the input, and for command lines, with its end as the line.
fn config(target: &str, path: &Path, input: &[u8]) -> VmmConfig {
    let kernel = path.to_path_buf();
    let linux = LinuxBoot { kernel: kernel.clone(), ..LinuxBoot::default() };
    let tail = &input[input.len().saturating_sub(input.len() % 300)..];
    let cmdline = String::from_utf8_lossy(tail).into_owned();
    let printable = tail.iter().map(|byte| char::from(byte % 95 + 32)).collect();
    let boot = match target {
        "linux" => Boot::Linux(LinuxBoot { initrd: vec![kernel.clone(), kernel], ..linux }),
        "bzimage" => Boot::Linux(LinuxBoot { unpack: Some(false), cmdline: printable, ..linux }),
        "linux32" => Boot::Linux(LinuxBoot { protocol: LinuxProtocol::Bits32, ..linux }),
        "pvh" => Boot::Linux(LinuxBoot { protocol: LinuxProtocol::Pvh, ..linux }),
        "kernel" => Boot::Kernel(KernelBoot { kernel, cmdline, ..KernelBoot::default() }),
        "module" => {
            let module = Module { path: kernel.clone(), cmdline };
            let modules = vec![module.clone(), module];
            Boot::Kernel(KernelBoot { kernel, modules, ..KernelBoot::default() })
        }
        "program" => Boot::Elf(ElfBoot { path: kernel, stack_kib: 64 }),
        "firmware" => Boot::Firmware(FirmwareBoot { path: kernel }),
        other => panic!("no target {other}"),
    };
    VmmConfig { memory: MemoryConfig { size_mib: MEMORY_MIB }, boot, ..VmmConfig::default() }
}

/// A file without a place in the file system, whose content is the input.
struct Input {
    file: File,
    path: PathBuf,
}

impl Input {
    fn new() -> Self {
        // SAFETY: the name ends in a zero byte.
        let fd = unsafe { libc::memfd_create(c"input".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor is new, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Self { file, path }
    }

    fn set(&mut self, bytes: &[u8]) {
        self.file.set_len(0).unwrap();
        self.file.seek(SeekFrom::Start(0)).unwrap();
        self.file.write_all(bytes).unwrap();
    }
}

/// Load it. Returns whether that worked; a finding ends the program.
fn load(target: &str, bytes: &[u8], input: &mut Input) -> bool {
    input.set(bytes);
    let config = config(target, &input.path, bytes);
    allocations::take_largest();
    let began = Instant::now();
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Vmm::check(&config, &|| Ok(())).is_ok()
    }));
    let largest = allocations::take_largest();
    let finding = match done {
        Ok(_) if began.elapsed() > MAX_TIME => format!("{:?}", began.elapsed()),
        Ok(_) if largest > MAX_ALLOCATION => format!("an allocation of {largest} bytes"),
        Ok(is_loaded) => return is_loaded,
        Err(_) => "a panic".into(),
    };
    let path = format!("target/fuzz-boot-{target}");
    std::fs::write(&path, bytes).unwrap();
    panic!("{finding}: the input is in {path}");
}

fn main() {
    let mut arguments = Arguments::of_program();
    let mut corpus = corpus::read(&arguments.corpus);
    let (mut input, mut coverage) = (Input::new(), Coverage::new());
    let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    let mut run = |target, bytes: &[u8], coverage: &mut Coverage| {
        coverage.clear();
        let count = counts.entry(target).or_default();
        count.0 += 1;
        count.1 += u64::from(load(target, bytes, &mut input));
        coverage.is_new()
    };
    for bytes in &corpus {
        for target in TARGETS {
            run(target, bytes, &mut coverage);
        }
    }
    let until = arguments.until();
    let Arguments { chance, keep, .. } = &mut arguments;
    while Instant::now() < until {
        let mut bytes = pick(&corpus, chance).clone();
        let other = &corpus[chance.below(corpus.len())];
        mutate(&mut bytes, other, chance);
        let target = TARGETS[chance.below(TARGETS.len())];
        if run(target, &bytes, &mut coverage) {
            if let Some(keep) = keep {
                std::fs::write(format!("{keep}/{target}-{:05}", corpus.len()), &bytes).unwrap();
            }
            corpus.push(bytes);
        }
    }
    for (target, (executions, loaded)) in &counts {
        println!("{target}: {executions} inputs, {loaded} loaded");
    }
    let executions: u64 = counts.values().map(|(executions, _)| executions).sum();
    let (kept, edges) = (corpus.len(), coverage.edges());
    println!("boot: {executions} executions, {kept} inputs kept, {edges} edges; no finding");
}
