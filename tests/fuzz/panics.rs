//! Notes the panics of every thread. Those of imago are counted apart: the disk catches them, and
//! its requests fail.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

static FIRST: Mutex<Option<String>> = Mutex::new(None);
// Relaxed: a count.
static CAUGHT: AtomicUsize = AtomicUsize::new(0);

/// Note panics from now on.
pub(crate) fn watch() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.location().is_some_and(|at| at.file().contains("/imago-")) {
            CAUGHT.fetch_add(1, Ordering::Relaxed);
            return;
        }
        FIRST.lock().unwrap().get_or_insert_with(|| info.to_string());
        usual(info);
    }));
}

/// The first panic since the last call.
pub(crate) fn take() -> Option<String> {
    FIRST.lock().unwrap().take()
}

/// How many panics there were in imago since the last call.
pub(crate) fn take_caught() -> usize {
    CAUGHT.swap(0, Ordering::Relaxed)
}
