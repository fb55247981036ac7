//! Finds a text in a stream of bytes, at the byte that completes it (the Knuth-Morris-Pratt
//! algorithm).

/// Looks for one text, and finds it once.
#[derive(Debug, Default)]
pub(super) struct TextStop {
    text: Vec<u8>,
    /// For each matched length, the length of the next shorter match.
    shorter: Vec<usize>,
    matched: usize,
    is_found: bool,
}

impl TextStop {
    /// Look for this text. An empty text is never found.
    pub(super) fn at(text: Vec<u8>) -> Self {
        let mut shorter = vec![0; text.len()];
        let mut length = 0;
        for at in 1..text.len() {
            while length > 0 && text.get(at) != text.get(length) {
                length = shorter.get(length - 1).copied().unwrap_or(0);
            }
            if text.get(at) == text.get(length) {
                length += 1;
            }
            if let Some(place) = shorter.get_mut(at) {
                *place = length;
            }
        }
        Self { text, shorter, matched: 0, is_found: false }
    }

    /// Feed the next byte. Returns whether it completes the text.
    pub(super) fn feed(&mut self, byte: u8) -> bool {
        if self.is_found || self.text.is_empty() {
            return false;
        }
        while self.matched > 0 && self.text.get(self.matched) != Some(&byte) {
            self.matched = self.shorter.get(self.matched - 1).copied().unwrap_or(0);
        }
        if self.text.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
        self.is_found = self.matched == self.text.len();
        self.is_found
    }

    /// Take the text if it was found. This ends the search.
    pub(super) fn take_match(&mut self) -> Option<Vec<u8>> {
        self.is_found.then(|| std::mem::take(self).text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_found_where_the_stream_first_ends_with_it(text in "[ab]{1,6}", stream in "[ab]{0,40}") {
            let mut stop = TextStop::at(text.clone().into());
            let found = stream.bytes().position(|byte| stop.feed(byte)).map(|at| at + 1);
            prop_assert_eq!(found, stream.find(&text).map(|at| at + text.len()));
            prop_assert_eq!(stop.take_match(), found.map(|_| text.into_bytes()));
            prop_assert_eq!(stop.take_match(), None);
        }
    }
}
