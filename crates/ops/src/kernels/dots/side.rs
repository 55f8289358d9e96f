//! A right side of whichever kind, and one thread's products of a block of x's rows with several of them.

use super::{panel, scratch, Columns, Grid, Narrow, Right, Rows};
use crate::error::Result;
use crate::fault;
use crate::kernels::matmul::Matrix;

/// A right side as it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side<'a, E> {
    /// Rows that are runs of elements.
    Rows(Rows<'a, E>),
    /// Columns of rows that are.
    Columns(Columns<'a, E>),
    /// The same of a copy in f32.
    Copy(Columns<'a, f32>),
}

/// Runs one generic expression for whichever kind a side is.
macro_rules! each_side {
    ($side:expr, $w:ident => $body:expr) => {
        match $side {
            Side::Rows($w) => $body,
            Side::Columns($w) => $body,
            Side::Copy($w) => $body,
        }
    };
}
pub(crate) use each_side;

impl<'a, E: Narrow> Side<'a, E> {
    /// A matrix (k, n) in `data`, or where neither its rows nor its columns are runs of elements the dense `copy` of it.
    pub(crate) fn of(data: &'a [E], m: Matrix, copy: &'a [f32]) -> Result<Self> {
        if m.rows == 0 {
            return Ok(Self::Rows(Rows::new(&[], m.cols, 0, 0)?));
        }
        let data = data.get(m.offset..).unwrap_or_default();
        if m.row_stride == 1 || m.rows == 1 {
            let pitch = if fault::active("dots.pitch") { 0 } else { m.col_stride };
            return Ok(Self::Rows(Rows::new(data, m.cols, pitch, m.rows)?));
        }
        if m.col_stride == 1 || m.cols == 1 {
            let pitch = if fault::active("dots.columns.pitch") { m.cols } else { m.row_stride };
            return Ok(Self::Columns(Columns::of(Rows::new(data, m.rows, pitch, m.cols)?)));
        }
        Ok(Self::Copy(Columns::of(Rows::new(copy, m.rows, m.cols, m.cols)?)))
    }

    /// Those `from..from + count`.
    pub(crate) fn part(&self, from: usize, count: usize) -> Self {
        match self {
            Self::Rows(w) => Self::Rows(Right::part(w, from, count)),
            Self::Columns(w) => Self::Columns(w.part(from, count)),
            Self::Copy(w) => Self::Copy(w.part(from, count)),
        }
    }

    /// About how many nanoseconds a thread needs for its products with so many rows.
    pub(crate) fn cost_ns(&self, rows: usize) -> usize {
        each_side!(self, w => super::cost_ns(w, rows))
    }

    /// Whether so many rows of x are packed for it.
    pub(crate) fn packs(&self, rows: usize) -> bool {
        each_side!(self, w => w.packs(rows))
    }

    /// Whether so many rows of x are worth copying to boundaries of cache lines.
    pub(crate) fn reads_lines(&self, rows: usize) -> bool {
        each_side!(self, w => !w.packs(rows) && w.reads_lines())
    }
}

/// A block of x's rows on one thread, packed where that is quicker.
pub(crate) struct Left<'a, 'b> {
    x: Rows<'a, f32>,
    block: Option<&'b mut panel::Block<'a>>,
}

impl Left<'_, '_> {
    /// Calls `f` with these rows, for products with `sides` and their parts, and with `beside` numbers of no particular value that begin
    /// on a cache line.
    pub(crate) fn with<E: Narrow, R>(
        x: Rows<'_, f32>,
        sides: &[Side<'_, E>],
        beside: usize,
        f: impl FnOnce(&mut Left<'_, '_>, &mut [f32]) -> R,
    ) -> R {
        let strips = sides.iter().filter(|s| s.packs(x.count)).map(|s| each_side!(s, w => w.strip()));
        match strips.max() {
            Some(strip) => panel::with(x, strip, beside, |block, beside| {
                f(&mut Left { x: block.rows(), block: Some(block) }, beside)
            }),
            None => scratch::with(beside, |beside| f(&mut Left { x, block: None }, beside)),
        }
    }

    /// out\[i\]\[j\] = x\[i\] · w\[j\].
    pub(crate) fn products<E: Narrow>(&mut self, w: &Side<'_, E>, out: &mut Grid<'_>) {
        each_side!(w, w => match &mut self.block {
            Some(block) if w.packs(self.x.count) => block.products(*w, out),
            _ => w.few(self.x, out),
        });
    }
}
