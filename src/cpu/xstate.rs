//! The parts of XSAVE that a process must ask the kernel for before a guest can have them: AMX.
//! The kernel's Documentation/arch/x86/xstate.rst. On the thread that makes the machine.

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::kvm_cpuid_entry2;

use crate::error::{Error, ErrorKind, Result};

const ARCH_GET_XCOMP_SUPP: libc::c_long = 0x1021;
const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
/// The part that is asked for: AMX's tiles.
const TILE_DATA: u32 = 18;

/// The bits of XCR0 for AMX: the configuration of its tiles, and the tiles.
pub(super) const TILES: u32 = 1 << 17 | 1 << TILE_DATA;

/// The size of `kvm_xsave`, which holds every part that needs no permission.
const SIZE_WITHOUT_PERMISSION: usize = 4096;

static IS_PERMITTED: AtomicBool = AtomicBool::new(false);

/// Whether [`request`] has succeeded in this process. What KVM supports depends on it.
pub(crate) fn is_permitted() -> bool {
    // Acquire: a thread that sees the permission also sees it in what KVM reports.
    IS_PERMITTED.load(Ordering::Acquire)
}

/// Whether a state that KVM_GET_XSAVE2 wrote needs the permission.
pub(crate) fn needs_permission(xsave_size: usize) -> bool {
    xsave_size > SIZE_WITHOUT_PERMISSION
}

/// The answers of the kernel.
#[derive(Clone, Copy, Debug)]
struct Answers {
    /// ARCH_GET_XCOMP_SUPP: the parts, or an errno.
    supported: std::result::Result<u64, i32>,
    /// ARCH_REQ_XCOMP_GUEST_PERM: an errno, if it was refused. Not called without support.
    requested: std::result::Result<(), i32>,
}

/// Ask for AMX in guests of this process. It lasts until the process ends.
///
/// # Errors
/// [`ErrorKind::Unavailable`] if the processor or the kernel has no AMX; [`ErrorKind::State`] if
/// the process has created a vCPU already. `at` is their place.
pub(crate) fn request(at: &str) -> Result<()> {
    if is_permitted() {
        return Ok(());
    }
    let mut supported = 0u64;
    // SAFETY: the kernel writes 8 bytes to the address of `supported`.
    let result =
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &raw mut supported) };
    let supported = checked(result).map(|()| supported);
    let has_tiles = supported.is_ok_and(|parts| parts & 1 << TILE_DATA != 0);
    let requested = if has_tiles {
        // SAFETY: the second argument is a number.
        checked(unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, u64::from(TILE_DATA))
        })
    } else {
        Ok(())
    };
    permission(at, Answers { supported, requested })?;
    // Release: pairs with `is_permitted`.
    IS_PERMITTED.store(true, Ordering::Release);
    Ok(())
}

fn checked(result: libc::c_long) -> std::result::Result<(), i32> {
    let errno = || std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
    if result == 0 { Ok(()) } else { Err(errno()) }
}

/// What the kernel's answers mean.
fn permission(at: &str, answers: Answers) -> Result<()> {
    let unavailable = |detail: &str| Err(Error::new(ErrorKind::Unavailable, at, detail));
    match answers.supported {
        Err(_) => return unavailable("AMX in guests needs Linux 5.17 on the host"),
        Ok(parts) if parts & 1 << TILE_DATA == 0 => {
            return unavailable("the host's processor has no AMX, or its kernel does not use it");
        }
        Ok(_) => {}
    }
    match answers.requested {
        Ok(()) => Ok(()),
        Err(libc::EINVAL) => unavailable("AMX in guests needs Linux 5.17 on the host"),
        Err(libc::EBUSY) => {
            let detail = "this process has created a vCPU without AMX, and cannot ask for it now";
            Err(Error::new(ErrorKind::State, at, detail)
                .hint("create a machine with AMX before any other machine of the process"))
        }
        Err(errno) => {
            let error = std::io::Error::from_raw_os_error(errno);
            Err(Error::os(ErrorKind::Unavailable, at, &error))
        }
    }
}

