//! Records the hops of a flow, which are the functions that it enters, for the test that compares
//! them with docs/architecture.md. Runs on the thread of the hop. A release build contains none of
//! this.

/// Record that the flow enters the surrounding function.
macro_rules! hop {
    () => {
        #[cfg(all(debug_assertions, any(feature = "python", test)))]
        {
            fn here() {}
            $crate::hop::note(file!(), std::any::type_name_of_val(&here));
        }
    };
}
pub(crate) use hop;

#[cfg(all(debug_assertions, any(feature = "python", test)))]
pub(crate) use recording::note;
#[cfg(all(debug_assertions, feature = "python"))]
pub(crate) use recording::record;

#[cfg(all(debug_assertions, any(feature = "python", test)))]
mod recording {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use crate::sync::{Mutex, rank};

    /// A function that a thread has entered.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) struct Hop {
        /// The thread's name. None for a thread created by the program.
        pub(crate) thread: Option<String>,
        pub(crate) file: &'static str,
        pub(crate) function: &'static str,
    }

    static IS_RECORDING: AtomicBool = AtomicBool::new(false);
    static HOPS: Mutex<Vec<Hop>, rank::Hops> = Mutex::new(Vec::new());

    /// Start or stop recording. Returns the hops since the last call.
    pub(crate) fn record(is_recording: bool) -> Vec<Hop> {
        // Relaxed: it protects no data, and the lock below orders the hops.
        IS_RECORDING.store(is_recording, Ordering::Relaxed);
        std::mem::take(&mut *HOPS.lock())
    }

    /// Called by `hop!`, with the path of a function inside the surrounding one.
    pub(crate) fn note(file: &'static str, path: &'static str) {
        // Relaxed: a thread that sees the flag late starts with its next hop.
        if IS_RECORDING.load(Ordering::Relaxed) {
            let thread = thread::current().name().map(str::to_owned);
            HOPS.lock().push(Hop { thread, file, function: name_of(path) });
        }
    }

    /// The name of the function: the second to last part of the path that is not a closure.
    fn name_of(path: &'static str) -> &'static str {
        path.rsplit("::").skip(1).find(|name| *name != "{{closure}}").unwrap_or(path)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        struct Here<T>(T);

        impl<T> Iterator for Here<T> {
            type Item = ();

            fn next(&mut self) -> Option<()> {
                let in_a_closure = || {
                    crate::hop::hop!();
                };
                in_a_closure();
                None
            }
        }

        #[test]
        fn a_hop_has_the_name_of_its_function_and_is_recorded_only_when_asked() {
            // Other tests may record hops at the same time.
            let own = |is_recording| {
                let me = thread::current().name().map(str::to_owned);
                let mut hops = record(is_recording);
                hops.retain(|hop| hop.thread == me);
                hops
            };
            crate::hop::hop!();
            assert_eq!(own(true), []);
            Here(1).next();
            let hops = own(true);
            let names: Vec<_> = hops.iter().map(|hop| (hop.file, hop.function)).collect();
            assert_eq!(names, [("src/hop.rs", "next")]);
            record(false);
            Here(1).next();
            assert_eq!(own(false), []);
        }
    }
}
