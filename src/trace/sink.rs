//! The file of a trace: events as JSON, one on each line, in the trace-event format for Perfetto
//! and chrome://tracing. Each recorded thread writes its own buffer when it is full.

use std::fmt::Write as _;
use std::fs::{File, FileType};
use std::io::{Seek, SeekFrom, Write as _};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcessTag;
use crate::sync::{Mutex, rank};

/// An additional value of an event.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// A number.
    Number(u64),
    /// An address, in hex.
    Hex(u64),
    /// Any text.
    Text(&'a str),
}

/// An event with its start and end.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// The kind of hop.
    pub category: &'a str,
    /// The displayed name.
    pub name: &'a str,
    /// Its start and end.
    pub times: (Instant, Instant),
    /// Additional values.
    pub values: &'a [(&'a str, Value<'a>)],
}

/// See the module.
#[derive(Debug)]
pub(super) struct Sink {
    start: Instant,
    process: u32,
    pub(super) process_tag: ProcessTag,
    output: Mutex<Output, rank::TraceFile>,
}

#[derive(Debug)]
struct Output {
    /// None after the end has been written.
    file: Option<File>,
    path: String,
    /// The length of the complete events.
    written: u64,
    error: Option<Error>,
}

impl Output {
    /// Write complete events, or nothing. An error is kept for the end.
    fn write(&mut self, text: &str) {
        let Some(file) = self.file.as_mut().filter(|_| self.error.is_none()) else { return };
        match file.write_all(text.as_bytes()) {
            Ok(()) => self.written += text.len() as u64,
            Err(error) => {
                self.error = Some(Error::os(ErrorKind::Io, self.path.as_str(), &error));
                // Truncate partial events. If this fails, it does not matter: readers accept an
                // array without its end.
                let _ = file.set_len(self.written);
                let _ = file.seek(SeekFrom::Start(self.written));
            }
        }
    }
}

impl Sink {
    /// # Errors
    /// [`ErrorKind::Io`] if the file cannot be created.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        // The reader of a pipe can block its writer, which would block the guest.
        let is_pipe = |kind: FileType| kind.is_fifo() || kind.is_socket();
        if path.metadata().is_ok_and(|found| is_pipe(found.file_type())) {
            return Err(Error::new(
                ErrorKind::Io,
                name,
                "a trace needs a file, and this is a pipe",
            ));
        }
        // Non-blocking, because a stopped terminal must not stop the guest.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|e| Error::os(ErrorKind::Io, name.as_str(), &e))?;
        let process = std::process::id();
        let mut output = Output { file: Some(file), path: name, written: 0, error: None };
        output.write(&format!(
            r#"[{{"ph":"M","name":"process_name","pid":{process},"args":{{"name":"pyvmm"}}}}"#
        ));
        Ok(Self {
            start: Instant::now(),
            process,
            process_tag: ProcessTag::current(),
            output: Mutex::new(output),
        })
    }

    pub(super) fn write(&self, text: &str) {
        self.output.lock().write(text);
    }

    /// Write the end, once.
    ///
    /// # Errors
    /// The first error that occurred while the file was written.
    pub(super) fn end(&self) -> Result<()> {
        let mut output = self.output.lock();
        let error = output.error.take();
        output.write("\n]\n");
        output.file = None;
        let late = output.error.take();
        error.or(late).map_or(Ok(()), Err)
    }

    /// Append the name of a track.
    pub(super) fn put_name(&self, text: &mut String, track: u64, name: &str) {
        let process = self.process;
        let _ = write!(
            text,
            ",\n{{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":{process},\"tid\":{track},\"args\":{{\"name\":"
        );
        put_text(text, name);
        text.push_str("}}");
    }

    /// Append a complete event. If it began before the trace, it is shown from the start of the
    /// trace.
    pub(super) fn put_span(&self, text: &mut String, track: u64, span: &Span) {
        let nanoseconds = |at: Instant| at.saturating_duration_since(self.start).as_nanos();
        let (from, to) = (nanoseconds(span.times.0), nanoseconds(span.times.1));
        let took = to.saturating_sub(from);
        let _ = write!(
            text,
            ",\n{{\"ph\":\"X\",\"pid\":{},\"tid\":{track},\"ts\":{}.{:03},\"dur\":{}.{:03},\"cat\":\"{}\",\"name\":",
            self.process,
            from / 1000,
            from % 1000,
            took / 1000,
            took % 1000,
            span.category
        );
        put_text(text, span.name);
        for (number, (key, value)) in span.values.iter().enumerate() {
            text.push_str(if number == 0 { ",\"args\":{" } else { "," });
            let _ = write!(text, "\"{key}\":");
            match value {
                Value::Number(number) => drop(write!(text, "{number}")),
                Value::Hex(number) => drop(write!(text, "\"{number:#x}\"")),
                Value::Text(value) => put_text(text, value),
            }
        }
        text.push_str(if span.values.is_empty() { "}" } else { "}}" });
    }
}

/// Append a JSON string.
fn put_text(text: &mut String, value: &str) {
    text.push('"');
    for character in value.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            control if control < ' ' => drop(write!(text, "\\u{:04x}", u32::from(control))),
            other => text.push(other),
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn sink() -> Sink {
        Sink::create(Path::new("/dev/null")).unwrap()
    }

    #[test]
    fn an_event_is_a_line_with_microseconds() {
        let (mut text, sink) = (String::new(), sink());
        let times =
            (sink.start + Duration::from_nanos(1_234), sink.start + Duration::from_nanos(5_240));
        let values = [("address", Value::Hex(0x60)), ("size", Value::Number(1))];
        let span = Span { category: "device", name: "Serial", times, values: &values };
        sink.put_span(&mut text, 3, &span);
        let process = std::process::id();
        let head = format!(r#"{{"ph":"X","pid":{process},"tid":3,"ts":1.234,"dur":4.006,"#);
        let tail = r#""cat":"device","name":"Serial","args":{"address":"0x60","size":1}}"#;
        assert_eq!(text, format!(",\n{head}{tail}"));
    }

    #[test]
    fn what_began_before_the_trace_is_clipped() {
        let (mut text, sink) = (String::new(), sink());
        let before = sink.start.checked_sub(Duration::from_secs(1)).unwrap();
        let times = (before, sink.start + Duration::from_micros(2));
        sink.put_span(&mut text, 1, &Span { category: "guest", name: "g", times, values: &[] });
        assert!(text.contains(r#""ts":0.000,"dur":2.000"#), "{text}");
    }

    #[test]
    fn a_full_disk_is_told_once_at_the_end() {
        let sink = Sink::create(Path::new("/dev/full")).unwrap();
        sink.write("more");
        let error = sink.end().unwrap_err();
        assert_eq!((error.kind, error.errno), (ErrorKind::Io, Some(libc::ENOSPC)));
        sink.end().unwrap();
    }

    proptest! {
        #[test]
        fn a_text_of_any_characters_is_one_json_string(value: String) {
            let mut text = String::new();
            put_text(&mut text, &value);
            let inner = text.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
            prop_assert!(inner.chars().all(|c| c >= ' '));
            let mut left = inner.chars();
            let mut read = String::new();
            while let Some(character) = left.next() {
                prop_assert_ne!(character, '"');
                read.push(match character {
                    '\\' => match left.next().unwrap() {
                        'u' => {
                            let digits: String = left.by_ref().take(4).collect();
                            char::from_u32(u32::from_str_radix(&digits, 16).unwrap()).unwrap()
                        }
                        escaped => escaped,
                    },
                    plain => plain,
                });
            }
            prop_assert_eq!(read, value);
        }
    }
}
