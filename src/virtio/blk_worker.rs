//! The thread of a disk: takes requests from the queue, carries them out, and gives them back.
//! Requests to a file are carried out in guest memory, by `blk_batch.rs`. A request that calls the
//! program, which may take any time, has a buffer of its own and no access meanwhile: if the device
//! is reset, or the queue stopped, before it ends, its result is void.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::access::QueueAccess;
use super::blk_limit::Limiter;
use super::blk_reach::{Ended, Job, Reach, answer_all};
use super::blk_request::{self, MOST_SEGMENT_BYTES, Request, Status};
use super::buffers::ChainWriter;
use super::queues::Queues;
use crate::disk::{Disk, Session};
use crate::sync::{Condvar, Mutex, rank};

/// The most bytes that move at once.
pub(super) const CHUNK: u64 = 1 << 20;

/// What a disk has done.
#[derive(Debug, Default)]
pub struct DiskCounts {
    /// Requests to read.
    pub reads: AtomicU64,
    /// Requests to write.
    pub writes: AtomicU64,
    /// Requests to flush.
    pub flushes: AtomicU64,
    /// Requests to discard, or to write zeroes.
    pub discards: AtomicU64,
    /// Bytes read.
    pub bytes_read: AtomicU64,
    /// Bytes written.
    pub bytes_written: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
}

impl DiskCounts {
    fn clear(&self) {
        let Self { reads, writes, flushes, discards, bytes_read, bytes_written, errors } = self;
        for count in [reads, writes, flushes, discards, bytes_read, bytes_written, errors] {
            count.store(0, Ordering::Relaxed);
        }
    }
}

/// Relaxed: counts.
pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// What wakes the thread.
#[derive(Debug, Default)]
struct Wake {
    queues: Option<Arc<Queues>>,
    is_notified: bool,
    is_closed: bool,
    /// Changes with each reset, which ends a wait for a rate limit.
    resets: u64,
}

/// What the device and its thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Disk,
    pub(super) serial: [u8; 20],
    /// Whether a write may be answered before it survives the host's end.
    pub(super) is_write_back: AtomicBool,
    pub(super) counts: DiskCounts,
    failure: Mutex<Option<String>, rank::BlkFailure>,
    wake: Mutex<Wake, rank::BlkWorker>,
    changed: Condvar,
}

/// What the thread does next.
pub(super) enum Next {
    /// Wait for a notification.
    Sleep,
    /// Look at the queue again.
    Again,
    /// Wait for the rate limit.
    Wait(Duration),
}

