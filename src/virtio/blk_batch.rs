//! Requests to a file, carried out in guest memory within an access to the queues. Those that
//! follow each other on the disk are one system call. On the thread of the disk.

use std::io;
use std::time::{Duration, Instant};

use super::access::QueueAccess;
use super::blk_limit::Limiter;
use super::blk_reach::{Job, Reach, answer_all, read_now, write_now};
use super::blk_request::{Request, Status};
use super::blk_worker::{CHUNK, Next, Shared, count};
use crate::disk::Session;

/// How many requests are taken before the first is carried out.
const GROUP: usize = 16;
/// After so many groups, or this long, an access ends: the driver is interrupted, and a snapshot
/// may begin.
const GROUPS: usize = 8;
const BATCH_TIME: Duration = Duration::from_micros(500);

/// What is taken at once. The storage of one group is used for the next.
#[derive(Default)]
struct Group {
    jobs: Vec<Job>,
    statuses: Vec<Status>,
}

impl Shared {
    /// Carry out requests within an access.
    pub(super) fn serve_batch(
        &self,
        access: &QueueAccess<'_>,
        session: &io::Result<Session>,
        limiter: &mut Limiter,
    ) -> Next {
        let (began, mut group) = (Instant::now(), Group::default());
        for _ in 0..GROUPS {
            let next = self.take_group(access, limiter, &mut group.jobs);
            let is_late = self.perform_group(access, session, &mut group, began);
            match next {
                // What it has put back is taken again.
                _ if is_late => break,
                Some(next) => return next,
                None => {}
            }
        }
        Next::Again
    }

    /// Take requests, and say what to do after them if there are no more.
    fn take_group(
        &self,
        access: &QueueAccess<'_>,
        limiter: &mut Limiter,
        jobs: &mut Vec<Job>,
    ) -> Option<Next> {
        // One that a limit has admitted is not put back.
        let most = if limiter.limits() { 1 } else { GROUP };
        while jobs.len() < most {
            match self.take(access, limiter) {
                Ok(job) => jobs.push(job),
                Err(next) => return Some(next),
            }
        }
        None
    }

    /// Carry out requests, and answer them all at once. Those that it has no time for are put back.
    /// Returns whether the time is over.
    fn perform_group(
        &self,
        access: &QueueAccess<'_>,
        session: &io::Result<Session>,
        group: &mut Group,
        began: Instant,
    ) -> bool {
        let Group { jobs, statuses } = group;
        statuses.clear();
        let mut is_late = false;
        while let Some(left @ [first, ..]) = jobs.get(statuses.len()..)
            && !is_late
        {
            let run = left.get(..run_length(left)).unwrap_or_default();
            if run.len() > 1 && self.perform_run(access, session, run).is_some() {
                statuses.extend(run.iter().map(|_| Status::Ok));
            } else {
                // It is not void: the access is not over.
                let status = self.perform(first, session, &Reach::Now(access));
                statuses.push(status.unwrap_or(Status::Failed));
            }
            is_late = began.elapsed() > BATCH_TIME;
        }
        answer_all(access, jobs, statuses);
        let left = jobs.drain(statuses.len()..).rev();
        left.for_each(|job| access.push_back(job.chain));
        jobs.clear();
        is_late
    }

    /// Carry out requests that follow each other on the disk. None if that failed: each of them has
    /// to be carried out by itself then, and some may succeed.
    fn perform_run(
        &self,
        access: &QueueAccess<'_>,
        session: &io::Result<Session>,
        jobs: &[Job],
    ) -> Option<()> {
        let session = session.as_ref().ok()?;
        let (counts, number) = (&self.counts, jobs.len() as u64);
        let size = jobs.iter().filter_map(|job| job.request.ok()).map(Request::bytes).sum();
        match jobs.first()?.request.ok()? {
            Request::Read { offset, .. } => {
                read_now(access, jobs, session, (offset, 0, size)).ok()?;
                count(&counts.reads, number);
                count(&counts.bytes_read, size);
            }
            Request::Write { offset, .. } => {
                write_now(access, jobs, session, (offset, 0, size)).ok()?;
                self.write_through(session).ok()?;
                count(&counts.writes, number);
                count(&counts.bytes_written, size);
            }
            _ => return None,
        }
        Some(())
    }
}

