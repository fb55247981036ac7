//! The modules of a kernel: read, and placed above it.

use super::files::Files;
use crate::config::Module;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{self, PAGE};
use crate::memory::GuestMemory;

/// A module that has been read, and where it goes.
#[derive(Debug)]
pub(super) struct Placed {
    /// The key that names it.
    at: String,
    pub(super) start: u64,
    pub(super) cmdline: String,
    pub(super) bytes: Vec<u8>,
}

impl Placed {
    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// Read the files.
///
/// # Errors
/// If one cannot be read, or together they are larger than memory.
pub(super) fn read(modules: &[Module], files: &Files<'_>) -> Result<Vec<Placed>> {
    let (mut read, mut left) = (Vec::new(), files.most);
    for (n, module) in modules.iter().enumerate() {
        let at = format!("boot.modules[{n}]");
        let bytes = files.read(&module.path, &at, left)?;
        left = left.saturating_sub(bytes.len() as u64);
        read.push(Placed { at, start: 0, cmdline: module.cmdline.clone(), bytes });
    }
    Ok(read)
}

/// One that another key than `boot.modules` names, and that has no command line.
pub(super) fn unnamed(bytes: Vec<u8>, at: &str) -> Placed {
    Placed { at: at.into(), start: 0, cmdline: String::new(), bytes }
}

/// Place them above the end of the kernel and above 1 MiB, each at the start of a page.
///
/// # Errors
/// [`ErrorKind::Boot`] if one does not fit.
pub(super) fn place(modules: &mut [Placed], kernel_end: u64, memory: &GuestMemory) -> Result<()> {
    let top = memory.size().min(layout::MMIO_GAP_START);
    let mut next = kernel_end.max(layout::HIGH_MEMORY);
    for module in modules {
        let start = next.checked_next_multiple_of(PAGE);
        let end = start.and_then(|start| start.checked_add(module.bytes.len() as u64));
        let (Some(start), Some(end)) = (start, end.filter(|end| *end <= top)) else {
            let size = module.bytes.len();
            let detail = format!("{size} bytes do not fit above the kernel and below {top:#x}");
            return Err(Error::new(ErrorKind::Boot, &module.at, detail)
                .hint("give the machine more memory (memory.size_mib)"));
        };
        (module.start, next) = (start, end);
    }
    Ok(())
}

/// Write them to memory.
///
/// # Errors
/// None that `place` has not returned.
pub(super) fn write(modules: &[Placed], memory: &GuestMemory) -> Result<()> {
    let with_bytes = modules.iter().filter(|module| !module.bytes.is_empty());
    with_bytes.into_iter().try_for_each(|module| memory.write(module.start, &module.bytes))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::boot) fn module(bytes: &[u8], cmdline: &str) -> Placed {
        Placed {
            at: "boot.modules[0]".into(),
            start: 0,
            cmdline: cmdline.into(),
            bytes: bytes.to_vec(),
        }
    }

    #[test]
    fn modules_are_on_pages_above_the_kernel() {
        let memory = GuestMemory::new(2 << 20).unwrap();
        let mut modules = [module(&[1; 5000], ""), module(&[], ""), module(&[2], "")];
        place(&mut modules, 0x10_0001, &memory).unwrap();
        let starts: Vec<u64> = modules.iter().map(|module| module.start).collect();
        assert_eq!(starts, [0x10_1000, 0x10_3000, 0x10_3000]);
        assert_eq!((modules[0].end(), modules[1].end()), (0x10_2388, 0x10_3000));
        write(&modules, &memory).unwrap();
        assert_eq!(memory.load::<u8>(0x10_3000).unwrap(), 2);
        place(&mut modules, 0x7c00, &memory).unwrap();
        assert_eq!(modules[0].start, 0x10_0000);
    }

    #[test]
    fn modules_that_do_not_fit_are_named() {
        let memory = GuestMemory::new(2 << 20).unwrap();
        let mut modules = [module(&[1; 1 << 19], ""), module(&[1; 1 << 19], "")];
        place(&mut modules, 0x10_0000, &memory).unwrap();
        for end in [0x10_0001, u64::MAX] {
            let error = place(&mut modules, end, &memory).unwrap_err();
            assert!(error.at.starts_with("boot.modules["), "{error}");
        }
    }
}