/// Remove AMX's parts from leaf 0xd, and the leaves that describe them. KVM lists the tiles'
/// configuration without the tiles if there is no permission, and then refuses it in XCR0.
pub(super) fn remove_tiles(entries: &mut Vec<kvm_cpuid_entry2>) {
    let is_tiles = |entry: &kvm_cpuid_entry2| entry.function == 0xd && entry.index == 0;
    if !entries.iter().any(|entry| is_tiles(entry) && entry.eax & TILES != 0) {
        return;
    }
    entries.retain(|entry| {
        let is_part = entry.function == 0xd && entry.index > 1;
        !(is_part && TILES.checked_shr(entry.index).unwrap_or(0) & 1 != 0)
    });
    for entry in entries.iter_mut() {
        match (entry.function, entry.index) {
            (0xd, 0) => entry.eax &= !TILES,
            (0x1d | 0x1e, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
    set_size(entries);
}

/// Set the sizes in leaf 0xd to what its parts of XCR0 need. Intel SDM volume 1, 13.2.
pub(super) fn set_size(entries: &mut [kvm_cpuid_entry2]) {
    let parts = entries.iter().find(|entry| (entry.function, entry.index) == (0xd, 0));
    let Some(parts) = parts.map(|entry| entry.eax).filter(|parts| *parts != 0) else { return };
    let ends = entries.iter().filter(|entry| entry.function == 0xd && entry.index > 1);
    let ends = ends.filter(|entry| parts.checked_shr(entry.index).unwrap_or(0) & 1 != 0);
    let legacy = 512 + 64;
    let size = ends.map(|entry| entry.ebx.saturating_add(entry.eax)).fold(legacy, u32::max);
    for entry in entries.iter_mut().filter(|entry| (entry.function, entry.index) == (0xd, 0)) {
        (entry.ebx, entry.ecx) = (size, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(supported: std::result::Result<u64, i32>, errno: i32) -> Error {
        let requested = Err(errno);
        permission("cpu.expose", Answers { supported, requested }).unwrap_err()
    }

    #[test]
    fn each_refusal_has_its_kind_and_says_why() {
        let old = refusal(Err(libc::EINVAL), 0);
        assert_eq!(old.kind, ErrorKind::Unavailable);
        assert!(old.detail.contains("Linux 5.17"));
        let none = refusal(Ok(0x2e7), 0);
        assert_eq!((none.kind, none.at.as_str()), (ErrorKind::Unavailable, "cpu.expose"));
        assert!(none.detail.contains("processor has no AMX"));
        let late = refusal(Ok(1 << 18), libc::EBUSY);
        assert_eq!(late.kind, ErrorKind::State);
        assert!(late.hint.unwrap().contains("before any other machine"));
        assert!(refusal(Ok(1 << 18), libc::EINVAL).detail.contains("Linux 5.17"));
        assert_eq!(refusal(Ok(1 << 18), libc::ENOSPC).errno, Some(libc::ENOSPC));
        permission("", Answers { supported: Ok(1 << 18), requested: Ok(()) }).unwrap();
    }

    #[test]
    fn a_state_beyond_a_page_needs_the_permission() {
        assert!(!needs_permission(4096));
        assert!(needs_permission(11008), "with the 8 KiB of the tiles");
    }

    fn leaf_0xd(parts: u32) -> Vec<kvm_cpuid_entry2> {
        let entry = |index, eax, ebx| kvm_cpuid_entry2 {
            function: 0xd,
            index,
            eax,
            ebx,
            ..Default::default()
        };
        vec![
            kvm_cpuid_entry2 { ecx: 11008, ..entry(0, parts, 11008) },
            entry(1, 0x1f, 0),
            entry(2, 256, 576),
            entry(17, 64, 2752),
            entry(18, 8192, 2816),
            kvm_cpuid_entry2 { function: 0x1d, eax: 1, ..Default::default() },
        ]
    }

    #[test]
    fn without_the_permission_nothing_is_left_of_the_tiles() {
        for parts in [0x6_0007, 0x2_0007] {
            let mut entries = leaf_0xd(parts);
            remove_tiles(&mut entries);
            let left: Vec<_> = entries.iter().map(|e| (e.function, e.index, e.eax)).collect();
            assert_eq!(left, [(0xd, 0, 7), (0xd, 1, 0x1f), (0xd, 2, 256), (0x1d, 0, 0)]);
            assert_eq!((entries[0].ebx, entries[0].ecx), (832, 832));
        }
        let mut without = leaf_0xd(7);
        without.retain(|entry| entry.index < 17);
        let before = without.clone();
        remove_tiles(&mut without);
        assert_eq!(without, before, "a processor without AMX keeps what KVM says");
    }

    #[test]
    fn the_size_is_that_of_the_last_part() {
        let mut entries = leaf_0xd(0x6_0007);
        set_size(&mut entries);
        assert_eq!(entries[0].ecx, 2816 + 8192);
        entries[0].eax = 3;
        set_size(&mut entries);
        assert_eq!(entries[0].ecx, 576);
    }
}
