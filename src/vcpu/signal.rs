//! The kick's signal: which one, and its handler. The only place that touches signals.
//!
//! The program can still use the signal: one that is no kick reaches the handler that was installed
//! before.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ticked::on_tick;
use crate::error::{Error, ErrorKind, Result};
use crate::process::Learnt;

/// Its address marks a kick, as opposed to the same signal from another sender.
static COOKIE: u8 = 0;

struct Claim {
    signal: libc::c_int,
    previous: libc::sigaction,
}

impl Claim {
    /// Whether the program had a handler of its own.
    fn has_handler(&self) -> bool {
        has_handler(&self.previous)
    }

    /// Whether it could be sent.
    ///
    /// # Safety
    /// The thread must not have ended.
    unsafe fn send(&self, thread: libc::pthread_t) -> bool {
        self.keep_installed();
        let value = libc::sigval { sival_ptr: kick_cookie() };
        // SAFETY: by the caller. A queued signal arrives 10 us later, so it is sent only if a
        // handler has to distinguish it from others.
        unsafe {
            if self.has_handler() {
                libc::pthread_sigqueue(thread, self.signal, value) == 0
            } else {
                libc::pthread_kill(thread, self.signal) == 0
            }
        }
    }

    /// Install the handler again if the program has ignored the signal or restored its default
    /// since: the first would lose kicks, and the second would end the process. A handler of the
    /// program's serves as well, because any handler interrupts KVM_RUN.
    fn keep_installed(&self) {
        if present(self.signal).is_ok_and(|now| !has_handler(&now)) {
            // Fails for no signal that could be read.
            let _ = install(self.signal);
        }
    }
}

fn has_handler(action: &libc::sigaction) -> bool {
    ![libc::SIG_DFL, libc::SIG_IGN].contains(&action.sa_sigaction)
}

/// The signal for kicks when the kernel refuses to queue the other: claimed when that first
/// happens.
static SPARE: Learnt<Claim> = Learnt::unknown();

/// Read by the signal handler: that is one atomic load.
static CLAIM: Learnt<Option<Claim>> = Learnt::unknown();
/// Whether the handler of the claim is in place.
static IS_INSTALLED: AtomicBool = AtomicBool::new(false);

const FAULTS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// What a kick or a tick of pyvmm's carries, and no signal of the program's.
pub(super) fn kick_cookie() -> *mut libc::c_void {
    (&raw const COOKIE).cast_mut().cast()
}

/// The signal that kicks: the one chosen by [`use_signal`], or the first real-time signal that had
/// no handler when the first machine was made.
///
/// # Errors
/// If the program has handlers for all real-time signals.
pub fn kick_signal() -> Result<libc::c_int> {
    claim(None)?.map(|claim| claim.signal).ok_or_else(|| {
        let detail = "every real-time signal is in use by this program";
        Error::new(ErrorKind::State, "sigaction", detail)
            .hint("choose one: pyvmm.set_kick_signal()")
    })
}

/// Use this signal for kicks. Its present handler is still called for signals that are no kicks.
///
/// # Errors
/// If it cannot be used so, or kicks use another one already.
pub fn use_signal(signal: libc::c_int) -> Result<()> {
    let at = "kick_signal";
    let is_possible = (1..=libc::SIGRTMAX()).contains(&signal)
        && ![libc::SIGKILL, libc::SIGSTOP, libc::SIGABRT].contains(&signal)
        && !FAULTS.contains(&signal)
        && !(libc::SIGSYS + 1..libc::SIGRTMIN()).contains(&signal);
    if !is_possible {
        let detail = format!("signal {signal} cannot be used for kicks");
        return Err(Error::new(ErrorKind::Config, at, detail));
    }
    match claim(Some(signal))? {
        Some(claim) if claim.signal == signal => Ok(()),
        _ => {
            let detail = "kicks use another signal already";
            Err(Error::new(ErrorKind::State, at, detail).hint("choose it before the first machine"))
        }
    }
}

/// The claim, made by the first caller. It is visible before the handler is installed, which
/// several threads may do; so does a child that is forked in between.
fn claim(chosen: Option<libc::c_int>) -> Result<Option<&'static Claim>> {
    let claim = CLAIM.get_or(|| {
        Ok(match chosen {
            Some(signal) => Some(Claim { signal, previous: present(signal)? }),
            None => (libc::SIGRTMIN()..=libc::SIGRTMAX()).find_map(|signal| {
                let previous = present(signal).ok()?;
                (previous.sa_sigaction == libc::SIG_DFL).then_some(Claim { signal, previous })
            }),
        })
    })?;
    // Acquire and release: a thread that sees the flag finds the handler installed.
    if let Some(claim) = claim
        && !IS_INSTALLED.load(Ordering::Acquire)
    {
        install(claim.signal)?;
        IS_INSTALLED.store(true, Ordering::Release);
    }
    Ok(claim.as_ref())
}

