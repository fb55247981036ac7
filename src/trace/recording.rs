//! Which traces record the current thread: a vCPU's thread during each exit, the loop's during each
//! iteration.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use smallvec::SmallVec;

use super::sink::{Span, Value};
use super::trace::Trace;
use super::track::Track;
use crate::sync::{RwLock, rank};

type Tracks = SmallVec<[Arc<Track>; 1]>;

thread_local! {
    /// The tracks on which this thread is recorded.
    static CURRENT: RefCell<Tracks> = RefCell::default();
}

/// Records its thread until it is dropped.
#[derive(Debug)]
pub struct Recording {
    former: Tracks,
    /// It stays on its thread.
    here: PhantomData<*const ()>,
}

impl Recording {
    /// Record this thread on these tracks. None if there are no tracks.
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

/// Record a span of this thread, with its start and end, on the thread's tracks.
pub fn record(category: &str, name: &str, times: (Instant, Instant), values: &[(&str, Value<'_>)]) {
    let span = Span { category, name, times, values };
    // Fails while the thread ends.
    let _ = CURRENT.try_with(|tracks| tracks.borrow().iter().for_each(|track| track.record(&span)));
}

/// Write this thread's buffers, if they are large enough. May wait for the disk.
pub fn flush() {
    let _ = CURRENT.try_with(|tracks| tracks.borrow().iter().for_each(|track| track.flush()));
}

/// The traces that record an event loop.
#[derive(Debug, Default)]
pub struct Recorders {
    is_any: AtomicBool,
    traces: RwLock<Vec<Arc<Trace>>, rank::Recorders>,
}

impl Recorders {
    /// Record the loop in a trace, starting with the next iteration.
    pub fn add(&self, trace: Arc<Trace>) {
        let mut traces = self.traces.write();
        traces.push(trace);
        // Relaxed, here and below: the lock orders the data, and an iteration may see the flag
        // late.
        self.is_any.store(true, Ordering::Relaxed);
    }

    /// Show it no more.
    pub fn remove(&self, trace: &Arc<Trace>) {
        let mut traces = self.traces.write();
        traces.retain(|known| !Arc::ptr_eq(known, trace));
        self.is_any.store(!traces.is_empty(), Ordering::Relaxed);
    }

    /// Record this thread, which runs the loop, in all these traces.
    #[must_use]
    #[inline]
    pub fn recording(&self) -> Option<Recording> {
        // Relaxed: a thread that sees the flag late starts with its next iteration.
        if self.is_any.load(Ordering::Relaxed) { self.begin() } else { None }
    }

    #[cold]
    fn begin(&self) -> Option<Recording> {
        Recording::on(self.traces.read().iter().map(|trace| trace.of_loop()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::track::BUFFER;

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
            assert!(trace.of_loop().gathered() < BUFFER);
            trace.finish().unwrap();
            call("late");
        });
        assert_eq!(text.matches(r#""name":"call""#).count(), 10_000);
        assert!(!text.contains("late"));
    }
}
