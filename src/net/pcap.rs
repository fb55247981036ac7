//! Records frames into a file that Wireshark and tcpdump open: pcap, with nanoseconds. Any thread.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::backend::Frame;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const VERSION: [u16; 2] = [2, 4];
const ETHERNET: u32 = 1;
/// A longer frame is cut off in the file.
const MOST: u32 = 256 << 10;

#[derive(Debug, Default)]
struct Output {
    file: Option<BufWriter<File>>,
    frames: u64,
    failure: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Capture {
    path: PathBuf,
    output: Mutex<Output, rank::NetCapture>,
}

impl Capture {
    /// Record into a new file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let failed = |e| Error::os(ErrorKind::Io, path.to_string_lossy(), &e);
        let mut file = BufWriter::with_capacity(1 << 16, File::create(path).map_err(failed)?);
        let mut header = MAGIC_NANOSECONDS.to_le_bytes().to_vec();
        VERSION.iter().for_each(|part| header.extend(part.to_le_bytes()));
        header.extend([0; 8]);
        header.extend(MOST.to_le_bytes());
        header.extend(ETHERNET.to_le_bytes());
        file.write_all(&header).and_then(|()| file.flush()).map_err(failed)?;
        let output = Mutex::new(Output { file: Some(file), frames: 0, failure: None });
        Ok(Self { path: path.to_owned(), output })
    }

    /// Record a frame, with this time. An error ends the recording.
    pub fn record(&self, frame: &Frame<'_>) {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut output = self.output.lock();
        let Some(file) = &mut output.file else { return };
        match write(file, time, frame.bytes) {
            Ok(()) => output.frames += 1,
            Err(error) => {
                output.failure = Some(format!("{}: {error}", self.path.display()));
                output.file = None;
            }
        }
    }

    /// Write what was recorded to the file. To be called when a burst of frames is over.
    pub fn flush(&self) {
        let mut output = self.output.lock();
        if let Some(Err(error)) = output.file.as_mut().map(Write::flush) {
            output.failure = Some(format!("{}: {error}", self.path.display()));
            output.file = None;
        }
    }

    /// How many frames were recorded.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.output.lock().frames
    }

    /// Why the recording has ended.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.output.lock().failure.clone()
    }
}

fn write(file: &mut impl Write, time: Duration, bytes: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let kept = length.min(MOST);
    let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    let mut header = [0; 16];
    let fields = [seconds, time.subsec_nanos(), kept, length];
    for (to, field) in header.chunks_exact_mut(4).zip(fields) {
        to.copy_from_slice(&field.to_le_bytes());
    }
    file.write_all(&header)?;
    file.write_all(bytes.get(..usize::try_from(kept).unwrap_or(0)).unwrap_or(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_a_header_and_each_frame_with_its_time() {
        let path = std::env::temp_dir().join(format!("pyvmm-{}.pcap", std::process::id()));
        let capture = Capture::create(&path).unwrap();
        capture.record(&Frame::complete(&[7; 60]));
        capture.record(&Frame::complete(&[8; 14]));
        capture.flush();
        assert_eq!((capture.frames(), capture.failure()), (2, None));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(bytes[..4], MAGIC_NANOSECONDS.to_le_bytes());
        assert_eq!(bytes[20..24], [1, 0, 0, 0], "Ethernet");
        assert_eq!(bytes[32..40], [60, 0, 0, 0, 60, 0, 0, 0]);
        assert_eq!(bytes[40..100], [7; 60]);
        assert_eq!(bytes.len(), 24 + 16 + 60 + 16 + 14);
    }

    #[test]
    fn a_full_disk_ends_the_recording_with_the_reason() {
        let capture = Capture::create(Path::new("/dev/full"));
        assert_eq!(capture.unwrap_err().errno, Some(libc::ENOSPC));
        let error = Capture::create(Path::new("/nonexistent/file")).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/file: "), "{error}");
    }
}
