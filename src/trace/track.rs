//! The hops of one thread, buffered before they are written.

use std::sync::Arc;

use super::sink::{Sink, Span};
use crate::sync::{Mutex, rank};

/// How many bytes a track gathers before it writes them.
pub(super) const BUFFER: usize = 64 << 10;

/// The hops of one thread.
#[derive(Debug)]
pub struct Track {
    number: u64,
    sink: Arc<Sink>,
    buffer: Mutex<Buffer, rank::Track>,
}

#[derive(Debug, Default)]
struct Buffer {
    text: String,
    is_closed: bool,
}

impl Track {
    pub(super) fn new(number: u64, name: &str, sink: &Arc<Sink>) -> Arc<Self> {
        let mut buffer = Buffer::default();
        sink.put_name(&mut buffer.text, number, name);
        Arc::new(Self { number, sink: Arc::clone(sink), buffer: Mutex::new(buffer) })
    }

    /// Buffer a span. Does not write to the file, because the GIL may be held.
    pub(crate) fn record(&self, span: &Span) {
        // In a forked child, a thread of the parent may hold the lock, and the file is the
        // parent's.
        if self.sink.process_tag.is_forked_child() {
            return;
        }
        let mut buffer = self.buffer.lock();
        if !buffer.is_closed {
            self.sink.put_span(&mut buffer.text, self.number, span);
        }
    }

    /// Write the buffer, if it is large enough.
    pub(crate) fn flush(&self) {
        if self.sink.process_tag.is_forked_child() {
            return;
        }
        let mut buffer = self.buffer.lock();
        if buffer.text.len() >= BUFFER {
            // Under the lock, so that the end of the trace is written later.
            self.sink.write(&buffer.text);
            buffer.text.clear();
        }
    }

    /// Write what has been gathered, and record no more.
    pub(super) fn close(&self) {
        let text = {
            let mut buffer = self.buffer.lock();
            buffer.is_closed = true;
            std::mem::take(&mut buffer.text)
        };
        self.sink.write(&text);
    }
    #[cfg(test)]
    pub(super) fn gathered(&self) -> usize {
        self.buffer.lock().text.len()
    }
}
