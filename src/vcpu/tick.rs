//! A timer that brings this thread out of its guest: a run on the caller's thread has to check its
//! event loop and its deadline periodically. There is one per thread, used by the innermost run.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::AtomicU8;
use std::time::{Duration, Instant};

use super::run_page::RunPage;
use super::signal::{kick_cookie, kick_signal, unblock_kicks};
use super::ticked::{FLAG, HAS_TICKED};
use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcessTag;

thread_local! {
    static TIMER: RefCell<Option<Timer>> = const { RefCell::new(None) };
}

/// A kernel timer that signals the thread that created it.
struct Timer {
    id: libc::timer_t,
    process_tag: ProcessTag,
}

impl Timer {
    fn new() -> Result<Self> {
        // SAFETY: a sigevent of zeros is valid, and the call reads it and writes the number.
        let (made, id) = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = kick_signal()?;
            event.sigev_value = libc::sigval { sival_ptr: kick_cookie() };
            event.sigev_notify_thread_id = libc::gettid();
            let mut id = MaybeUninit::<libc::timer_t>::uninit();
            (libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, id.as_mut_ptr()), id)
        };
        if made != 0 {
            let error = std::io::Error::last_os_error();
            return Err(Error::os(ErrorKind::State, "timer_create", &error)
                .hint("raise RLIMIT_SIGPENDING, or use run()"));
        }
        // SAFETY: the call has succeeded.
        Ok(Self { id: unsafe { id.assume_init() }, process_tag: ProcessTag::current() })
    }

    /// Send a tick after this time; `None` disarms the timer.
    fn set(&self, after: Option<Duration>) {
        // Zero would disarm it.
        let after = after.map_or(Duration::ZERO, |after| after.max(Duration::from_nanos(1)));
        let it_value = libc::timespec {
            tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(after.subsec_nanos()),
        };
        let it_interval = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let time = libc::itimerspec { it_interval, it_value };
        // SAFETY: a timer of this process. The call cannot fail for such a time.
        unsafe { libc::timer_settime(self.id, 0, &raw const time, ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // A forked child does not inherit timers.
        if !self.process_tag.is_forked_child() {
            // SAFETY: created by this process, and deleted once.
            unsafe { libc::timer_delete(self.id) };
        }
    }
}

/// While it lives, ticks bring this thread out of the guest of this vCPU.
pub(crate) struct Ticks<'a> {
    page: &'a RunPage,
    outer: *const AtomicU8,
}

/// Whether this thread has a timer, or can create one.
pub(crate) fn can_tick() -> bool {
    provide_timer().is_ok()
}

fn provide_timer() -> Result<()> {
    TIMER.with_borrow_mut(|timer| {
        if timer.as_ref().is_none_or(|timer| timer.process_tag.is_forked_child()) {
            *timer = Some(Timer::new()?);
        }
        Ok(())
    })
}

impl<'a> Ticks<'a> {
    /// # Errors
    /// If no timer can be created, or there is no kick signal.
    pub(super) fn begin(page: &'a RunPage) -> Result<Self> {
        unblock_kicks()?;
        provide_timer()?;
        Ok(Self { page, outer: FLAG.replace(page.flag()) })
    }

    /// Tick once at this time.
    pub(crate) fn arm(&self, at: Instant) {
        HAS_TICKED.set(false);
        set(Some(at.saturating_duration_since(Instant::now())));
    }

    /// Whether a tick has come.
    pub(super) fn take_tick(&self) -> bool {
        HAS_TICKED.replace(false)
    }

    pub(super) fn page(&self) -> &RunPage {
        self.page
    }
}

impl Drop for Ticks<'_> {
    fn drop(&mut self) {
        FLAG.set(self.outer);
        // If this run was in a callback of an outer run, that one checks its loop soon.
        set((!self.outer.is_null()).then_some(Duration::from_millis(1)));
    }
}

fn set(after: Option<Duration>) {
    TIMER.with_borrow(|timer| timer.iter().for_each(|timer| timer.set(after)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_for_tick(ticks: &Ticks<'_>) {
        let give_up = Instant::now() + Duration::from_secs(60);
        while !ticks.take_tick() {
            assert!(Instant::now() < give_up);
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_tick_makes_the_next_entry_fail() {
        let page = RunPage::blank();
        let ticks = Ticks::begin(&page).unwrap();
        ticks.arm(Instant::now());
        wait_for_tick(&ticks);
        assert!(page.is_set());
    }

    #[test]
    fn an_inner_run_gives_the_timer_back() {
        let (outer, inner) = (RunPage::blank(), RunPage::blank());
        let ticks = Ticks::begin(&outer).unwrap();
        ticks.arm(Instant::now() + Duration::from_secs(3600));
        {
            let ticks = Ticks::begin(&inner).unwrap();
            ticks.arm(Instant::now());
            wait_for_tick(&ticks);
        }
        wait_for_tick(&ticks);
        assert!(inner.is_set() && outer.is_set());
    }
}
