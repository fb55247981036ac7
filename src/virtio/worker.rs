//! The thread of a device that may block, started with the first request.

use std::thread::{self, JoinHandle};

use super::queues::Queues;
use crate::sync::{Mutex, rank};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Worker(Mutex<Option<JoinHandle<()>>, rank::VirtioWorker>);

impl Worker {
    /// Start the thread, unless it runs. If it cannot be started, the device needs a reset.
    pub(super) fn start(&self, queues: &Queues, run: impl FnOnce() + Send + 'static) {
        let mut worker = self.0.lock();
        if worker.is_some() {
            return;
        }
        let started = thread::Builder::new().name(queues.name().to_owned()).spawn(run);
        let failed = started.map(|started| *worker = Some(started)).err();
        drop(worker);
        if let Some(error) = failed {
            queues.fail(format!("its thread cannot be started: {error}"));
        }
    }

    /// The device has told the thread to end. One that something else holds up is not waited for.
    pub(super) fn end(&self, is_waited_for: bool) {
        let worker = self.0.lock().take();
        if let Some(worker) = worker.filter(|_| is_waited_for) {
            // Fails only if the thread has panicked.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;
    use crate::config::RngConfig;
    use crate::virtio::mock::MockDriver;
    use crate::virtio::rng::Rng;

    #[test]
    fn one_thread_runs_and_is_waited_for_where_that_is_safe() {
        let driver = MockDriver::new(Arc::new(Rng::new(RngConfig { seed: None })), 2).unwrap();
        let queues = driver.attached.transport.queues();
        let worker = Worker::default();
        worker.end(true);
        let ((go, told), (report, reports)) = (mpsc::channel::<()>(), mpsc::channel());
        let second = report.clone();
        worker.start(queues, move || {
            told.recv().unwrap();
            report.send(thread::current().name().map(str::to_owned)).unwrap();
        });
        worker.start(queues, move || second.send(None).unwrap());
        go.send(()).unwrap();
        worker.end(true);
        assert_eq!(reports.try_iter().collect::<Vec<_>>(), [Some("device".to_owned())]);

        // This thread ends only after the test has passed by.
        let (go, told) = mpsc::channel::<()>();
        worker.start(queues, move || told.recv().unwrap());
        worker.end(false);
        go.send(()).unwrap();
        assert_eq!(queues.failure(), None);
    }
}
