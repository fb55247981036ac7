//! A machine's counters, and its trace, of which there is at most one. From any thread.

use std::path::Path;
use std::sync::{Arc, Weak};

use smallvec::SmallVec;

use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::process::ProcessTag;
use crate::sync::{Mutex, rank};

use crate::trace::{Span, Trace, Track, Value};
use crate::vcpu::{AnsweredExit, ExitKey, ExitRouter, Observer, Stats};

/// The counters and the trace of one machine.
#[derive(Debug)]
pub struct Instruments {
    /// The counters of its exits.
    pub stats: Arc<Stats>,
    router: Arc<ExitRouter>,
    /// Dropped when the machine is closed, unless other machines share it.
    event_manager: Weak<EventManager>,
    process_tag: ProcessTag,
    trace: Mutex<Option<Arc<Trace>>, rank::MachineTrace>,
}

impl Instruments {
    /// Instruments for a machine with these counters, this exit router and this event loop.
    #[must_use]
    pub fn new(stats: Stats, router: &Arc<ExitRouter>, event_manager: &Arc<EventManager>) -> Self {
        Self {
            stats: Arc::new(stats),
            router: Arc::clone(router),
            event_manager: Arc::downgrade(event_manager),
            process_tag: ProcessTag::current(),
            trace: Mutex::default(),
        }
    }

    /// Write a trace to a new file. It begins with each vCPU's next entry and the loop's next
    /// iteration.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while another trace is written; [`ErrorKind::Io`] if the file cannot be
    /// created.
    pub fn start_trace(&self, path: &Path) -> Result<Arc<Trace>> {
        let mut current = self.trace.lock();
        if current.is_some() {
            let detail = "this machine is being traced: one trace at a time";
            return Err(Error::new(ErrorKind::State, "trace", detail));
        }
        let trace = Arc::new(Trace::create(path, self.stats.vcpu_count())?);
        self.router.observe(Arc::clone(&trace) as Arc<dyn Observer>);
        if let Some(event_manager) = self.event_manager.upgrade() {
            event_manager.recorders.add(Arc::clone(&trace));
            // Wake the loop, so that it begins a new iteration. If this fails, it does so at its
            // next event.
            let _ = event_manager.kick();
        }
        *current = Some(Arc::clone(&trace));
        Ok(trace)
    }

    /// Complete the trace that [`Self::start_trace`] began. Does nothing in a forked child: the
    /// trace belongs to the parent.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the file could not be written.
    pub fn end_trace(&self, trace: &Arc<Trace>) -> Result<()> {
        if self.process_tag.is_forked_child() {
            return Ok(());
        }
        self.trace.lock().take_if(|current| Arc::ptr_eq(current, trace));
        self.router.unobserve(&(Arc::clone(trace) as Arc<dyn Observer>));
        if let Some(event_manager) = self.event_manager.upgrade() {
            event_manager.recorders.remove(trace);
        }
        trace.finish()
    }
}

impl Drop for Instruments {
    /// A loop may be shared with other machines: a trace must not outlive its machine there.
    fn drop(&mut self) {
        if let Some(trace) = self.trace.get_mut().take() {
            // No caller is left to report an error to.
            let _ = self.end_trace(&trace);
        }
    }
}

impl Observer for Trace {
    fn track(&self, vcpu: u64) -> Option<Arc<Track>> {
        self.vcpu(vcpu).cloned()
    }

    fn after_exit(&self, seen: &AnsweredExit) {
        let Some(track) = self.vcpu(seen.vcpu) else { return };
        let times = (seen.entered, seen.left);
        track.record(&Span { category: "guest", name: "guest", times, values: &[] });
        let ExitKey { kind, access, address } = ExitKey::of(seen.exit);
        let mut name = kind.to_owned();
        let mut values: SmallVec<[_; 2]> = SmallVec::new();
        if let Some(access) = access {
            name.push(' ');
            name.push_str(access);
            values.push(("access", Value::Text(access)));
        }
        if let Some(address) = address {
            name.push_str(&format!(" {address:#x}"));
            values.push(("address", Value::Hex(address)));
        }
        let times = (seen.left, seen.answered);
        track.record(&Span { category: "exit", name: &name, times, values: &values });
        track.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::vcpu::VcpuExit;
    use crate::virtio::DeviceStats;

    #[test]
    fn an_exit_is_time_inside_and_time_outside() {
        let path = std::env::temp_dir().join(format!("pyvmm-{}-exit.json", std::process::id()));
        let trace = Trace::create(&path, 2).unwrap();
        {
            let now = Instant::now();
            let exit = VcpuExit::IoIn { port: 0x60, size: 1, count: 1 };
            trace.after_exit(&AnsweredExit {
                vcpu: 1,
                exit: &exit,
                entered: now,
                left: now,
                answered: now,
            });
            let nobody =
                AnsweredExit { vcpu: 7, exit: &exit, entered: now, left: now, answered: now };
            trace.after_exit(&nobody);
        }
        trace.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("vcpu_0") && lines[2].contains("vcpu_1"));
        assert!(lines[3].contains(r#""tid":2"#) && lines[3].contains(r#""cat":"guest""#));
        assert!(
            lines[4].contains(r#""name":"io read 0x60","args":{"access":"read","address":"0x60"}"#)
        );
        assert_eq!(lines.len(), 6);
    }

    #[test]
    fn one_trace_at_a_time_and_none_after_the_machine() {
        let (router, manager) = (Arc::default(), Arc::new(EventManager::new().unwrap()));
        let stats = Stats::new(1, DeviceStats::default());
        let instruments = Instruments::new(stats, &router, &manager);
        let trace = instruments.start_trace(Path::new("/dev/null")).unwrap();
        let again = instruments.start_trace(Path::new("/dev/null")).unwrap_err();
        assert_eq!(again.kind, ErrorKind::State);
        instruments.end_trace(&trace).unwrap();
        instruments.end_trace(&trace).unwrap();
        instruments.start_trace(Path::new("/dev/null")).unwrap();
        assert!(manager.recorders.recording().is_some());
        drop(instruments);
        assert!(manager.recorders.recording().is_none());
    }
}
