//! An input for a virtio device as text: the kind of device, and what driver and host do, one step
//! a line. A step has a name, hexadecimal numbers, and after a colon pieces of bytes.

/// The kinds of devices. That of `qcow2` is a disk, with an image.
pub(crate) const KINDS: [&str; 9] =
    ["rng", "blk", "qcow2", "net", "vsock", "console", "balloon", "fs9p", "custom"];

/// What can be done, with the usual count of numbers:
///
/// - `start FEATURES`: reset the device and set it up. Bit 63: also with features not offered.
/// - `read OFFSET SIZE`, `write OFFSET : BYTES`: access registers, at any width.
/// - `memory OFFSET : BYTES`: fill buffers.
/// - `request QUEUE SIZES.. : PIECES..`: make a chain available that has the pieces, and room of
///   these sizes. `indirect` has its descriptors in a table.
/// - `descriptor QUEUE INDEX ADDRESS LENGTH FLAGS NEXT`, `head QUEUE HEAD`,
///   `available QUEUE INDEX`: write the rings.
/// - `notify QUEUE`: and wait for what the device does. `rush QUEUE` does not wait. `turn` notifies
///   all queues.
/// - `host NUMBER NUMBER : BYTES`: what happens depends on the device.
/// - `snapshot AT VALUE..`: save, change these bytes, and restore.
pub(crate) const STEPS: [(&str, usize); 14] = [
    ("start", 1),
    ("read", 2),
    ("write", 1),
    ("memory", 1),
    ("request", 2),
    ("indirect", 2),
    ("descriptor", 6),
    ("head", 2),
    ("available", 2),
    ("notify", 1),
    ("rush", 1),
    ("turn", 0),
    ("host", 2),
    ("snapshot", 0),
];

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) numbers: Vec<u64>,
    pub(crate) pieces: Vec<Vec<u8>>,
}

impl Step {
    /// A number; zero if it is missing.
    pub(crate) fn number(&self, at: usize) -> u64 {
        self.numbers.get(at).copied().unwrap_or(0)
    }

    /// The first piece.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.pieces.first().map_or(&[], Vec::as_slice)
    }
}

/// An input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Input {
    pub(crate) kind: &'static str,
    pub(crate) steps: Vec<Step>,
}

fn piece(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter_map(|c| c.to_digit(16)).map(|d| u8::try_from(d).unwrap()).collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn step(line: &str) -> Option<Step> {
    let (words, pieces) = line.split_once(':').unwrap_or((line, ""));
    let mut words = words.split_whitespace();
    let name = words.next()?;
    let (name, _) = STEPS.into_iter().find(|step| step.0 == name)?;
    let numbers = words.filter_map(|word| u64::from_str_radix(word, 16).ok()).collect();
    Some(Step { name, numbers, pieces: pieces.split_whitespace().map(piece).collect() })
}

impl Input {
    /// Lines that are no steps are left out, so that an input may have comments.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let kind = text.lines().find_map(|line| KINDS.into_iter().find(|kind| *kind == line));
        Self { kind: kind.unwrap_or(KINDS[0]), steps: text.lines().filter_map(step).collect() }
    }

    pub(crate) fn print(&self) -> Vec<u8> {
        let mut text = format!("{}\n", self.kind);
        for Step { name, numbers, pieces } in &self.steps {
            text += name;
            numbers.iter().for_each(|number| text += &format!(" {number:x}"));
            if !pieces.is_empty() {
                text += " :";
            }
            for piece in pieces {
                text.push(' ');
                piece.iter().for_each(|byte| text += &format!("{byte:02x}"));
            }
            text.push('\n');
        }
        text.into_bytes()
    }
}