fn failed() -> Error {
    Error::os(ErrorKind::State, "sigaction", &std::io::Error::last_os_error())
}

fn present(signal: libc::c_int) -> Result<libc::sigaction> {
    // SAFETY: a sigaction of zeros is valid, and the call fills it.
    unsafe {
        let mut present: libc::sigaction = std::mem::zeroed();
        match libc::sigaction(signal, std::ptr::null(), &raw mut present) {
            0 => Ok(present),
            _ => Err(failed()),
        }
    }
}

fn install(signal: libc::c_int) -> Result<()> {
    // SAFETY: a sigaction of zeros is valid. The handler makes one atomic load and calls what was
    // installed before, so it is as safe in a signal's context as that. Without SA_RESTART, so that
    // KVM_RUN is interrupted.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        match libc::sigaction(signal, &raw const action, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(failed()),
        }
    }
}

/// Send the kick signal to a thread.
///
/// The kernel queues a real-time signal or refuses it, and refuses it at RLIMIT_SIGPENDING. A
/// standard signal is delivered without a place in the queue, so then SIGURG kicks, which is
/// ignored where the program does not use it. Where it does, its handler is called too: without a
/// place in the queue a kick has no cookie.
///
/// # Safety
/// The thread must not have ended.
pub(super) unsafe fn send(thread: libc::pthread_t) {
    let Ok(Some(claim)) = claim(None) else { return };
    // SAFETY: by the caller.
    if unsafe { claim.send(thread) } {
        return;
    }
    let spare = SPARE.get_or(|| {
        Ok::<_, Error>(Claim { signal: libc::SIGURG, previous: present(libc::SIGURG)? })
    });
    // SAFETY: by the caller.
    let _ = spare.map(|claim| unsafe { claim.send(thread) });
}

/// How a signal was sent that has our cookie.
///
/// # Safety
/// `info` is that of a signal.
unsafe fn ours(info: *const libc::siginfo_t) -> Option<libc::c_int> {
    // SAFETY: by the caller. A signal without a value has something else there, which is no address
    // of ours.
    let (code, value) = unsafe { ((*info).si_code, (*info).si_value().sival_ptr) };
    let is_ours = [libc::SI_QUEUE, libc::SI_TIMER].contains(&code) && value == kick_cookie();
    is_ours.then_some(code)
}

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let claims = [CLAIM.get().and_then(Option::as_ref), SPARE.get()];
    let Some(claim) = claims.into_iter().flatten().find(|claim| claim.signal == signal) else {
        return;
    };
    // SAFETY: the kernel hands a valid siginfo to a handler with SA_SIGINFO.
    let code = unsafe { ours(info) };
    if code == Some(libc::SI_TIMER) {
        on_tick();
    }
    if code.is_some() || !claim.has_handler() {
        return;
    }
    let previous = claim.previous.sa_sigaction;
    // SAFETY: the address came out of sigaction as this signal's handler, of the kind that its
    // flags say.
    unsafe {
        if claim.previous.sa_flags & libc::SA_SIGINFO == 0 {
            let handler: extern "C" fn(libc::c_int) = std::mem::transmute(previous);
            handler(signal);
        } else {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(previous);
            handler(signal, info, context);
        }
    }
}

thread_local! {
    /// Whether kicks reach this thread, as far as is known.
    static IS_REACHED: Cell<bool> = const { Cell::new(false) };
}

/// The signals that a thread blocks.
pub(super) struct SignalMask(libc::sigset_t);

impl std::fmt::Debug for SignalMask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SignalMask").finish_non_exhaustive()
    }
}

impl SignalMask {
    pub(super) fn of_this_thread() -> Self {
        // SAFETY: a set of zeros is valid, and the call fills it; it fails for no such argument.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set);
            Self(set)
        }
    }

    /// Have this thread block the same signals, but for kicks, which have to reach it. Children
    /// that callbacks make inherit the mask.
    pub(super) fn adopt(&self) {
        let mut set = self.0;
        // SAFETY: a set of this process's. The signal for kicks is one, or there is none.
        unsafe {
            if let Ok(kick) = kick_signal() {
                libc::sigdelset(&raw mut set, kick);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        }
        IS_REACHED.set(true);
    }
}

/// Let kicks reach this thread, which runs a vCPU by hand. The system call is made once per thread.
///
/// # Errors
/// As for [`kick_signal`].
pub(super) fn unblock_kicks() -> Result<()> {
    if IS_REACHED.get() {
        return Ok(());
    }
    let kick = kick_signal()?;
    // SAFETY: a local set, filled before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, kick);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
    IS_REACHED.set(true);
    Ok(())
}
