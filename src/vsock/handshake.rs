//! The line by which a program asks the unix socket for a port of the guest: `CONNECT 52\n`, as
//! Firecracker has it. Pure data.

use super::socket::HostSocket;

/// The longest line, with its end.
const LONGEST: usize = 32;

/// What is known of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Port(u32),
    /// The line has no end yet.
    Unfinished,
    /// It is another line, or the program has gone.
    Nonsense,
}

/// Look at what a program has sent. Of a complete line, nothing is left.
pub(super) fn read(socket: &HostSocket) -> Asked {
    let mut bytes = [0; LONGEST];
    let found = match socket.peek(&mut bytes) {
        Ok(0) => return Asked::Nonsense,
        Ok(count) => bytes.get(..count).unwrap_or_default(),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Asked::Unfinished,
        Err(_) => return Asked::Nonsense,
    };
    let Some(end) = memchr::memchr(b'\n', found) else {
        return if found.len() < LONGEST { Asked::Unfinished } else { Asked::Nonsense };
    };
    let asked = parse(found.get(..end).unwrap_or_default());
    let mut line = [0; LONGEST];
    match line.get_mut(..=end).map(|line| socket.take(line)) {
        Some(Ok(count)) if count == end + 1 => asked,
        _ => Asked::Nonsense,
    }
}

fn parse(line: &[u8]) -> Asked {
    let port = line.strip_prefix(b"CONNECT ").filter(|port| port.iter().all(u8::is_ascii_digit));
    let port = port.and_then(|port| std::str::from_utf8(port).ok());
    port.and_then(|port| port.parse().ok()).map_or(Asked::Nonsense, Asked::Port)
}

/// The line that tells the program its own port.
pub(super) fn answer(port: u32) -> Vec<u8> {
    format!("OK {port}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_the_line_is_taken() {
        let (ours, theirs) = HostSocket::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        assert_eq!(read(&ours), Asked::Unfinished);
        theirs.write_all(b"CONNECT 5").unwrap();
        assert_eq!(read(&ours), Asked::Unfinished);
        theirs.write_all(b"2\nmore").unwrap();
        assert_eq!(read(&ours), Asked::Port(52));
        let mut rest = [0; 9];
        assert_eq!(ours.take(&mut rest).unwrap(), 4);
        drop(theirs);
        assert_eq!(read(&ours), Asked::Nonsense);
        assert_eq!(answer(7), b"OK 7\n");
    }

    #[test]
    fn other_lines_are_nonsense() {
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 4294967296",
            "connect 1",
            "CONNECT 1 ",
        ] {
            assert_eq!(parse(line.as_bytes()), Asked::Nonsense, "{line}");
        }
        assert_eq!(parse(b"CONNECT 4294967295"), Asked::Port(u32::MAX));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_wait_for_ever(bytes in prop::collection::vec(any::<u8>(), 32..100)) {
            let (ours, theirs) = HostSocket::pair().unwrap();
            let mut theirs = UnixStream::from(theirs);
            theirs.write_all(&bytes).unwrap();
            prop_assert_ne!(read(&ours), Asked::Unfinished);
            drop(ours);
            let _ = theirs.read(&mut [0; 1]);
        }
    }
}
