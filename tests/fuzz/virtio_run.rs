//! Does the steps of an input to a device. The device must not write outside of what the driver has
//! offered to it, and must give each chain back or need a reset.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pyvmm::devices::Device;
use pyvmm::virtio::VirtioDevice;
use pyvmm::virtio::mock::MockDriver;

use super::virtio_host::Host;
use super::virtio_input::{Input, Step};
use super::virtio_memory::{INDIRECT, NEXT, Range, Room, SIZE, WRITE};

pub(crate) const QUEUES: usize = 34;
/// The buffers begin here.
pub(crate) const AT: u64 = 0x11_0000;
const TURNS: usize = 2000;
const PATIENCE: Duration = Duration::from_secs(8);
const RESET_NEEDED: u32 = 0x40;
const NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;

pub(crate) type Checked = Result<(), String>;

/// What inputs came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) inputs: u64,
    pub(crate) steps: u64,
    pub(crate) chains: u64,
    pub(crate) resets: u64,
}

/// An input that is being tried.
pub(crate) struct Run<'a> {
    pub(crate) driver: MockDriver,
    pub(crate) host: Host,
    pub(crate) kind: &'static str,
    pub(crate) room: &'a mut Room,
    /// Where the device may write.
    pub(crate) offered: Vec<Range>,
    /// From where on the driver's chains may not have been taken yet.
    pub(crate) walked: [(u64, u16); QUEUES],
    /// Whether the device may write what it reads as rings: then anything may follow.
    pub(crate) is_wild: bool,
    /// Where the next buffer begins, and the next descriptor of each queue.
    cursor: u64,
    descriptor: [u16; QUEUES],
    count: Count,
}

/// Do the steps. An error is a finding.
pub(crate) fn run(input: &Input, room: &mut Room) -> Result<Count, String> {
    let (device, host) = Host::new(input.kind, &room.place);
    run_on(device, host, input, room)
}

/// The same with a device that is there.
pub(crate) fn run_on(
    device: Arc<dyn VirtioDevice>,
    host: Host,
    input: &Input,
    room: &mut Room,
) -> Result<Count, String> {
    room.memory.fill(0, SIZE as u64, 0).unwrap();
    room.shadow.fill(0);
    let driver = MockDriver::over(device, room.memory.clone()).unwrap();
    let mut run = Run {
        driver,
        host,
        kind: input.kind,
        room,
        offered: Vec::new(),
        walked: [(0, 0); QUEUES],
        is_wild: false,
        cursor: AT,
        descriptor: [0; QUEUES],
        count: Count::default(),
    };
    let pattern = std::mem::take(&mut run.room.pattern);
    run.put(AT, &pattern);
    run.room.pattern = pattern;
    for step in &input.steps {
        run.step(step).map_err(|finding| format!("{}: {finding}", step.name))?;
    }
    run.end()
}

