//! The trace of one machine: its file, with one track per vCPU and per thread that runs its loop.

use std::path::Path;
use std::sync::Arc;
use std::thread::ThreadId;

use super::sink::Sink;
use super::track::Track;
use crate::error::Result;
use crate::sync::{Mutex, rank};

/// The trace of one machine.
#[derive(Debug)]
pub struct Trace {
    sink: Arc<Sink>,
    vcpus: Vec<Arc<Track>>,
    loops: Mutex<Vec<(ThreadId, Arc<Track>)>, rank::LoopTracks>,
}

impl Trace {
    /// Create a trace in a new file, for a machine with this number of vCPUs.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Io`] if the file cannot be created.
    pub fn create(path: &Path, vcpus: u64) -> Result<Self> {
        let sink = Arc::new(Sink::create(path)?);
        let track = |id| Track::new(id + 1, &format!("vcpu_{id}"), &sink);
        let vcpus = (0..vcpus).map(track).collect();
        Ok(Self { sink, vcpus, loops: Mutex::default() })
    }

    /// Stop recording and complete the file. A second call does nothing, nor does a forked child's.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Io`] if the file could not be written; the trace then ends
    /// earlier.
    pub fn finish(&self) -> Result<()> {
        if self.sink.process_tag.is_forked_child() {
            return Ok(());
        }
        self.vcpus.iter().for_each(|track| track.close());
        self.loops.lock().iter().for_each(|(_, track)| track.close());
        self.sink.end()
    }

    /// The track of a vCPU. None if the number does not exist.
    pub(crate) fn vcpu(&self, vcpu: u64) -> Option<&Arc<Track>> {
        usize::try_from(vcpu).ok().and_then(|vcpu| self.vcpus.get(vcpu))
    }

    /// The track of this thread, which runs a loop.
    pub(super) fn of_loop(&self) -> Arc<Track> {
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
        // An error cannot be reported to a caller here.
        let _ = self.finish();
    }
}
