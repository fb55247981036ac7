//! vCPU threads whose machine was dropped during one of their callbacks. They end when the callback
//! returns; the interpreter waits for them at exit. On any thread.

use std::thread::JoinHandle;

use crate::process::ProcessTag;
use crate::sync::{Mutex, assert_unlocked, rank};

type Threads = Vec<(ProcessTag, JoinHandle<()>)>;

static UNJOINED: Mutex<Threads, rank::UnjoinedThreads> = Mutex::new(Vec::new());

/// Keep a thread that cannot be joined: its machine is dropped on this very thread, or on one that
/// must not wait for it.
pub(crate) fn keep(thread: JoinHandle<()>) {
    let mut unjoined = UNJOINED.lock();
    unjoined
        .retain(|(process_tag, thread)| !process_tag.is_forked_child() && !thread.is_finished());
    unjoined.push((ProcessTag::current(), thread));
}

/// Whether there are none.
#[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the end of the interpreter"))]
pub(crate) fn is_empty() -> bool {
    UNJOINED.lock().is_empty()
}

/// Wait for all of them. In a forked child, the threads of its parent do not exist.
#[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the end of the interpreter"))]
pub(crate) fn join_all() {
    assert_unlocked("threads that were not joined are waited for");
    let unjoined = std::mem::take(&mut *UNJOINED.lock());
    for (process_tag, thread) in unjoined {
        if process_tag.is_forked_child() {
            std::mem::forget(thread);
        } else {
            // Its guard has reported a panic.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;

    #[test]
    fn a_kept_thread_is_waited_for() {
        let (go, gone) = channel::<()>();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        keep(std::thread::spawn(move || {
            gone.recv().unwrap();
            over.store(true, Ordering::SeqCst);
        }));
        go.send(()).unwrap();
        join_all();
        assert!(is_over.load(Ordering::SeqCst));
    }
}