impl Shared {
    pub(super) fn new(disk: Disk, serial: [u8; 20]) -> Self {
        Self {
            disk,
            serial,
            is_write_back: AtomicBool::new(true),
            counts: DiskCounts::default(),
            failure: Mutex::default(),
            wake: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The driver has notified the device.
    pub(super) fn notify(&self, queues: &Arc<Queues>) {
        let mut wake = self.wake.lock();
        wake.is_notified = true;
        if wake.queues.is_none() {
            wake.queues = Some(Arc::clone(queues));
        }
        self.changed.notify_all();
    }

    /// The driver has reset the device.
    pub(super) fn reset(&self) {
        let mut wake = self.wake.lock();
        wake.resets += 1;
        wake.is_notified = false;
        self.changed.notify_all();
    }

    /// The machine is closed.
    pub(super) fn close(&self) {
        self.wake.lock().is_closed = true;
        self.changed.notify_all();
    }

    /// Set the counts to zero, and forget the last failure.
    pub(super) fn forget_counts(&self) {
        self.counts.clear();
        *self.failure.lock() = None;
    }

    /// The last failure.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    fn next_work(&self) -> Option<Arc<Queues>> {
        let mut wake = self.wake.lock();
        loop {
            if wake.is_closed {
                return None;
            }
            if std::mem::take(&mut wake.is_notified) && wake.queues.is_some() {
                return wake.queues.clone();
            }
            self.changed.wait(&mut wake);
        }
    }

    /// Wait for a rate limit. A reset or the end of the machine ends the wait.
    fn pause(&self, wait: Duration) {
        let mut wake = self.wake.lock();
        let (resets, until) = (wake.resets, Instant::now() + wait);
        while !wake.is_closed && wake.resets == resets {
            if self.changed.wait_until(&mut wake, until) {
                return;
            }
        }
    }

    /// The thread.
    pub(super) fn run(&self, mut limiter: Limiter) {
        while let Some(queues) = self.next_work() {
            loop {
                match self.serve(&queues, &mut limiter) {
                    Next::Sleep => break,
                    Next::Again => {}
                    Next::Wait(wait) => self.pause(wait),
                }
            }
        }
    }

    fn serve(&self, queues: &Queues, limiter: &mut Limiter) -> Next {
        if self.wake.lock().is_closed {
            return Next::Sleep;
        }
        // This may call the program, so not within an access.
        let session = self.disk.session();
        let access = match self.access(queues, &session) {
            Ok(access) => access,
            Err(next) => return next,
        };
        if self.disk.may_block() {
            self.serve_one(queues, access, &session, limiter)
        } else {
            self.serve_batch(&access, &session, limiter)
        }
    }

    /// Take a request, if the rate limits admit it.
    pub(super) fn take(
        &self,
        access: &QueueAccess<'_>,
        limiter: &mut Limiter,
    ) -> Result<Job, Next> {
        let chain = access.pop(0).ok_or(Next::Sleep)?;
        let Some(job) = Job::parse(access, chain) else {
            access.fail("a request has no room for its header or its status");
            return Err(Next::Sleep);
        };
        if limiter.limits() {
            let bytes = job.request.map_or(0, Request::bytes);
            if let Err(wait) = limiter.admit(bytes, Instant::now()) {
                access.push_back(job.chain);
                return Err(Next::Wait(wait));
            }
        }
        Ok(job)
    }

    /// Begin an access to the queues for a session that is current, and stays so until the access
    /// ends: the queues are closed to the device while a disk goes back.
    fn access<'a>(
        &self,
        queues: &'a Queues,
        session: &io::Result<Session>,
    ) -> Result<QueueAccess<'a>, Next> {
        let access = queues.access().ok_or(Next::Sleep)?;
        if session.as_ref().is_ok_and(|session| !self.disk.is_current(session)) {
            return Err(Next::Again);
        }
        Ok(access)
    }

    /// Carry out a request that calls the program.
    fn serve_one(
        &self,
        queues: &Queues,
        access: QueueAccess<'_>,
        session: &io::Result<Session>,
        limiter: &mut Limiter,
    ) -> Next {
        let mut job = match self.take(&access, limiter) {
            Ok(job) => job,
            Err(next) => return next,
        };
        let epoch = access.epoch();
        drop(access);
        if let Some(status) = self.perform(&job, session, &Reach::Later(queues, epoch))
            && let Some(access) = queues.access_after(epoch)
        {
            answer_all(&access, std::slice::from_mut(&mut job), &[status]);
        }
        Next::Again
    }

    /// Carry out a request. None if it is void.
    pub(super) fn perform(
        &self,
        job: &Job,
        session: &io::Result<Session>,
        reach: &Reach<'_>,
    ) -> Option<Status> {
        let request = match job.request {
            Ok(request) => request,
            Err(status) => return Some(status),
        };
        let result = match session {
            Ok(session) => self.carry_out(job, request, session, reach),
            Err(error) => Err(Ended::Failed(io::Error::new(error.kind(), error.to_string()))),
        };
        match result {
            Ok(status) => Some(status),
            Err(Ended::Void) => None,
            Err(Ended::Failed(error)) => {
                count(&self.counts.errors, 1);
                *self.failure.lock() = Some(format!("{}: {error}", request.describe()));
                Some(Status::Failed)
            }
        }
    }

    fn carry_out(
        &self,
        job: &Job,
        request: Request,
        session: &Session,
        reach: &Reach<'_>,
    ) -> Result<Status, Ended> {
        let counts = &self.counts;
        match request {
            Request::Read { offset, length } => {
                count(&counts.reads, 1);
                for (done, size) in chunks(length) {
                    reach.read(job, session, (offset + done, done, size))?;
                }
                count(&counts.bytes_read, length);
            }
            Request::Write { offset, length } => {
                count(&counts.writes, 1);
                for (done, size) in chunks(length) {
                    reach.write(job, session, (offset + done, done, size))?;
                }
                self.write_through(session)?;
                count(&counts.bytes_written, length);
            }
            Request::Flush => {
                count(&counts.flushes, 1);
                session.flush()?;
            }
            Request::Id => reach.with(job, |access| {
                let mut writer = ChainWriter::new(access, &job.chain);
                let room = usize::try_from(writer.left().saturating_sub(1)).unwrap_or(usize::MAX);
                let serial = self.serial.get(..room).unwrap_or(&self.serial);
                writer.write_all(serial).map_err(Ended::Failed)
            })??,
            Request::Discard | Request::WriteZeroes => {
                return self.clear(job, request == Request::Discard, session, reach);
            }
        }
        Ok(Status::Ok)
    }

    /// Discard ranges, or write zeroes.
    fn clear(
        &self,
        job: &Job,
        is_discard: bool,
        session: &Session,
        reach: &Reach<'_>,
    ) -> Result<Status, Ended> {
        count(&self.counts.discards, 1);
        let data =
            reach.with(job, |access| job.data(access, 0).read_vec(MOST_SEGMENT_BYTES + 1))?;
        let ranges = match blk_request::ranges(&data, is_discard) {
            Ok(ranges) => ranges,
            Err(status) => return Ok(status),
        };
        for range in ranges {
            if is_discard {
                session.discard(range.offset, range.length)?;
            } else {
                session.write_zeroes(range.offset, range.length, range.may_unmap)?;
            }
        }
        self.write_through(session)?;
        Ok(Status::Ok)
    }

    pub(super) fn write_through(&self, session: &Session) -> io::Result<()> {
        // Acquire: pairs with the release of the driver's choice.
        if self.is_write_back.load(Ordering::Acquire) { Ok(()) } else { session.flush() }
    }
}

/// Positions and sizes of what moves at once.
fn chunks(length: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = usize::try_from(CHUNK).unwrap_or(usize::MAX);
    (0..length).step_by(step).map(move |done| (done, (length - done).min(CHUNK)))
}