/// How many requests from the first on read or write one range of the disk, which moves at once.
fn run_length(jobs: &[Job]) -> usize {
    let mut end = None;
    let mut size = 0;
    let follows = |job: &&Job| {
        let (kind, offset, length) = match job.request {
            Ok(Request::Read { offset, length }) => (0, offset, length),
            Ok(Request::Write { offset, length }) => (1, offset, length),
            _ => return false,
        };
        size += length;
        let is_next = end.is_none_or(|end| end == (kind, offset));
        end = offset.checked_add(length).map(|end| (kind, end));
        is_next && end.is_some() && size <= CHUNK
    };
    jobs.iter().take_while(follows).count().max(1)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::super::blk::tests::driver;
    use super::super::mock::{MockDriver, readable, writable};
    use crate::disk::Contents;

    const SECTOR: usize = 512;
    const SECTORS: usize = 40;
    /// Where the headers, the statuses and the data of the requests are.
    const HEADERS: u64 = MockDriver::BUFFERS;
    const STATUSES: u64 = HEADERS + 0x1000;
    const DATA: u64 = HEADERS + 0x2000;

    fn requests() -> impl Strategy<Value = Vec<(bool, usize, usize)>> {
        // Many of them follow the one before.
        let request = (any::<bool>(), 0usize..SECTORS + 2, 1usize..4, 0usize..4);
        prop::collection::vec(request, 1..60).prop_map(|all| {
            let (mut found, mut last) = (Vec::new(), (false, 0, 0));
            for (is_write, at, count, goes_on) in all {
                let (was_write, start, length) = last;
                last = if goes_on > 0 {
                    (was_write, start + length, count)
                } else {
                    (is_write, at, count)
                };
                found.push(last);
            }
            found
        })
    }

    fn first() -> Vec<u8> {
        (0..SECTOR * SECTORS).map(|at| (at / 100).to_le_bytes()[0]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        // Long because the requests, what each has to do, and the check are in one place.
        #[test]
        fn requests_at_once_do_what_each_does_by_itself(requests in requests()) {
            let mut driver = driver(Contents::Bytes(first()), |_| {});
            driver.start(0);
            let mut disk = first();
            let mut expected = Vec::new();
            for (number, &(is_write, at, count)) in (0u64..).zip(&requests) {
                let (start, size) = (at * SECTOR, count * SECTOR);
                let data = DATA + 0x800 * number;
                let ours = vec![number.to_le_bytes()[0].wrapping_mul(3); size];
                driver.memory.write(data, &ours).unwrap();
                let header = u128::from(is_write) | (at as u128) << 64;
                driver.memory.write(HEADERS + 16 * number, &header.to_le_bytes()).unwrap();
                driver.memory.store(STATUSES + number, 0xffu8).unwrap();
                let length = u32::try_from(size).unwrap();
                let buffer = if is_write { readable } else { writable }(data, length);
                let status = writable(STATUSES + number, 1);
                driver.add(0, &[readable(HEADERS + 16 * number, 16), buffer, status]).unwrap();
                let there = disk.get_mut(start..start + size);
                expected.push(match there {
                    Some(there) if is_write => {
                        there.copy_from_slice(&ours);
                        (0, ours)
                    }
                    Some(there) => (0, there.to_vec()),
                    None => (1, ours),
                });
            }
            driver.notify(0);
            let (mut left, give_up) = (requests.len(), Instant::now() + Duration::from_secs(60));
            while left > 0 {
                prop_assert!(Instant::now() < give_up, "{left} are not answered");
                driver.turn(0).unwrap();
                while driver.used(0).is_some() {
                    left -= 1;
                }
                std::thread::yield_now();
            }
            for (number, (status, data)) in (0u64..).zip(expected) {
                prop_assert_eq!(driver.memory.load::<u8>(STATUSES + number).unwrap(), status);
                let mut bytes = vec![0; data.len()];
                driver.memory.read(DATA + 0x800 * number, &mut bytes).unwrap();
                prop_assert_eq!(bytes, data, "request {}", number);
            }
        }
    }
}
