//! vCPU threads whose machine was dropped during one of their callbacks. They end when the callback
//! returns; the interpreter waits for them at exit. On any thread.

use std::thread::JoinHandle;

use crate::process::ProcessTag;
use crate::sync::{Mutex, assert_unlocked, rank};

type Left = Vec<(ProcessTag, JoinHandle<()>)>;

static LEFT: Mutex<Left, rank::LeftThreads> = Mutex::new(Vec::new());

/// Keep a thread that cannot be joined: its machine is dropped on this very thread, or on one that
/// must not wait for it.
pub(crate) fn leave(thread: JoinHandle<()>) {
    let mut left = LEFT.lock();
    left.retain(|(process_tag, thread)| !process_tag.is_forked_child() && !thread.is_finished());
    left.push((ProcessTag::current(), thread));
}

/// Whether there are none.
#[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the end of the interpreter"))]
pub(crate) fn is_empty() -> bool {
    LEFT.lock().is_empty()
}

/// Wait for all of them. In a forked child, the threads of its parent do not exist.
#[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the end of the interpreter"))]
pub(crate) fn join_all() {
    assert_unlocked("threads that were left are waited for");
    let left = std::mem::take(&mut *LEFT.lock());
    for (process_tag, thread) in left {
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
    fn a_thread_that_was_left_is_waited_for() {
        let (go, gone) = channel::<()>();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        leave(std::thread::spawn(move || {
            gone.recv().unwrap();
            over.store(true, Ordering::SeqCst);
        }));
        go.send(()).unwrap();
        join_all();
        assert!(is_over.load(Ordering::SeqCst));
    }
}
