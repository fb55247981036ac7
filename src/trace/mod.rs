//! A trace: every hop of a machine (exit, device, event, callback) with its times, one track a
//! thread. A thread is recorded while a [`Recording`] lives on it: a vCPU's during each exit, the
//! loop's during each turn. The file is written by the thread whose track is full. What a machine
//! hands to a trace is in `vmm/instruments.rs`.

mod sink;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ThreadId;
use std::time::Instant;

use smallvec::SmallVec;

use crate::error::Result;
use crate::sync::{Mutex, RwLock, rank};
use sink::Sink;
pub use sink::{Span, Value};

/// What a track gathers before it is written.
const BUFFER: usize = 64 << 10;

/// The hops of one thread.
#[derive(Debug)]
pub struct Track {
    number: u64,
    sink: Arc<Sink>,
    buffer: Mutex<Buffer, rank::Track>,
}

#[derive(Debug, Default)]
struct Buffer {
    text: String,
    is_closed: bool,
}

impl Track {
    fn new(number: u64, name: &str, sink: &Arc<Sink>) -> Arc<Self> {
        let mut buffer = Buffer::default();
        sink.put_name(&mut buffer.text, number, name);
        Arc::new(Self { number, sink: Arc::clone(sink), buffer: Mutex::new(buffer) })
    }

    /// Does not write: it may be called with the GIL held.
    pub(crate) fn record(&self, span: &Span) {
        // In a forked child the lock may be held by a thread that is not there, and the file is the
        // parent's.
        if self.sink.process_tag.is_forked_child() {
            return;
        }
        let mut buffer = self.buffer.lock();
        if !buffer.is_closed {
            self.sink.put_span(&mut buffer.text, self.number, span);
        }
    }

    /// Write what has been gathered, if that is much.
    pub(crate) fn flush(&self) {
        if self.sink.process_tag.is_forked_child() {
            return;
        }
        let mut buffer = self.buffer.lock();
        if buffer.text.len() >= BUFFER {
            // Under the lock, so that the end of the trace comes after it.
            self.sink.write(&buffer.text);
            buffer.text.clear();
        }
    }

    fn close(&self) {
        let text = {
            let mut buffer = self.buffer.lock();
            buffer.is_closed = true;
            std::mem::take(&mut buffer.text)
        };
        self.sink.write(&text);
    }
}

/// See the module.
#[derive(Debug)]
pub struct Trace {
    sink: Arc<Sink>,
    vcpus: Vec<Arc<Track>>,
    loops: Mutex<Vec<(ThreadId, Arc<Track>)>, rank::LoopTracks>,
}

impl Trace {
    /// A trace into a new file, of a machine with so many vCPUs.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Io`] when the file cannot be made.
    pub fn create(path: &Path, vcpus: u64) -> Result<Self> {
        let sink = Arc::new(Sink::create(path)?);
        let track = |id| Track::new(id + 1, &format!("vcpu_{id}"), &sink);
        let vcpus = (0..vcpus).map(track).collect();
        Ok(Self { sink, vcpus, loops: Mutex::default() })
    }

    /// Record no more, and complete the file. Does nothing the second time, and in a forked child.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Io`] when the file could not be written: then the trace ends
    /// before.
    pub fn finish(&self) -> Result<()> {
        if self.sink.process_tag.is_forked_child() {
            return Ok(());
        }
        self.vcpus.iter().for_each(|track| track.close());
        self.loops.lock().iter().for_each(|(_, track)| track.close());
        self.sink.end()
    }

    /// The track of a vCPU; none for a number that does not exist.
    pub(crate) fn vcpu(&self, vcpu: u64) -> Option<&Arc<Track>> {
        usize::try_from(vcpu).ok().and_then(|vcpu| self.vcpus.get(vcpu))
    }

    /// The track of this thread, which turns a loop.
    fn of_loop(&self) -> Arc<Track> {
        let this = std::thread::current().id();
        let mut loops = self.loops.lock();
        if let Some((_, track)) = loops.iter().find(|(thread, _)| *thread == this) {
            return Arc::clone(track);
        }
        let number = (self.vcpus.len() + loops.len() + 1) as u64;
        let name = if loops.is_empty() { "loop".into() } else { format!("loop {number}") };
        let track = Track::new(number, &name, &self.sink);
        loops.push((this, Arc::clone(&track)));
        track
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // There is no caller to report a failure to.
        let _ = self.finish();
    }
}

type Tracks = SmallVec<[Arc<Track>; 1]>;

thread_local! {
    /// Where this thread is recorded.
    static CURRENT: RefCell<Tracks> = RefCell::default();
}

/// While it lives, its thread is recorded.
#[derive(Debug)]
pub struct Recording {
    former: Tracks,
    /// It stays on its thread.
    here: PhantomData<*const ()>,
}

