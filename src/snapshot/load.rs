//! A snapshot from its file. `file.rs` reads the file, `pages.rs` its memory; here the records
//! become a snapshot. On the caller's thread, which may wait for the disk.

use std::path::Path;
use std::sync::Arc;

use super::file::{each_record, open, read_pages, read_state};
use super::header::Header;
use super::host::{self, Host};
use super::pages::{Pages, check_ranges};
use super::snapshot::Snapshot;
use super::state::{DeviceState, Record, RecordKind, Records};
use super::virtio::VirtioDeviceState;
use crate::bytes::bad;
use crate::error::{Error, Result};
use crate::memory::Layer;
use crate::vm::MachineSpec;

/// How a file is loaded.
#[derive(Debug, Default)]
pub struct Load<'a> {
    /// The snapshot that the file was saved against, if there is one.
    pub base: Option<&'a Snapshot>,
    /// Load it even if this host lacks something that the original one had.
    pub force: bool,
    /// Copy its pages to memory, so that later changes to the file do not matter.
    pub copy: bool,
    /// Read all pages and check their checksum.
    pub verify: bool,
}

/// Load a snapshot from its file. Pages are mapped on demand, so by default the time does not
/// depend on the size. If they are read, `progress` gets the number of bytes read and the total;
/// its error ends the load.
///
/// # Errors
/// [`crate::error::ErrorKind::Snapshot`] if the file is damaged, of another version or host, or
/// needs another base; [`crate::error::ErrorKind::Io`] if it cannot be read; any error of
/// `progress`.
pub fn load<E: From<Error>>(
    path: &Path,
    how: &Load<'_>,
    progress: impl FnMut(u64, u64) -> std::result::Result<(), E>,
) -> std::result::Result<Snapshot, E> {
    let layer = Layer::of_file(open(path)?)?;
    let file = layer.file();
    let (header, state) = read_state(file, path)?;
    let pages = if how.copy {
        Pages::copied(file, &header, path, progress)?
    } else {
        if how.verify {
            read_pages(file, &header, path, |_, _| Ok(()), progress)?;
        }
        Pages::of(Arc::clone(&layer), &header)
    };
    let snapshot = parse(&state, &header, &pages, how.base)?;
    if let (false, Some(there)) = (how.force, &snapshot.host) {
        snapshot.request_xstate()?; // what this host has depends on it
        host::check(&snapshot.vcpus, there)?;
    }
    Ok(snapshot)
}

fn parse(
    state: &[u8],
    header: &Header,
    pages: &Pages,
    base: Option<&Snapshot>,
) -> Result<Snapshot> {
    let base = check_base(header, base)?;
    let (mut spec, mut host, mut chips) = (None, None, Vec::new());
    let (mut vcpus, mut devices, mut ranges) = (Vec::<Records>::new(), Vec::new(), Vec::new());
    let mut virtio = Vec::new();
    each_record(state, |kind, of, bytes| {
        let record = || Record { kind, number: of, bytes: bytes.to_vec() };
        match kind {
            RecordKind::Machine => spec = Some(MachineSpec::decode(bytes)?),
            RecordKind::Host => host = Some(Host::decode(bytes)?),
            RecordKind::Device => devices.push(DeviceState::decode(bytes)?),
            RecordKind::Virtio => virtio.push(VirtioDeviceState::decode(bytes)?),
            RecordKind::Range => ranges.push(pages.range(bytes, base)?),
            RecordKind::Clock | RecordKind::Pit | RecordKind::Irqchip | RecordKind::IrqLines => {
                chips.push(record());
            }
            _ => {
                if usize::from(of) == vcpus.len() {
                    vcpus.push(Vec::new());
                }
                let records = vcpus.get_mut(usize::from(of));
                records.ok_or_else(|| bad("state", "its vCPUs are not in order"))?.push(record());
            }
        }
        Ok(())
    })?;
    let spec = spec.ok_or_else(|| bad("machine", "it has none"))?;
    if vcpus.len() != usize::from(spec.vcpus) {
        return Err(bad("state", "it does not have the state of each vCPU"));
    }
    check_ranges(&ranges)?;
    let cache = Arc::default();
    let id = header.id;
    Ok(Snapshot { id, spec, chips, vcpus, devices, virtio, ranges, host, cache })
}

/// The base, if the file needs one.
fn check_base<'a>(header: &Header, base: Option<&'a Snapshot>) -> Result<Option<&'a Snapshot>> {
    if header.base == [0; 16] {
        return Ok(None);
    }
    let hex = |id: [u8; 16]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match base {
        Some(base) if base.id == header.base => Ok(Some(base)),
        Some(base) => {
            let detail = format!("it needs {}, this is {}", hex(header.base), hex(base.id));
            Err(bad("base", detail))
        }
        None => Err(bad("base", format!("it needs the snapshot {}", hex(header.base)))
            .hint("load(path, base=...)")),
    }
}
