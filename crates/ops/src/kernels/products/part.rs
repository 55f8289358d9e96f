//! A part of a head: a block of x's rows with some columns of its weights, on one thread.

use super::{Bound, Grids, OP};
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels::dots::{Grid, Left, Narrow, Rows};
use crate::kernels::fresh;
use crate::view::{Slice, SliceMut, View};
use candle_core::DType;
use half::{bf16, f16};
use smallvec::{smallvec, SmallVec};

/// Products that are kept until the epilogue has passed over them: a quarter of a MiB.
const KEPT: usize = 1 << 16;
/// The fewest columns of such products.
const FEWEST: usize = 64;
/// Rows of a part are a multiple of these.
const SIDE: usize = 4;

/// How many columns of the products of `rows` rows with `sides` weights pass at once, of `width`.
fn columns(rows: usize, sides: usize, width: usize) -> usize {
    (KEPT / (rows * sides).max(1) / FEWEST * FEWEST).max(FEWEST).min(width.max(1))
}

/// The most rows of a part whose products are kept: the fewest columns of more would be more than is kept.
pub(super) fn kept_rows(sides: usize) -> usize {
    (KEPT / (FEWEST * sides.max(1)) / SIDE * SIDE).max(SIDE)
}

/// The most numbers that a part keeps of its products, of `rows` rows or fewer.
pub(in crate::kernels) fn kept_products(rows: usize, sides: usize, width: usize) -> usize {
    rows.saturating_mul(sides).saturating_mul(width).min(KEPT.max(SIDE * FEWEST * sides))
}

