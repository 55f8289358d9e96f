//! What an epilogue reads beside products.

use super::Source;
use crate::error::Result;
use crate::fault;
use crate::kernels::{cast, fresh};
use crate::view::{Slice, SliceMut, Strided, View};
use smallvec::{smallvec, SmallVec};

/// An input of an epilogue, as rows.
pub(super) enum Operand<'a> {
    /// The product of this number.
    Product(usize),
    /// Elements `step` apart in rows `pitch` apart.
    Rows { data: Slice<'a>, offset: usize, pitch: usize, step: usize },
    /// A copy of what is not rows at one distance.
    Copy { data: Vec<f32>, pitch: usize },
}

impl<'a> Operand<'a> {
    /// The source as `m` rows of `n`.
    pub(super) fn of(source: &Source<'a>, (m, n): (usize, usize)) -> Result<Self> {
        Ok(match source {
            Source::Product(i) => Self::Product(*i),
            Source::View(view) => match view.layout.reshape(&[m, n]) {
                Some(flat) => {
                    Self::Rows { data: view.data, offset: flat.offset, pitch: flat.strides[0], step: flat.strides[1] }
                }
                None => Self::Copy { data: dense(view)?, pitch: n },
            },
        })
    }

    /// Rows and columns from these on, as a view of these dims. `products` are dense and of these dims already.
    pub(super) fn part<'b>(
        &'b self,
        products: &[Slice<'b>],
        (row, col): (usize, usize),
        dims: &[usize; 2],
    ) -> View<'b> {
        let (data, offset, pitch, step) = match self {
            Self::Product(i) => {
                // a head without so many products was refused
                let data = products.get(*i).copied().unwrap_or(Slice::F32(&[]));
                return View { data, layout: Strided::contiguous(dims) };
            }
            Self::Rows { data, offset, pitch, step } => (*data, *offset, *pitch, *step),
            Self::Copy { data, pitch } => (Slice::F32(data), 0, *pitch, 1),
        };
        let row = if fault::active("products.operand_row") { 0 } else { row };
        let col = if fault::active("products.operand_col") { 0 } else { col };
        let layout = Strided {
            dims: SmallVec::from_slice(dims),
            strides: smallvec![pitch, step],
            offset: offset + row * pitch + col * step,
        };
        View { data, layout }
    }
}

/// A view's elements in row-major order, in f32.
pub(super) fn dense(view: &View<'_>) -> Result<Vec<f32>> {
    let mut out = fresh(view.layout.elem_count());
    cast(view, &mut SliceMut::F32(&mut out))?;
    Ok(out)
}
