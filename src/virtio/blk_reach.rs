//! A request of a disk's driver and the ways to its buffers: within an access to the queues, or by
//! short ones while the program's code may take any time. On the thread of the disk.

use std::io::{self, Write};

use smallvec::SmallVec;

use super::access::QueueAccess;
use super::blk_request::{HEADER, Request, Status};
use super::buffers::{ChainReader, ChainWriter, Slices};
use super::chain::Chain;
use super::queues::Queues;
use crate::disk::{Session, Slice, of_bytes, of_bytes_mut};

/// A request that was taken from the queue.
pub(super) struct Job {
    pub(super) chain: Chain,
    pub(super) request: Result<Request, Status>,
}

impl Job {
    /// None if the chain has no room for a header or a status.
    pub(super) fn parse(access: &QueueAccess<'_>, chain: Chain) -> Option<Self> {
        let readable = chain.readable_len().checked_sub(HEADER)?;
        let writable = chain.writable_len().checked_sub(1)?;
        let header = ChainReader::new(access, &chain).take()?;
        let request = Request::parse(header, readable, writable);
        Some(Self { chain, request })
    }

    /// The data of the driver, from here on.
    pub(super) fn data<'a>(&'a self, access: &'a QueueAccess<'_>, done: u64) -> ChainReader<'a> {
        let mut reader = ChainReader::new(access, &self.chain);
        reader.skip(HEADER + done);
        reader
    }
}

/// Write the statuses of the first requests, and give their chains back.
pub(super) fn answer_all(access: &QueueAccess<'_>, jobs: &mut [Job], statuses: &[Status]) {
    access.complete_all(jobs.iter_mut().zip(statuses).map(|(job, status)| {
        let mut writer = ChainWriter::new(access, &job.chain);
        writer.skip(job.chain.writable_len() - 1);
        // Fails only if memory has been removed.
        let _ = writer.write_all(&[status.byte()]);
        let written = writer.written();
        (&mut job.chain, written)
    }));
}

/// Fill the data of requests that follow each other on the disk, within an access.
pub(super) fn read_now(
    access: &QueueAccess<'_>,
    jobs: &[Job],
    session: &Session,
    part: Part,
) -> io::Result<()> {
    let (offset, done, size) = part;
    let mut writers: SmallVec<[_; 2]> = jobs
        .iter()
        .map(|job| {
            let mut writer = ChainWriter::new(access, &job.chain);
            writer.skip(done);
            // Without the status.
            let data = writer.left().saturating_sub(1).min(size);
            (writer, data)
        })
        .collect();
    let mut buffers = Slices::new();
    for (writer, data) in &writers {
        buffers.extend(writer.slices(usize::try_from(*data).unwrap_or(0)));
    }
    check(&buffers, size)?;
    session.read_at(offset, &buffers)?;
    writers.iter_mut().for_each(|(writer, data)| writer.advance(*data));
    Ok(())
}

/// Write the data of requests that follow each other to the disk, within an access.
pub(super) fn write_now(
    access: &QueueAccess<'_>,
    jobs: &[Job],
    session: &Session,
    part: Part,
) -> io::Result<()> {
    let (offset, done, size) = part;
    let most = usize::try_from(size).unwrap_or(0);
    let buffers: Slices<'_> =
        jobs.iter().flat_map(|job| job.data(access, done).slices(most)).collect();
    check(&buffers, size)?;
    session.write_at(offset, &buffers)
}

fn check(buffers: &[Slice<'_>], size: u64) -> io::Result<()> {
    let length: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    if length as u64 == size { Ok(()) } else { Err(gone()) }
}

/// Why a request has no status, or a bad one.
pub(super) enum Ended {
    /// The driver has reset the device or stopped the queue meanwhile.
    Void,
    Failed(io::Error),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// The way to the buffers of a request.
pub(super) enum Reach<'a> {
    /// Within an access.
    Now(&'a QueueAccess<'a>),
    /// By a short access of its own, unless the device was reset since this epoch.
    Later(&'a Queues, u64),
}

/// Offset on the disk, offset in the data, and size.
pub(super) type Part = (u64, u64, u64);

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "a buffer is not in memory any more")
}

