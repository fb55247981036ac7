//! When connections and flows have to be looked at again, and the one timer of the network.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use crate::event::{Expiry, TimerFd};

/// Something that the network watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Token {
    /// The timer.
    Timer,
    /// A TCP connection.
    Tcp(u64),
    /// A UDP flow.
    Udp(u64),
    /// The socket of a forwarded port.
    Forward(u64),
}

const NUMBER: u32 = 56;
const NUMBERS: u64 = (1 << NUMBER) - 1;

impl Token {
    pub(super) fn bits(self) -> u64 {
        let (kind, number) = match self {
            Self::Timer => (0, 0),
            Self::Tcp(number) => (1, number),
            Self::Udp(number) => (2, number),
            Self::Forward(number) => (3, number),
        };
        kind << NUMBER | number & NUMBERS
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        let number = bits & NUMBERS;
        match bits >> NUMBER {
            1 => Self::Tcp(number),
            2 => Self::Udp(number),
            3 => Self::Forward(number),
            _ => Self::Timer,
        }
    }
}

/// The times, and the timer that expires at the earliest.
#[derive(Debug)]
pub(super) struct Timers {
    timer: TimerFd,
    armed: Option<Instant>,
    order: BTreeSet<(Instant, Token)>,
    times: HashMap<Token, Instant>,
}

impl Timers {
    pub(super) fn new() -> io::Result<Self> {
        let timer = TimerFd::new()?;
        Ok(Self { timer, armed: None, order: BTreeSet::new(), times: HashMap::new() })
    }

    pub(super) fn set(&mut self, token: Token, time: Option<Instant>) {
        let former = self.times.get(&token).copied();
        if former == time {
            return;
        }
        if let Some(former) = former {
            self.order.remove(&(former, token));
        }
        match time {
            Some(time) => {
                self.order.insert((time, token));
                self.times.insert(token, time);
            }
            None => {
                self.times.remove(&token);
            }
        }
    }

    /// Take the next one whose time has come.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Token> {
        let (time, token) = *self.order.first()?;
        if time > now {
            return None;
        }
        self.set(token, None);
        Some(token)
    }

    /// Arm the timer for the earliest time.
    pub(super) fn arm(&mut self, now: Instant) {
        let next = self.order.first().map(|(time, _)| *time);
        if next == self.armed {
            return;
        }
        let result = match next {
            Some(time) => {
                self.timer.set(Expiry::In(time.saturating_duration_since(now)), Duration::ZERO)
            }
            None => self.timer.clear(),
        };
        self.armed = if result.is_ok() { next } else { None };
    }

    /// Have the timer expire now, whatever the times are.
    pub(super) fn rouse(&mut self) {
        // Fails never in practice.
        let _ = self.timer.set(Expiry::In(Duration::ZERO), Duration::ZERO);
        self.armed = None;
    }

    /// The timer has expired: make it silent.
    pub(super) fn expired(&mut self) {
        // Fails never; it would expire again.
        let _ = self.timer.clear();
        self.armed = None;
    }
}

impl AsRawFd for Timers {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_epoll() {
        for token in [Token::Timer, Token::Tcp(1), Token::Udp(NUMBERS), Token::Forward(0)] {
            assert_eq!(Token::from_bits(token.bits()), token);
        }
    }

    #[test]
    fn tokens_come_in_the_order_of_their_times() {
        let mut timers = Timers::new().unwrap();
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        timers.set(Token::Tcp(1), Some(after(30)));
        timers.set(Token::Tcp(2), Some(after(10)));
        timers.set(Token::Tcp(3), Some(after(20)));
        timers.set(Token::Tcp(1), Some(after(5)));
        timers.set(Token::Tcp(3), None);
        assert_eq!(timers.pop(start), None);
        assert_eq!(timers.pop(after(40)), Some(Token::Tcp(1)));
        assert_eq!(timers.pop(after(40)), Some(Token::Tcp(2)));
        assert_eq!(timers.pop(after(40)), None);
    }
}
