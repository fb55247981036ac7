//! The registers of a VGA adapter in its text mode of 80 by 25 characters. The characters are in
//! guest memory from 0xb8000 on, which is plain RAM. vCPU threads access it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Device;
use crate::bytes::Reader;
use crate::error::Result;
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};

/// Ports, as offsets from 0x3c0.
const ATTRIBUTE: u64 = 0x0;
const ATTRIBUTE_DATA: u64 = 0x1;
const MISC: u64 = 0x2;
const SEQUENCER: u64 = 0x4;
const SEQUENCER_DATA: u64 = 0x5;
const PALETTE_MASK: u64 = 0x6;
const PALETTE_READ: u64 = 0x7;
const PALETTE_WRITE: u64 = 0x8;
const PALETTE_DATA: u64 = 0x9;
const MISC_READ: u64 = 0xc;
const GRAPHICS: u64 = 0xe;
const GRAPHICS_DATA: u64 = 0xf;
const CRTC: u64 = 0x14;
const CRTC_DATA: u64 = 0x15;
const STATUS: u64 = 0x1a;

/// CRTC registers.
const CURSOR_START: usize = 0x0a;
const START: usize = 0x0c;
const CURSOR: usize = 0x0e;
const CURSOR_OFF: u8 = 1 << 5;

/// Bits of the input status: the beam is outside the picture; it returns to the top.
const BLANK: u8 = 1 << 0;
const RETRACE: u8 = 1 << 3;
const FRAME: Duration = Duration::from_nanos(14_268_000);
/// The part of a frame in which the picture is drawn.
const PICTURE: Duration = Duration::from_nanos(12_711_000);
const LINE_NS: u128 = 31_778;
const LINE_PICTURE_NS: u128 = 25_422;

/// The registers of the text mode, as the firmware sets them.
const CRTC_VALUES: [u8; 25] = [
    0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00, 0x00,
    0x9c, 0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
];
const SEQUENCER_VALUES: [u8; 5] = [0x03, 0x00, 0x03, 0x00, 0x02];
const GRAPHICS_VALUES: [u8; 9] = [0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x0e, 0x00, 0xff];
const ATTRIBUTE_VALUES: [u8; 21] = [
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f,
    0x0c, 0x00, 0x0f, 0x08, 0x00,
];
/// Colour, and both banks of memory accesses on.
const MISC_VALUE: u8 = 0x67;
const PALETTE_BYTES: usize = 768;

/// Registers behind an index.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Indexed<const N: usize> {
    index: u8,
    values: [u8; N],
}

impl<const N: usize> Indexed<N> {
    fn new(values: [u8; N]) -> Self {
        Self { index: 0, values }
    }

    fn get(&self) -> u8 {
        self.values.get(usize::from(self.index)).copied().unwrap_or(0)
    }

    fn set(&mut self, value: u8) {
        if let Some(register) = self.values.get_mut(usize::from(self.index)) {
            *register = value;
        }
    }

    fn save(&self, bytes: &mut Vec<u8>) {
        bytes.push(self.index);
        bytes.extend(self.values);
    }