/// A grid of one of the dtypes that a program of class f32 writes.
pub(super) enum AnyGrid<'a> {
    U8(Grid<'a, u8>),
    BF16(Grid<'a, bf16>),
    F16(Grid<'a, f16>),
    F32(Grid<'a, f32>),
}

/// Numbers of one of these dtypes.
enum Numbers {
    U8(Vec<u8>),
    BF16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Numbers {
    fn slice_mut(&mut self, len: usize) -> SliceMut<'_> {
        match self {
            Self::U8(v) => SliceMut::U8(&mut v[..len]),
            Self::BF16(v) => SliceMut::BF16(&mut v[..len]),
            Self::F16(v) => SliceMut::F16(&mut v[..len]),
            Self::F32(v) => SliceMut::F32(&mut v[..len]),
        }
    }
}

impl<'a> AnyGrid<'a> {
    /// All of an output, as rows.
    pub(super) fn new(out: SliceMut<'a>, rows: usize, cols: usize) -> Result<Self> {
        Ok(match out {
            SliceMut::U8(out) => Self::U8(Grid::new(out, rows, cols, cols)?),
            SliceMut::BF16(out) => Self::BF16(Grid::new(out, rows, cols, cols)?),
            SliceMut::F16(out) => Self::F16(Grid::new(out, rows, cols, cols)?),
            SliceMut::F32(out) => Self::F32(Grid::new(out, rows, cols, cols)?),
            other => return Err(Error::dtype(OP, format!("a result of {}", other.dtype().as_str()))),
        })
    }

    pub(super) fn split_rows(self, at: usize) -> (Self, Self) {
        self.split(at, Split::Rows)
    }

    pub(super) fn split_cols(self, at: usize) -> (Self, Self) {
        self.split(at, Split::Cols)
    }

    fn split(self, at: usize, by: Split) -> (Self, Self) {
        macro_rules! split {
            ($($kind:ident),*) => {
                match self {
                    $(Self::$kind(grid) => {
                        let (a, b) = match by {
                            Split::Rows => grid.split_rows(at),
                            Split::Cols => grid.split_cols(at),
                        };
                        (Self::$kind(a), Self::$kind(b))
                    })*
                }
            };
        }
        split!(U8, BF16, F16, F32)
    }

    /// Columns `from..from + count` where they lie together.
    fn run(&mut self, from: usize, count: usize) -> Option<SliceMut<'_>> {
        Some(match self {
            Self::U8(grid) => SliceMut::U8(grid.run(from, count)?),
            Self::BF16(grid) => SliceMut::BF16(grid.run(from, count)?),
            Self::F16(grid) => SliceMut::F16(grid.run(from, count)?),
            Self::F32(grid) => SliceMut::F32(grid.run(from, count)?),
        })
    }

    /// Room for so many of its numbers.
    fn room(&self, len: usize) -> Numbers {
        match self {
            Self::U8(_) => Numbers::U8(fresh(len)),
            Self::BF16(_) => Numbers::BF16(fresh(len)),
            Self::F16(_) => Numbers::F16(fresh(len)),
            Self::F32(_) => Numbers::F32(fresh(len)),
        }
    }

    /// Writes rows of `count` numbers of its dtype to the columns from `from` on.
    fn put(&mut self, from: usize, count: usize, numbers: Slice<'_>) {
        fn put<T: Copy>(grid: &mut Grid<'_, T>, from: usize, count: usize, numbers: &[T]) {
            for (i, row) in numbers.chunks_exact(count.max(1)).enumerate() {
                grid.put(i, from, row);
            }
        }
        match (self, numbers) {
            (Self::U8(grid), Slice::U8(v)) => put(grid, from, count, v),
            (Self::BF16(grid), Slice::BF16(v)) => put(grid, from, count, v),
            (Self::F16(grid), Slice::F16(v)) => put(grid, from, count, v),
            (Self::F32(grid), Slice::F32(v)) => put(grid, from, count, v),
            // `check` compared the dtypes
            _ => {}
        }
    }
}

#[derive(Clone, Copy)]
enum Split {
    Rows,
    Cols,
}

/// A block of rows and some columns of a head.
pub(super) struct Part<'a, 'b, E> {
    pub(super) head: &'b Bound<'a, E>,
    pub(super) x: Rows<'b, f32>,
    /// The first row.
    pub(super) row: usize,
    /// The columns.
    pub(super) from: usize,
    pub(super) width: usize,
    /// Where its results go.
    pub(super) outs: Grids<'b>,
}

impl<E: Narrow> Part<'_, '_, E> {
    /// Computes it.
    pub(super) fn run(mut self) -> Result<()> {
        let (rows, width) = (self.x.count(), self.width);
        let sides: SmallVec<[_; 2]> = self.head.sides.iter().map(|s| s.part(self.from, width)).collect();
        let follows = self.head.head.epilogue.is_some();
        if let ([AnyGrid::F32(out)], [side], DType::F32, false) =
            (self.outs.as_mut_slice(), sides.as_slice(), E::DTYPE, follows)
        {
            Left::with(self.x, &sides, 0, |left, _| left.products(side, out));
            return Ok(());
        }
        let columns = columns(rows, sides.len(), width);
        let size = rows * columns;
        let mut room = Room {
            rounded: match E::DTYPE {
                DType::F32 => SmallVec::new(),
                _ => smallvec![vec![E::default(); size]; sides.len()],
            },
            results: match follows {
                true => self.outs.iter_mut().map(|o| o.run(0, columns).is_none().then(|| o.room(size))).collect(),
                false => SmallVec::new(),
            },
        };
        Left::with(self.x, &sides, sides.len() * size, |left, tiles| {
            for at in (0..width).step_by(columns) {
                let count = columns.min(width - at);
                for (side, tile) in sides.iter().zip(tiles.chunks_exact_mut(size.max(1))) {
                    left.products(&side.part(at, count), &mut Grid::new(tile, rows, count, count)?);
                }
                if fault::active("products.second") && sides.len() > 1 {
                    tiles.copy_within(..size, size);
                }
                self.follow((at, count), tiles.chunks_exact(size.max(1)), &mut room)?;
            }
            Ok(())
        })
    }

    /// What follows the products of `count` columns from `at` on, which lie dense in `tiles`.
    fn follow<'t>(
        &mut self,
        (at, count): (usize, usize),
        tiles: impl Iterator<Item = &'t [f32]>,
        room: &mut Room<E>,
    ) -> Result<()> {
        let rows = self.x.count();
        let len = rows * count;
        let mut products: SmallVec<[Slice<'_>; 2]> = SmallVec::new();
        let mut rounded = room.rounded.iter_mut();
        for tile in tiles {
            products.push(match rounded.next() {
                Some(rounded) => {
                    E::round_from(&tile[..len], &mut rounded[..len]);
                    E::slice(&rounded[..len])
                }
                None => Slice::F32(&tile[..len]),
            });
        }
        let Some(epilogue) = &self.head.head.epilogue else {
            if let (Some(out), Some(product)) = (self.outs.first_mut(), products.first()) {
                out.put(at, count, *product);
            }
            return Ok(());
        };
        let dims = [rows, count];
        let mut inputs: SmallVec<[View<'_>; 6]> = SmallVec::new();
        for operand in &self.head.operands {
            inputs.push(operand.part(&products, (self.row, self.from + at), &dims));
        }
        let mut results: SmallVec<[SliceMut<'_>; 2]> = SmallVec::new();
        for (out, room) in self.outs.iter_mut().zip(&mut room.results) {
            match room {
                Some(room) => results.push(room.slice_mut(len)),
                None => results.extend(out.run(at, count)),
            }
        }
        epilogue.program.run(&dims, 0, &inputs, epilogue.params, &mut results)?;
        drop(results);
        for (out, room) in self.outs.iter_mut().zip(&mut room.results) {
            if let Some(room) = room {
                out.put(at, count, room.slice_mut(len).as_slice());
            }
        }
        Ok(())
    }
}

/// Memory of a part beside its products.
struct Room<E> {
    /// The products in their own dtype, where that is not f32.
    rounded: SmallVec<[Vec<E>; 2]>,
    /// Each result whose columns do not lie together in the output.
    results: SmallVec<[Option<Numbers>; 2]>,
}
