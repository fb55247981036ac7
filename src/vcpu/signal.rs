//! The kick's signal: which one, and its handler. The only place that touches signals.
//!
//! The program can still use the signal: if it is not a kick, the previously installed handler is
//! called.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use super::thread_id::ThreadId;
use super::ticked::on_tick;
use crate::error::{Error, ErrorKind, Result};
use crate::process::OnceBox;

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
    unsafe fn send(&self, thread: ThreadId) -> bool {
        self.keep_installed();
        // SAFETY: by the caller. A queued signal takes 10 us longer, so it is sent only if a
        // handler has to distinguish it from others.
        unsafe {
            if self.has_handler() {
                thread.queue(self.signal, kick_cookie())
            } else {
                thread.signal(self.signal)
            }
        }
    }

    /// Install the handler again if the program has since ignored the signal, which would lose
    /// kicks, or restored its default, which would end the process. A handler of the program needs
    /// no change: any handler interrupts KVM_RUN.
    fn keep_installed(&self) {
        if present(self.signal).is_ok_and(|now| !has_handler(&now)) {
            // Cannot fail for a signal whose action could be read.
            let _ = install(self.signal);
        }
    }
}

fn has_handler(action: &libc::sigaction) -> bool {
    ![libc::SIG_DFL, libc::SIG_IGN].contains(&action.sa_sigaction)
}

/// The signal for kicks if the kernel refuses to queue the other. It is claimed when this first
/// happens.
static SPARE: OnceBox<Claim> = OnceBox::new();

/// The signal handler reads it with one atomic load.
static CLAIM: OnceBox<Option<Claim>> = OnceBox::new();
/// Whether the handler of the claim is installed.
static IS_INSTALLED: AtomicBool = AtomicBool::new(false);

const FAULTS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// The value that distinguishes pyvmm's kicks and ticks from signals of the program.
pub(super) fn kick_cookie() -> *mut libc::c_void {
    (&raw const COOKIE).cast_mut().cast()
}

/// The signal for kicks: the one chosen with [`use_signal`], or the first real-time signal without
/// a handler when the first machine was created.
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

/// Use this signal for kicks. Its current handler is still called for signals that are not kicks.
///
/// # Errors
/// If it cannot be used for kicks, or kicks use another signal already.
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

/// The claim, made by the first caller. It is visible before the handler is installed. Several
/// threads may install the handler, and so may a child that is forked in between.
fn claim(chosen: Option<libc::c_int>) -> Result<Option<&'static Claim>> {
    let claim = CLAIM.get_or_try_init(|| {
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
    // SAFETY: a sigaction of zeros is valid. The handler makes one atomic load and calls the
    // previous handler, so it is as async-signal-safe as that one. Without SA_RESTART, so that
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
/// At RLIMIT_SIGPENDING the kernel refuses to queue a real-time signal. A standard signal needs no
/// place in the queue, so SIGURG is used then, which is ignored by default. If the program has a
/// handler for it, that handler is called too, because a kick without a place in the queue carries
/// no value.
///
/// # Safety
/// The thread must not have ended.
pub(super) unsafe fn send(thread: ThreadId) {
    let Ok(Some(claim)) = claim(None) else { return };
    // SAFETY: by the caller.
    if unsafe { claim.send(thread) } {
        return;
    }
    let spare = SPARE.get_or_try_init(|| {
        Ok::<_, Error>(Claim { signal: libc::SIGURG, previous: present(libc::SIGURG)? })
    });
    // SAFETY: by the caller.
    let _ = spare.map(|claim| unsafe { claim.send(thread) });
}

/// How a signal was sent, if it carries pyvmm's value.
///
/// # Safety
/// `info` is that of a signal.
unsafe fn ours(info: *const libc::siginfo_t) -> Option<libc::c_int> {
    // SAFETY: by the caller. In a signal without a value, the field never holds this address.
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
    // SAFETY: sigaction returned the address as this signal's handler, with the signature that its
    // flags give.
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
    /// Whether this thread is known not to block kicks.
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
        // SAFETY: a set of zeros is valid, and the call fills it. It cannot fail with these
        // arguments.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set);
            Self(set)
        }
    }

    /// Have this thread block the same signals, except for kicks. Child processes of callbacks
    /// inherit the mask.
    pub(super) fn adopt(&self) {
        let mut set = self.0;
        // SAFETY: a valid set of this process. A signal for kicks, if there is one, is a valid
        // signal.
        unsafe {
            if let Ok(kick) = kick_signal() {
                libc::sigdelset(&raw mut set, kick);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        }
        IS_REACHED.set(true);
    }
}

/// Unblock kicks on this thread, unless that has been done before: it is in `run_once`, where
/// another system call for each exit would be seen.
///
/// # Errors
/// As for [`kick_signal`].
pub(super) fn unblock_kicks_once() -> Result<()> {
    if IS_REACHED.get() { Ok(()) } else { unblock_kicks() }
}

/// Unblock kicks on this thread, whose program may have blocked all signals since its last run.
///
/// # Errors
/// As for [`kick_signal`].
pub(super) fn unblock_kicks() -> Result<()> {
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
