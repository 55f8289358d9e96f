//! The segments of a row: each is summed by itself, and only then added to those before it.
//!
//! The rounding errors of a sum grow with the length of its chain of additions (Higham, *Accuracy and Stability of Numerical Algorithms*,
//! 2nd ed., §4.2): one chain over the whole of a long row, such as the classes of a language model, would be less exact than products that
//! are made block by block. Where a segment ends depends on the row's length alone.

use super::LANES;
use std::ops::Range;

/// The most elements of a segment: four rows of the weight then take a third of a first-level cache of 48 KiB.
const LONGEST: usize = 1024;

/// Segments of about equal size, at least one, which may be empty. All but the last have a multiple of sixteen elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments {
    len: usize,
    size: usize,
    next: usize,
    left: usize,
}

/// Those of a row of `len` elements.
pub(super) fn segments(len: usize) -> Segments {
    if len <= LONGEST {
        return Segments { len, size: len, next: 0, left: 1 };
    }
    let padded = len.next_multiple_of(LANES);
    let size = padded.div_ceil(padded.div_ceil(LONGEST)).next_multiple_of(LANES);
    Segments { len, size, next: 0, left: len.div_ceil(size) }
}

impl Iterator for Segments {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        self.left = self.left.checked_sub(1)?;
        let from = self.next;
        self.next = (from + self.size).min(self.len);
        Some(from..self.next)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Segments {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_a_row_and_end_on_whole_steps() {
        for len in (0..70).chain([1023, 1024, 1025, 1040, 1041, 1536, 2048, 2049, 5000, 49_152, 49_153]) {
            let parts: Vec<_> = segments(len).collect();
            assert_eq!(parts.len(), segments(len).len());
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, len));
            for pair in parts.windows(2) {
                assert_eq!(pair[0].end, pair[1].start);
                assert!(pair[0].end.is_multiple_of(LANES) && !pair[1].is_empty(), "{len}: {parts:?}");
            }
            assert!(parts.iter().all(|part| part.len() <= LONGEST), "{len}: {parts:?}");
        }
        assert_eq!(segments(1536).collect::<Vec<_>>(), [0..768, 768..1536]);
    }
}