    fn restored(reader: &mut Reader<'_>) -> Result<Self> {
        let [index] = reader.take()?;
        Ok(Self { index, values: reader.take()? })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    crtc: Indexed<25>,
    sequencer: Indexed<5>,
    graphics: Indexed<9>,
    attribute: Indexed<21>,
    /// Whether the next write to the attribute port is a value.
    is_attribute_data: bool,
    misc: u8,
    palette_mask: u8,
    /// The bytes of the palette that are read and written next.
    palette_at: [usize; 2],
    palette: [u8; PALETTE_BYTES],
}

impl Default for State {
    fn default() -> Self {
        Self {
            crtc: Indexed::new(CRTC_VALUES),
            sequencer: Indexed::new(SEQUENCER_VALUES),
            graphics: Indexed::new(GRAPHICS_VALUES),
            attribute: Indexed::new(ATTRIBUTE_VALUES),
            is_attribute_data: false,
            misc: MISC_VALUE,
            palette_mask: 0xff,
            palette_at: [0; 2],
            palette: [0; PALETTE_BYTES],
        }
    }
}

impl State {
    fn read(&mut self, offset: u64) -> u8 {
        match offset {
            ATTRIBUTE => self.attribute.index,
            ATTRIBUTE_DATA => self.attribute.get(),
            SEQUENCER => self.sequencer.index,
            SEQUENCER_DATA => self.sequencer.get(),
            PALETTE_MASK => self.palette_mask,
            PALETTE_DATA => *self.palette_byte(0),
            MISC_READ => self.misc,
            GRAPHICS => self.graphics.index,
            GRAPHICS_DATA => self.graphics.get(),
            CRTC => self.crtc.index,
            CRTC_DATA => self.crtc.get(),
            STATUS => {
                self.is_attribute_data = false;
                input_status(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
            }
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u8) {
        match offset {
            ATTRIBUTE => {
                if self.is_attribute_data {
                    self.attribute.set(value);
                } else {
                    self.attribute.index = value & 0x1f;
                }
                self.is_attribute_data = !self.is_attribute_data;
            }
            MISC => self.misc = value,
            SEQUENCER => self.sequencer.index = value,
            SEQUENCER_DATA => self.sequencer.set(value),
            PALETTE_MASK => self.palette_mask = value,
            PALETTE_READ => self.palette_at[0] = usize::from(value) * 3,
            PALETTE_WRITE => self.palette_at[1] = usize::from(value) * 3,
            PALETTE_DATA => *self.palette_byte(1) = value & 0x3f,
            GRAPHICS => self.graphics.index = value,
            GRAPHICS_DATA => self.graphics.set(value),
            CRTC => self.crtc.index = value,
            CRTC_DATA => self.crtc.set(value),
            _ => {}
        }
    }

    /// The next byte of the palette for reads or writes.
    fn palette_byte(&mut self, which: usize) -> &mut u8 {
        let [read, write] = &mut self.palette_at;
        let at = if which == 0 { read } else { write };
        let now = *at % PALETTE_BYTES;
        *at = now + 1;
        let [first, rest @ ..] = &mut self.palette;
        now.checked_sub(1).and_then(|now| rest.get_mut(now)).unwrap_or(first)
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.crtc.save(&mut bytes);
        self.sequencer.save(&mut bytes);
        self.graphics.save(&mut bytes);
        self.attribute.save(&mut bytes);
        bytes.extend([u8::from(self.is_attribute_data), self.misc, self.palette_mask]);
        for at in self.palette_at {
            bytes.extend(u16::try_from(at).unwrap_or(0).to_le_bytes());
        }
        bytes.extend(self.palette);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("screen", bytes);
        let (crtc, sequencer) = (Indexed::restored(&mut reader)?, Indexed::restored(&mut reader)?);
        let (graphics, attribute) =
            (Indexed::restored(&mut reader)?, Indexed::restored(&mut reader)?);
        let [is_data, misc, palette_mask] = reader.take()?;
        let palette_at = [usize::from(reader.u16()?), usize::from(reader.u16()?)];
        let palette = reader.take()?;
        reader.end()?;
        let is_attribute_data = is_data != 0;
        Ok(Self {
            crtc,
            sequencer,
            graphics,
            attribute,
            is_attribute_data,
            misc,
            palette_mask,
            palette_at,
            palette,
        })
    }
}

/// What the guest sees of the beam, which runs at 70 pictures a second.
fn input_status(now: Duration) -> u8 {
    let into_frame = now.as_nanos() % FRAME.as_nanos();
    if into_frame >= PICTURE.as_nanos() {
        return BLANK | RETRACE;
    }
    if into_frame % LINE_NS >= LINE_PICTURE_NS { BLANK } else { 0 }
}

/// What of the memory is shown, in characters from 0xb8000 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScreenView {
    /// The first character.
    pub start: u16,
    /// The cursor's character; `None` if the cursor is off.
    pub cursor: Option<u16>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Vga(Mutex<State, rank::Vga>);

impl Vga {
    /// What is shown now.
    #[must_use]
    pub fn view(&self) -> ScreenView {
        let state = self.0.lock();
        let register = |at: usize| state.crtc.values.get(at).copied().unwrap_or(0);
        let word = |at| u16::from_be_bytes([register(at), register(at + 1)]);
        let is_on = register(CURSOR_START) & CURSOR_OFF == 0;
        ScreenView { start: word(START), cursor: is_on.then(|| word(CURSOR)) }
    }
}

impl Device for Vga {
    fn name(&self) -> &str {
        "screen"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        let mut state = self.0.lock();
        for (offset, byte) in (offset..).zip(data) {
            *byte = state.read(offset);
        }
        Outcome::Continue
    }

    /// A word goes to two ports: an index, and its value.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let mut state = self.0.lock();
        for (offset, byte) in (offset..).zip(data) {
            state.write(offset, *byte);
        }
        Outcome::Continue
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.0.lock().to_bytes())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        *self.0.lock() = State::from_bytes(state)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(vga: &Vga, offset: u64) -> u8 {
        let mut data = [0];
        vga.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn the_cursor_and_the_start_are_those_of_the_registers() {
        let vga = Vga::default();
        assert_eq!(vga.view(), ScreenView { start: 0, cursor: Some(0) });
        for word in [0x010c, 0x400d, 0x020e, 0x050f] {
            vga.write(CRTC, &u16::to_le_bytes(word));
        }
        assert_eq!(vga.view(), ScreenView { start: 0x140, cursor: Some(0x205) });
        assert_eq!((read(&vga, CRTC), read(&vga, CRTC_DATA)), (0x0f, 5));
        vga.write(CRTC, &[0x0a, 0x20]);
        assert_eq!(vga.view().cursor, None);
    }

    #[test]
    fn the_attribute_port_takes_an_index_and_then_a_value() {
        let vga = Vga::default();
        read(&vga, STATUS);
        vga.write(ATTRIBUTE, &[0x10]);
        vga.write(ATTRIBUTE, &[0x55]);
        vga.write(ATTRIBUTE, &[0x11]);
        read(&vga, STATUS);
        vga.write(ATTRIBUTE, &[0x10]);
        assert_eq!(read(&vga, ATTRIBUTE_DATA), 0x55);
    }

    #[test]
    fn the_palette_is_read_as_it_was_written() {
        let vga = Vga::default();
        vga.write(PALETTE_WRITE, &[255]);
        (1..=6).for_each(|value| drop(vga.write(PALETTE_DATA, &[value])));
        vga.write(PALETTE_READ, &[255]);
        let values: Vec<u8> = (0..6).map(|_| read(&vga, PALETTE_DATA)).collect();
        assert_eq!(values, [1, 2, 3, 4, 5, 6], "it wraps");
    }

    #[test]
    fn the_beam_is_in_the_picture_and_outside() {
        let at = |nanoseconds| input_status(Duration::from_nanos(nanoseconds));
        assert_eq!(
            (at(0), at(30_000), at(14_000_000), at(14_268_000)),
            (0, BLANK, BLANK | RETRACE, 0)
        );
    }

    proptest! {
        #[test]
        fn no_accesses_panic_and_what_is_saved_comes_back(
            accesses in prop::collection::vec((any::<bool>(), 0u64..40, any::<[u8; 2]>()), 0..60)
        ) {
            let vga = Vga::default();
            for (is_write, offset, mut data) in accesses {
                if is_write { vga.write(offset, &data); } else { vga.read(offset, &mut data); }
            }
            let other = Vga::default();
            let saved = vga.save().unwrap();
            other.restore(&saved).unwrap();
            prop_assert_eq!(other.save().unwrap(), saved.clone());
            prop_assert_eq!(other.view(), vga.view());
            prop_assert!(other.restore(&saved[1..]).is_err());
        }
    }
}