impl Recording {
    /// Record this thread on these tracks; none without one.
    pub(crate) fn on(tracks: impl Iterator<Item = Arc<Track>>) -> Option<Self> {
        let tracks: Tracks = tracks.collect();
        if tracks.is_empty() {
            return None;
        }
        Some(Self { former: CURRENT.replace(tracks), here: PhantomData })
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        CURRENT.set(std::mem::take(&mut self.former));
    }
}

/// Whether this thread is recorded.
#[must_use]
pub fn is_recorded() -> bool {
    CURRENT.try_with(|tracks| !tracks.borrow().is_empty()).unwrap_or(false)
}

/// Record what has happened on this thread, from when to when, where it is recorded.
pub fn record(category: &str, name: &str, times: (Instant, Instant), values: &[(&str, Value<'_>)]) {
    let span = Span { category, name, times, values };
    // Fails when the thread ends.
    let _ = CURRENT.try_with(|tracks| tracks.borrow().iter().for_each(|track| track.record(&span)));
}

/// Write what this thread has recorded, if that is much. May wait for the disk.
pub fn flush() {
    let _ = CURRENT.try_with(|tracks| tracks.borrow().iter().for_each(|track| track.flush()));
}

/// The traces that see an event loop's turns.
#[derive(Debug, Default)]
pub struct Recorders {
    is_any: AtomicBool,
    traces: RwLock<Vec<Arc<Trace>>, rank::Recorders>,
}

impl Recorders {
    /// Show a trace each turn, from the next on.
    pub fn add(&self, trace: Arc<Trace>) {
        let mut traces = self.traces.write();
        traces.push(trace);
        // Relaxed, here and below: the lock orders what it stands for, and a turn may come late to
        // it.
        self.is_any.store(true, Ordering::Relaxed);
    }

    /// Show it no more.
    pub fn remove(&self, trace: &Arc<Trace>) {
        let mut traces = self.traces.write();
        traces.retain(|known| !Arc::ptr_eq(known, trace));
        self.is_any.store(!traces.is_empty(), Ordering::Relaxed);
    }

    /// Record this thread, which turns the loop, where a trace wants it.
    #[must_use]
    pub fn recording(&self) -> Option<Recording> {
        if !self.is_any.load(Ordering::Relaxed) {
            return None;
        }
        Recording::on(self.traces.read().iter().map(|trace| trace.of_loop()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traced(name: &str, work: impl FnOnce(&Arc<Trace>)) -> String {
        let path = std::env::temp_dir().join(format!("pyvmm-{}-{name}.json", std::process::id()));
        let trace = Arc::new(Trace::create(&path, 2).unwrap());
        work(&trace);
        trace.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(text.starts_with("[{") && text.ends_with("\n]\n"), "{text}");
        text
    }

    fn call(name: &str) {
        record("callback", name, (Instant::now(), Instant::now()), &[]);
    }

    #[test]
    fn a_thread_is_recorded_while_a_recording_lives() {
        let text = traced("loop", |trace| {
            let recorders = Recorders::default();
            assert!(recorders.recording().is_none());
            recorders.add(Arc::clone(trace));
            call("before");
            {
                let _recording = recorders.recording().unwrap();
                assert!(is_recorded());
                call("during");
            }
            assert!(!is_recorded());
            call("after");
            recorders.remove(trace);
            assert!(recorders.recording().is_none());
        });
        assert!(text.contains("during") && !text.contains("before") && !text.contains("after"));
        assert_eq!(text.matches(r#"{"name":"loop"}"#).count(), 1);
    }

    #[test]
    fn each_thread_that_turns_the_loop_has_its_track() {
        let text = traced("threads", |trace| {
            let recorders = Arc::new(Recorders::default());
            recorders.add(Arc::clone(trace));
            for _ in 0..2 {
                let recorders = Arc::clone(&recorders);
                let turn = move || {
                    let _recording = recorders.recording();
                    call("call");
                };
                std::thread::spawn(turn).join().unwrap();
            }
        });
        assert!(text.contains(r#""tid":3,"args":{"name":"loop"}"#), "{text}");
        assert!(text.contains(r#""tid":4,"args":{"name":"loop 4"}"#), "{text}");
    }

    #[test]
    fn much_is_written_before_the_end_and_nothing_after_it() {
        let text = traced("much", |trace| {
            let recorders = Recorders::default();
            recorders.add(Arc::clone(trace));
            let _recording = recorders.recording();
            for _ in 0..10_000 {
                call("call");
                flush();
            }
            let track = trace.of_loop();
            assert!(track.buffer.lock().text.len() < BUFFER);
            trace.finish().unwrap();
            call("late");
        });
        assert_eq!(text.matches(r#""name":"call""#).count(), 10_000);
        assert!(!text.contains("late"));
    }
}
