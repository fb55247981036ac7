//! Requests of 4 KiB through the driver of tests to a disk, against the same by `pread` and `pwrite`
//! on the same file, alternately. Prints one line for each: what, and both rates in requests a
//! second. `benches/disk.py` runs it.

#![allow(clippy::print_stdout, reason = "a benchmark")]

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use pyvmm::config::DiskConfig;
use pyvmm::disk::{Contents, Format, Layer};
use pyvmm::virtio::Blk;
use pyvmm::virtio::mock::MockDriver;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 16384;
const ROUND: Duration = Duration::from_millis(100);
const ROUNDS: usize = 9;
/// Chains of three descriptors.
const DEPTH: u16 = 80;
const HEADERS: u64 = MockDriver::BUFFERS;
const STATUSES: u64 = HEADERS + 0x1000;
const DATA: u64 = HEADERS + 0x2000;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The order of blocks: one after the other, or by a linear congruence.
#[derive(Clone, Copy)]
struct Order {
    at: u64,
    is_random: bool,
}

impl Order {
    fn next(&mut self) -> u64 {
        let step = if self.is_random { 6_364_136_223_846_793_005 } else { 1 };
        self.at = self.at.wrapping_mul(step).wrapping_add(1);
        let block = if self.is_random { self.at >> 40 } else { self.at };
        block % BLOCKS
    }
}

/// A driver whose chains are laid out once.
struct Driver {
    driver: MockDriver,
    is_write: bool,
}

impl Driver {
    fn new(config: DiskConfig, is_write: bool) -> Outcome<Self> {
        let mut driver = MockDriver::new(Arc::new(Blk::new(config)?), 8)?;
        // FLUSH: writes are cached, as those of the other side.
        if driver.start(1 << 9) != 15 {
            return Err("the device does not start".into());
        }
        let mut driver = Self { driver, is_write };
        driver.lay_out(is_write);
        Ok(driver)
    }

    fn lay_out(&mut self, is_write: bool) {
        self.is_write = is_write;
        for number in 0..DEPTH {
            let (first, at) = (3 * number, u64::from(number));
            let data = if is_write { 1 } else { 3 };
            let driver = &self.driver;
            driver.set_descriptor(0, first, (HEADERS + 16 * at, 16, 1, first + 1));
            driver.set_descriptor(0, first + 1, (DATA + BLOCK * at, 4096, data, first + 2));
            driver.set_descriptor(0, first + 2, (STATUSES + at, 1, 2, 0));
        }
    }

    /// Write every block.
    fn fill(&mut self) -> Outcome<()> {
        let is_write = self.is_write;
        self.lay_out(true);
        let mut order = Order { at: 0, is_random: false };
        let mut written = 0;
        while written <= BLOCKS {
            written += self.keep_full(&mut order, Duration::ZERO)?;
        }
        self.lay_out(is_write);
        Ok(())
    }

    /// Make requests for this long: a new one for each that is answered, as many as there are chains
    /// at a time. Returns how many there were.
    fn keep_full(&mut self, order: &mut Order, time: Duration) -> Outcome<u64> {
        let began = Instant::now();
        for number in 0..DEPTH {
            self.request(number, order)?;
        }
        self.notify()?;
        let (mut in_flight, mut done) = (DEPTH, 0);
        while in_flight > 0 {
            let is_over = began.elapsed() >= time;
            let mut is_new = false;
            while let Some((head, _)) = self.driver.used(0) {
                done += 1;
                if is_over {
                    in_flight -= 1;
                } else {
                    self.request(head / 3, order)?;
                    is_new = true;
                }
            }
            if is_new {
                self.notify()?;
            } else {
                (0..100).for_each(|_| std::hint::spin_loop());
            }
        }
        Ok(done)
    }

    fn request(&mut self, number: u16, order: &mut Order) -> Outcome<()> {
        let header = u128::from(self.is_write) | u128::from(order.next() * 8) << 64;
        let at = HEADERS + 16 * u64::from(number);
        self.driver.memory.write(at, &header.to_le_bytes())?;
        self.driver.add_head(0, 3 * number);
        Ok(())
    }

    fn notify(&mut self) -> Outcome<()> {
        // The index of what was added is written before the device's wish is read.
        fence(Ordering::SeqCst);
        if self.driver.wants_notification(0) {
            self.driver.notify(0);
            self.driver.turn(1000)?;
        }
        Ok(())
    }
}

/// The same by system calls, into as many buffers.
fn bare(file: &File, is_write: bool, order: &mut Order) -> Outcome<u64> {
    let (began, mut done) = (Instant::now(), 0);
    let mut buffers = vec![[0; 4096]; DEPTH.into()];
    while began.elapsed() < ROUND {
        for bytes in &mut buffers {
            let at = order.next() * BLOCK;
            if is_write {
                file.write_all_at(bytes, at)?;
            } else {
                file.read_exact_at(bytes, at)?;
            }
        }
        done += u64::from(DEPTH);
    }
    Ok(done)
}

fn rate(round: impl FnOnce() -> Outcome<u64>) -> Outcome<f64> {
    let began = Instant::now();
    let done = round()?;
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Compare on a raw file, or on an image over it that has every cluster.
fn compare(
    path: &Path,
    image: Option<&Path>,
    is_write: bool,
    is_random: bool,
) -> Outcome<(f64, f64)> {
    let mut config = DiskConfig::new(Contents::File(path.to_owned(), Format::Raw));
    if let Some(image) = image {
        config.layer = Layer::File(image.to_owned());
    }
    let mut driver = Driver::new(config, is_write)?;
    driver.fill()?;
    let file = File::options().read(true).write(true).open(path)?;
    let mut order = Order { at: 1, is_random };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(rate(|| driver.keep_full(&mut order, ROUND))?);
        theirs.push(rate(|| bare(&file, is_write, &mut order))?);
    }
    Ok((median(ours), median(theirs)))
}

fn main() -> Outcome<()> {
    let folder = std::env::args().nth(1).ok_or("the folder for files is missing")?;
    let path = Path::new(&folder).join("disk.raw");
    std::fs::write(&path, vec![1; usize::try_from(BLOCK * BLOCKS)?])?;
    for (is_write, is_random) in [(false, true), (false, false), (true, true), (true, false)] {
        let order = if is_random { "random" } else { "sequential" };
        let what = if is_write { "write" } else { "read" };
        let image = Path::new(&folder).join(format!("{order}-{what}.qcow2"));
        for (format, image) in [("raw", None), ("qcow2", Some(image.as_path()))] {
            let (ours, theirs) = compare(&path, image, is_write, is_random)?;
            println!("{format},_{order}_{what} {ours:.0} {theirs:.0}");
        }
        std::fs::remove_file(image)?;
    }
    Ok(())
}
