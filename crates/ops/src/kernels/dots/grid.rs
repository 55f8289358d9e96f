//! An output matrix whose columns can be shared among threads.

use crate::error::{Error, Result};
use std::marker::PhantomData;

/// `rows × cols` numbers, rows `pitch` apart. Two grids made by [`Grid::split_cols`] interleave in memory but share no
/// number, nor do those of [`Grid::split_rows`].
#[derive(Debug)]
pub(crate) struct Grid<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    pitch: usize,
    own: PhantomData<&'a mut [f32]>,
}

// SAFETY: a grid is the only way to its numbers, as a `&mut [f32]` would be: `new` borrows the slice for `'a`, and `split_cols`
// and `split_rows` consume the grid that they share out.
unsafe impl Send for Grid<'_> {}

impl<'a> Grid<'a> {
    /// The grid at the start of `data`.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize, pitch: usize) -> Result<Self> {
        let end = rows.checked_sub(1).map_or(Some(0), |last| last.checked_mul(pitch)?.checked_add(cols));
        if cols > pitch || end.is_none_or(|end| end > data.len()) {
            return Err(Error::shape("matmul", format!("{rows} x {cols}, rows {pitch} apart, in {}", data.len())));
        }
        Ok(Self { data: data.as_mut_ptr(), rows, cols, pitch, own: PhantomData })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The same grid while this one waits.
    pub(crate) fn borrow(&mut self) -> Grid<'_> {
        Grid { own: PhantomData, ..*self }
    }

    /// The columns before `at`, and the others.
    pub(crate) fn split_cols(self, at: usize) -> (Grid<'a>, Grid<'a>) {
        let at = at.min(self.cols);
        // SAFETY: column `at` of the first row is within the data, or one behind its end where there is no such column; without
        // rows the pointer is never followed.
        let right = if self.rows == 0 { self.data } else { unsafe { self.data.add(at) } };
        (
            Grid { cols: at, own: PhantomData, ..self },
            Grid { data: right, cols: self.cols - at, own: PhantomData, ..self },
        )
    }

    /// The rows before `at`, and the others.
    pub(crate) fn split_rows(self, at: usize) -> (Grid<'a>, Grid<'a>) {
        let at = at.min(self.rows);
        // SAFETY: row `at` begins within the data, or there is none; then the pointer is never followed.
        let below = if at == self.rows { self.data } else { unsafe { self.data.add(at * self.pitch) } };
        (
            Grid { rows: at, own: PhantomData, ..self },
            Grid { data: below, rows: self.rows - at, own: PhantomData, ..self },
        )
    }

    /// Writes numbers from row `i`, column `j` on, as many as the row has room for.
    #[inline(always)]
    pub(crate) fn put(&mut self, i: usize, j: usize, numbers: &[f32]) {
        if i >= self.rows || j >= self.cols {
            return;
        }
        let n = numbers.len().min(self.cols - j);
        // SAFETY: row `i` and columns `j..j + n` are within the grid, which `new` showed to be within its data; nothing else can
        // reach them, and `numbers` is not among them, being another borrow.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), self.data.add(i * self.pitch + j), n) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_write_their_own_columns_and_nothing_else() {
        let mut data = [0f32; 11];
        let (mut left, mut right) = Grid::new(&mut data, 3, 3, 4).unwrap().split_cols(1);
        assert_eq!((left.cols(), right.cols()), (1, 2));
        left.put(0, 0, &[1.0, 9.0]);
        left.put(2, 0, &[3.0]);
        left.put(3, 0, &[9.0]);
        left.put(0, 1, &[9.0]);
        right.put(0, 0, &[4.0, 5.0, 9.0]);
        right.put(2, 1, &[6.0]);
        assert_eq!(data, [1.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 6.0]);
    }

    #[test]
    fn parts_by_rows_write_their_own() {
        let mut data = [0f32; 11];
        let (mut above, mut below) = Grid::new(&mut data, 3, 3, 4).unwrap().split_rows(1);
        assert_eq!((above.rows(), below.rows()), (1, 2));
        above.put(0, 0, &[1.0]);
        above.put(1, 0, &[9.0]);
        below.put(0, 0, &[2.0]);
        below.put(1, 2, &[3.0, 9.0]);
        let (all, mut none) = below.split_rows(9);
        none.put(0, 0, &[9.0]);
        assert_eq!((all.rows(), none.rows()), (2, 0));
        assert_eq!(data, [1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]);
    }

    #[test]
    fn grids_behind_their_data_are_refused() {
        let mut data = [0f32; 11];
        assert!(Grid::new(&mut data, 3, 4, 4).is_err());
        assert!(Grid::new(&mut data, 2, 5, 4).is_err());
        assert!(Grid::new(&mut data, usize::MAX, 1, 4).is_err());
        let (left, right) = Grid::new(&mut data, 0, 4, 4).unwrap().split_cols(9);
        assert_eq!((left.cols(), right.cols()), (4, 0));
    }
}