impl Reach<'_> {
    pub(super) fn with<T>(
        &self,
        job: &Job,
        with: impl FnOnce(&QueueAccess<'_>) -> T,
    ) -> Result<T, Ended> {
        match self {
            Self::Now(access) => Ok(with(access)),
            Self::Later(queues, epoch) => {
                let access = queues.access_after(*epoch).ok_or(Ended::Void)?;
                if access.has(&job.chain) { Ok(with(&access)) } else { Err(Ended::Void) }
            }
        }
    }

    /// Read from the disk into the buffers.
    pub(super) fn read(&self, job: &Job, session: &Session, part: Part) -> Result<(), Ended> {
        if let Self::Now(access) = self {
            return Ok(read_now(access, std::slice::from_ref(job), session, part)?);
        }
        let (offset, done, size) = part;
        let most = usize::try_from(size).unwrap_or(0);
        let mut bytes = vec![0; most];
        session.read_at(offset, &of_bytes_mut(&mut bytes))?;
        self.with(job, |access| {
            let mut writer = ChainWriter::new(access, &job.chain);
            writer.skip(done);
            writer.write_all(&bytes).map_err(Ended::Failed)
        })?
    }

    /// Write the buffers to the disk.
    pub(super) fn write(&self, job: &Job, session: &Session, part: Part) -> Result<(), Ended> {
        if let Self::Now(access) = self {
            return Ok(write_now(access, std::slice::from_ref(job), session, part)?);
        }
        let (offset, done, size) = part;
        let most = usize::try_from(size).unwrap_or(0);
        let bytes = self.with(job, |access| job.data(access, done).read_vec(most))?;
        if bytes.len() != most {
            return Err(gone().into());
        }
        Ok(session.write_at(offset, &of_bytes(&bytes))?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{self, Receiver};

    use super::super::blk::tests::{driver, header, request};
    use super::super::mock::{MockDriver, readable, writable};
    use super::super::registers::{QUEUE_READY, QUEUE_SEL};
    use super::*;
    use crate::disk::{Backend, Contents};
    use crate::sync::{Mutex, rank};

    const AT: u64 = MockDriver::BUFFERS;

    /// Blocks in each read until it is let go.
    #[derive(Debug)]
    struct Slow(Mutex<Receiver<()>, rank::Test>);

    impl Backend for Slow {
        fn size(&self) -> std::io::Result<u64> {
            Ok(1 << 20)
        }

        fn read_at(&self, _offset: u64, _buffers: &[Slice<'_>]) -> std::io::Result<()> {
            let _ = self.0.lock().recv();
            Ok(())
        }

        fn write_at(&self, _offset: u64, _buffers: &[Slice<'_>]) -> std::io::Result<()> {
            Err(std::io::Error::other("out of paper"))
        }

        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }

        fn may_block(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_request_of_a_queue_that_was_stopped_is_void() {
        let mut driver = driver(Contents::Bytes(vec![0; 4096]), |_| {});
        driver.start(0);
        let data = AT + 0x1000;
        let header = header(&driver, 0, 0);
        driver.add(0, &[header, writable(data, 512), writable(AT + 0x100, 1)]).unwrap();
        let queues = Arc::clone(driver.attached.transport.queues());
        let access = queues.access().unwrap();
        let job = Job::parse(&access, access.pop(0).unwrap()).unwrap();
        let later = Reach::Later(&queues, access.epoch());
        drop(access);
        assert!(later.with(&job, |_| ()).is_ok());
        driver.write(QUEUE_SEL, 0);
        driver.write(QUEUE_READY, 0);
        assert!(matches!(later.with(&job, |_| ()), Err(Ended::Void)));
        let access = queues.access().unwrap();
        assert_eq!(ChainWriter::new(&access, &job.chain).write(&[1]).unwrap(), 0);
        assert_eq!(job.data(&access, 0).left(), 0);
        drop(access);
        driver.start(0);
        assert_eq!(request(&mut driver, 0, 0, &[writable(data, 512)]), 0);
    }

    #[test]
    fn a_backend_that_blocks_holds_up_neither_a_reset_nor_the_end() {
        let (go, gate) = mpsc::channel();
        let mut driver = driver(Contents::Backend(Arc::new(Slow(Mutex::new(gate)))), |_| {});
        driver.start(0);
        let data = AT + 0x1000;
        assert_eq!(request(&mut driver, 1, 0, &[readable(data, 512)]), 1);
        let failure = driver.attached.transport.device().failure().unwrap();
        assert_eq!(failure, "write of 512 bytes at 0: out of paper");
        let header = header(&driver, 0, 0);
        driver.add(0, &[header, writable(data, 512), writable(AT + 0x100, 1)]).unwrap();
        driver.notify(0);
        driver.turn(1000).unwrap();
        assert_eq!(driver.start(0), 15);
        go.send(()).unwrap();
        go.send(()).unwrap();
        assert_eq!(request(&mut driver, 0, 0, &[writable(data, 512)]), 0);
        assert_eq!(driver.used(0), None, "the request before the reset is void");
        driver.add(0, &[header, writable(data, 512), writable(AT + 0x100, 1)]).unwrap();
        driver.notify(0);
        driver.turn(1000).unwrap();
    }
}