impl Run<'_> {
    /// Notify the device of a queue, or of all, and run the loop until nothing is left to do.
    fn turn(&mut self, queue: Option<u64>) -> Checked {
        self.offer();
        let served = self.served();
        for (at, _) in served.iter().filter(|it| queue.is_none_or(|queue| queue == it.0 as u64)) {
            self.driver.notify(u32::try_from(*at).unwrap());
        }
        self.run_loop()?;
        self.settle(queue)?;
        self.check()?;
        for (at, queue) in self.served() {
            self.walked[at].1 = queue.next;
        }
        self.feed(queue)
    }

    fn run_loop(&mut self) -> Checked {
        for _ in 0..TURNS {
            self.host.serve(&self.room.place, &self.driver);
            if self.driver.turn(0).unwrap() == 0 {
                return Ok(());
            }
        }
        Err("the loop does not come to rest".into())
    }

    /// Whether the device has given back what it was notified of.
    fn is_idle(&self, queue: Option<u64>) -> bool {
        let features = self.driver.attached.transport.queues().features().unwrap_or(0);
        let is_meant = |at: usize| queue.is_none_or(|queue| queue == at as u64);
        self.served()
            .iter()
            .filter(|(at, _)| is_meant(*at) && Host::answers(self.kind, *at, features))
            .all(|(_, queue)| queue.held == 0 && queue.next == self.u16(queue.available + 2))
    }

    fn settle(&mut self, queue: Option<u64>) -> Checked {
        if self.is_wild {
            return Ok(());
        }
        let began = Instant::now();
        while !self.is_idle(queue) {
            if !Host::is_threaded(self.kind) {
                // A balloon may have lost its rings.
                self.check()?;
                return if self.is_wild { Ok(()) } else { Err("a chain is not given back".into()) };
            }
            if began.elapsed() > PATIENCE {
                return Err("a chain is not given back in time".into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// A socket device has to say all that it wants before it takes more.
    fn feed(&mut self, queue: Option<u64>) -> Checked {
        if self.kind != "vsock" || queue.is_some_and(|queue| queue != 1) {
            return Ok(());
        }
        for _ in 0..600 {
            let (Some(receive), Some(send)) = (self.driver.served(0), self.driver.served(1)) else {
                return Ok(());
            };
            if self.is_wild || send.next == self.u16(send.available + 2) {
                return Ok(());
            }
            if receive.next == self.u16(receive.available + 2) {
                self.request(0, &[4096], &[], false);
            }
            self.offer();
            self.driver.notify(0);
            self.run_loop()?;
            self.check()?;
        }
        Err("packets are not taken".into())
    }

    fn step(&mut self, step: &Step) -> Checked {
        self.count.steps += 1;
        let (first, second) = (step.number(0), step.number(1));
        let queue = usize::try_from(first).unwrap_or(QUEUES);
        let small = |number: u64| u16::try_from(number & 0xffff).unwrap();
        match step.name {
            "start" => return self.start(first),
            "read" => {
                let mut data = [0; 16];
                let size = usize::try_from(second % 17).unwrap();
                self.driver.attached.transport.read(first, &mut data[..size]);
            }
            "write" => drop(self.driver.attached.transport.write(first, step.bytes())),
            "memory" => self.put(AT.saturating_add(first), step.bytes()),
            "request" | "indirect" => {
                let sizes = step.numbers.get(1..).unwrap_or(&[]);
                self.request(queue, sizes, &step.pieces, step.name == "indirect");
            }
            "descriptor" => {
                if let Some(served) = self.driver.served(queue) {
                    let at = served.descriptors + 16 * (second % 0x1_0000);
                    let length = u32::try_from(step.number(3) & 0xffff_ffff).unwrap();
                    let [flags, next] = [step.number(4), step.number(5)].map(small);
                    self.put_descriptor(at, (step.number(2), length, flags, next));
                }
            }
            "head" => self.publish(queue, small(second)),
            "available" => {
                if let Some(served) = self.driver.served(queue) {
                    self.put(served.available + 2, &small(second).to_le_bytes());
                }
            }
            "notify" => return self.turn(Some(first)),
            "rush" => {
                self.offer();
                self.driver.write(NOTIFY, u32::try_from(first & 0xff).unwrap());
                self.driver.turn(0).unwrap();
                self.is_wild |= Host::is_threaded(self.kind);
            }
            "turn" => return self.turn(None),
            "host" => self.host.act(first, second, step.bytes(), &self.driver),
            _ => return self.snapshot(&step.numbers),
        }
        Ok(())
    }

    fn start(&mut self, features: u64) -> Checked {
        self.check()?;
        let features =
            if features >> 63 == 0 { features & self.driver.offered() } else { features };
        self.driver.start(features);
        self.descriptor = [0; QUEUES];
        let rings = usize::try_from(AT).unwrap();
        self.driver.memory.read(0, &mut self.room.shadow[..rings]).unwrap();
        Ok(())
    }

    fn put_descriptor(&mut self, at: u64, (address, length, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// Make a chain available.
    fn publish(&mut self, queue: usize, head: u16) {
        let Some(served) = self.driver.served(queue) else { return };
        let index = self.u16(served.available + 2);
        let slot = u64::from(index % served.size);
        self.put(served.available + 4 + 2 * slot, &head.to_le_bytes());
        self.put(served.available + 2, &index.wrapping_add(1).to_le_bytes());
        self.count.chains += 1;
    }

    /// Room in the buffers.
    fn allocate(&mut self, size: u64) -> u64 {
        let at = if self.cursor + size > SIZE as u64 { AT } else { self.cursor };
        self.cursor = (at + size).next_multiple_of(16);
        at
    }

    fn request(&mut self, queue: usize, sizes: &[u64], pieces: &[Vec<u8>], is_indirect: bool) {
        let Some(served) = self.driver.served(queue) else { return };
        let mut buffers = Vec::new();
        for piece in pieces {
            let at = self.allocate(piece.len() as u64);
            self.put(at, piece);
            buffers.push((at, u32::try_from(piece.len()).unwrap(), 0));
        }
        for size in sizes {
            // Large ones as they are.
            let at = self.allocate(size % 0x1_0000);
            buffers.push((at, u32::try_from(size & 0xffff_ffff).unwrap(), WRITE));
        }
        let count = u16::try_from(buffers.len()).unwrap();
        let table = self.allocate(16 * u64::from(count));
        let head = self.descriptor[queue] % served.size;
        for (number, (address, length, flags)) in (0..count).zip(buffers) {
            let flags = flags | if number + 1 < count { NEXT } else { 0 };
            let place = if is_indirect { number } else { (head + number) % served.size };
            let next = if is_indirect { number + 1 } else { (place + 1) % served.size };
            let from = if is_indirect { table } else { served.descriptors };
            self.put_descriptor(from + 16 * u64::from(place), (address, length, flags, next));
        }
        let taken = if is_indirect { 1 } else { count };
        if is_indirect {
            let at = served.descriptors + 16 * u64::from(head);
            self.put_descriptor(at, (table, 16 * u32::from(count), INDIRECT, 0));
        }
        self.descriptor[queue] = head.wrapping_add(taken);
        self.publish(queue, head);
    }

    /// Save, change bytes, and restore. What is carried may be where no chain was.
    fn snapshot(&mut self, changes: &[u64]) -> Checked {
        let transport = Arc::clone(&self.driver.attached.transport);
        transport.quiesce().map_err(|error| format!("it cannot be quiesced: {error}"))?;
        let mut state = transport.save().map_err(|error| format!("it cannot be saved: {error}"))?;
        for change in changes.chunks_exact(2) {
            let at = usize::try_from(change[0]).unwrap_or(0) % state.len();
            state[at] = change[1].to_le_bytes()[0];
        }
        let restored = transport.restore(&state);
        transport.resume();
        self.is_wild |= !changes.is_empty();
        match restored {
            Err(error) if changes.is_empty() => Err(format!("it cannot be restored: {error}")),
            _ => Ok(()),
        }
    }

    fn end(mut self) -> Result<Count, String> {
        self.turn(None)?;
        if self.driver.read(STATUS) & RESET_NEEDED != 0 {
            self.count.resets += 1;
        }
        self.count.inputs = 1;
        Ok(self.count)
    }
}
