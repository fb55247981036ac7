//! Locks of ranges of files. They are locks of the host's open files (F_OFD_SETLK), so other guests
//! and programs of the host respect them. A request never waits: the client asks again.

use super::message::Range;
use super::server::Server;
use super::system;
use super::wire::{Answer, Errno, Reply};

const SUCCESS: u8 = 0;
const BLOCKED: u8 = 1;
const FREE: u8 = 2;

/// The kinds of locks in 9P2000.L, in the order of their numbers.
const KINDS: [i32; 3] = [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK];

fn of_host(range: &Range<'_>) -> Answer<libc::flock> {
    let number = |value: u64| i64::try_from(value).map_err(|_| Errno(libc::EINVAL));
    let kind = KINDS.get(usize::from(range.kind)).ok_or(Errno(libc::EINVAL))?;
    Ok(libc::flock {
        l_type: i16::try_from(*kind).map_err(|_| Errno(libc::EINVAL))?,
        l_whence: 0,
        l_start: number(range.start)?,
        l_len: number(range.length)?,
        l_pid: 0,
    })
}

impl Server {
    pub(super) fn lock(&self, fid: u32, range: Range<'_>, reply: &mut Reply) -> Answer<()> {
        let open = self.fids.get(fid)?.open()?;
        let status = match system::lock(&open.file, libc::F_OFD_SETLK, &mut of_host(&range)?) {
            Ok(()) => SUCCESS,
            Err(Errno(libc::EAGAIN | libc::EACCES)) => BLOCKED,
            Err(number) => return Err(number),
        };
        reply.u8(status);
        Ok(())
    }

    /// The first lock that is in the way of a lock, or that none is.
    pub(super) fn get_lock(&self, fid: u32, range: Range<'_>, reply: &mut Reply) -> Answer<()> {
        let open = self.fids.get(fid)?.open()?;
        let mut lock = of_host(&range)?;
        system::lock(&open.file, libc::F_OFD_GETLK, &mut lock)?;
        if i32::from(lock.l_type) == libc::F_UNLCK {
            reply.u8(FREE).u64(range.start).u64(range.length).u32(range.process);
        } else {
            let kind = KINDS.iter().position(|kind| *kind == i32::from(lock.l_type));
            let kind = kind.and_then(|kind| u8::try_from(kind).ok()).unwrap_or(FREE);
            let (start, length) = (lock.l_start.cast_unsigned(), lock.l_len.cast_unsigned());
            // The processes of the host have no numbers in the guest.
            reply.u8(kind).u64(start).u64(length).u32(0);
        }
        reply.string(range.client);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::{Client, Folder};
    use super::*;

    #[test]
    fn locks_are_seen_by_others_and_never_waited_for() {
        let folder = Folder::new();
        folder.write("file", b"");
        let mut clients = [Client::new(&folder), Client::new(&folder)];
        for client in &mut clients {
            client.walk(&["file"]).unwrap();
            client.open(libc::O_RDWR).unwrap();
        }
        let [one, two] = &mut clients;
        assert_eq!(one.lock(1, 0, 10), Ok(SUCCESS));
        assert_eq!(two.lock(1, 5, 10), Ok(BLOCKED));
        assert_eq!(two.lock(1, 10, 0), Ok(SUCCESS));
        assert_eq!(two.get_lock(1, 5, 10), Ok((1, 0, 10)));
        assert_eq!(one.lock(2, 0, 10), Ok(SUCCESS));
        assert_eq!(two.get_lock(1, 5, 10), Ok((2, 5, 10)));
        assert_eq!(two.lock(1, 5, 10), Ok(SUCCESS));
        assert_eq!(one.lock(3, 0, 0), Err(libc::EINVAL));
        assert_eq!(one.lock(1, u64::MAX, 1), Err(libc::EINVAL));
        two.clunk();
        assert_eq!(one.lock(1, 0, 0), Ok(SUCCESS), "a lock ends with its file");
    }
}
