//! Several products of one x, and what follows each of them element by element, as one job of the threads.
//!
//! What a head makes is cut into parts, blocks of x's rows and columns of its weights; a part's products stay in the cache while the
//! program of its epilogue passes over them, and only what that makes goes to memory. Each product is the one that
//! [`matmul`](super::matmul()) gives, and the epilogue is elementwise: no bit depends on what was put together.

mod operands;
mod part;

use super::dots::{part_cols, part_rows, task_count, with_lines, Narrow, Rows, Side};
use super::matmul::{widen_matrix, Matrix};
use super::team;
use crate::error::{Error, Result};
use crate::row::{Class, Instr, RowProgram};
use crate::view::{count, Dims, Slice, SliceMut, View};
use candle_core::DType;
use operands::Operand;
use parking_lot::Mutex;
pub(super) use part::kept_products;
use part::{kept_rows, AnyGrid, Part};
use smallvec::SmallVec;

const OP: &str = "linear";

/// Products of x with one or more right sides, and what follows.
#[derive(Debug, Clone)]
pub struct Head<'a> {
    /// The right sides, each (k, n) with any strides: a weight (n, k) with its dims exchanged.
    pub rights: Vec<View<'a>>,
    /// What is made of the products; without it there is one right side, and its product is the result.
    pub epilogue: Option<Epilogue<'a>>,
}

/// An elementwise program over products.
#[derive(Debug, Clone)]
pub struct Epilogue<'a> {
    /// Computes in f32 and has one value per element everywhere.
    pub program: &'a RowProgram,
    /// What its inputs are.
    pub inputs: Vec<Source<'a>>,
    /// Its scalars.
    pub params: &'a [f64],
}

/// An input of an epilogue.
#[derive(Debug, Clone)]
pub enum Source<'a> {
    /// The product with the head's right side of this number, rounded to its dtype.
    Product(usize),
    /// A view with the dims of the product, stride 0 where it is broadcast.
    View(View<'a>),
}

/// Each head's results of `x` (…, k): (…, n), dense, in the order of the heads.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `Unsupported` (f64, or no float), `InvalidProgram`, `OutOfBounds`.
pub fn products(x: &View<'_>, heads: &[Head<'_>], outs: &mut [SliceMut<'_>]) -> Result<()> {
    x.check()?;
    let [lead @ .., k] = x.dims() else {
        return Err(Error::shape(OP, "x needs a dim"));
    };
    let mut left: &[SliceMut<'_>] = outs;
    for head in heads {
        let made = check(x, lead, *k, head)?;
        let Some((mine, others)) = left.split_at_checked(made.len()) else {
            return Err(Error::shape(OP, format!("{} results have no place", made.len() - left.len())));
        };
        for (out, (dtype, len)) in mine.iter().zip(made) {
            super::check_out(OP, out, dtype, len)?;
        }
        left = others;
    }
    if !left.is_empty() {
        return Err(Error::shape(OP, format!("{} results that no head makes", left.len())));
    }
    if outs.iter().all(|out| out.is_empty()) {
        return Ok(());
    }
    match x.data {
        Slice::F32(data) => typed(data, x, heads, outs),
        Slice::F16(data) => typed(data, x, heads, outs),
        Slice::BF16(data) => typed(data, x, heads, outs),
        _ => Err(Error::unsupported(OP, format!("dtype {}", x.dtype().as_str()))),
    }
}

/// Dtypes and lengths of what a head makes.
fn check(x: &View<'_>, lead: &[usize], k: usize, head: &Head<'_>) -> Result<SmallVec<[(DType, usize); 2]>> {
    let n = head.rights.first().and_then(|r| r.dims().get(1)).copied().unwrap_or(0);
    for right in &head.rights {
        right.check()?;
        if right.dtype() != x.dtype() {
            return Err(Error::dtypes(OP, "the weight", x.dtype(), right.dtype()));
        }
        if right.dims() != [k, n] {
            return Err(Error::shape(OP, format!("{:?} x {:?}, wanted {:?}", x.dims(), right.dims(), [k, n])));
        }
    }
    let mut dims: Dims = lead.into();
    dims.push(n);
    let len = count(&dims);
    let Some(epilogue) = &head.epilogue else {
        return match head.rights.len() {
            1 => Ok(SmallVec::from_slice(&[(x.dtype(), len)])),
            several => Err(Error::shape(OP, format!("{several} products of a head without an epilogue"))),
        };
    };
    if epilogue.program.class() != Class::F32 {
        return Err(Error::unsupported(OP, "an epilogue in f64"));
    }
    let of_rows =
        |i: &Instr| matches!(i, Instr::LoadRow { .. } | Instr::RowLen | Instr::Reduce(..) | Instr::RootMean { .. });
    if epilogue.program.instrs().iter().any(of_rows) {
        return Err(Error::program("an epilogue has one value per element everywhere".to_owned()));
    }
    for source in &epilogue.inputs {
        match source {
            Source::Product(i) if *i < head.rights.len() => {}
            Source::Product(i) => return Err(Error::shape(OP, format!("product {i} of {}", head.rights.len()))),
            Source::View(view) => {
                view.check()?;
                if view.dims() != dims.as_slice() {
                    return Err(Error::shape(OP, format!("an operand {:?} beside {:?}", view.dims(), dims.as_slice())));
                }
                if !Class::F32.reads(view.dtype()) {
                    return Err(Error::dtype(OP, format!("an operand of {}", view.dtype().as_str())));
                }
            }
        }
    }
    Ok(epilogue.program.outputs().iter().map(|&(_, dtype)| (dtype, len)).collect())
}

fn typed<E: Narrow>(data: &[E], x: &View<'_>, heads: &[Head<'_>], outs: &mut [SliceMut<'_>]) -> Result<()> {
    let k = x.dims().last().copied().unwrap_or(0);
    let m = x.dims().split_last().map_or(1, |(_, lead)| count(lead));
    let mut wide = Vec::new();
    let x = left(data, x, (m, k), &mut wide)?;
    let mut stores: Vec<Vec<f32>> = Vec::new();
    for right in heads.iter().flat_map(|h| &h.rights) {
        stores.push(copied::<E>(right));
    }
    let mut stores = stores.iter();
    let mut bound = Vec::with_capacity(heads.len());
    for head in heads {
        let mut sides: SmallVec<[Side<'_, E>; 2]> = SmallVec::new();
        for right in &head.rights {
            let copy = stores.next().map_or(&[][..], |s| s.as_slice());
            sides.push(Side::of(E::of(&right.data).unwrap_or_default(), Matrix::of(&right.layout), copy)?);
        }
        let n = head.rights.first().and_then(|r| r.dims().get(1)).copied().unwrap_or(0);
        let operands = match &head.epilogue {
            Some(epilogue) => epilogue.inputs.iter().map(|s| Operand::of(s, (m, n))).collect::<Result<_>>()?,
            None => SmallVec::new(),
        };
        bound.push(Bound { head, sides, operands, n });
    }
    with_lines(x, bound.iter().any(|b| b.sides.iter().any(|s| s.reads_lines(x.count()))), |x| run(x, &bound, outs))
}

/// A head whose operands are ready.
struct Bound<'a, E> {
    head: &'a Head<'a>,
    sides: SmallVec<[Side<'a, E>; 2]>,
    operands: SmallVec<[Operand<'a>; 4]>,
    /// Columns of its products.
    n: usize,
}

impl<E: Narrow> Bound<'_, E> {
    /// About how many nanoseconds a thread needs for `m` rows.
    fn cost(&self, m: usize) -> usize {
        let follows = self.head.epilogue.as_ref().map_or(0, |e| e.program.cost_ns(m.saturating_mul(self.n)));
        self.sides.iter().map(|s| s.cost_ns(m)).fold(follows, usize::saturating_add)
    }
}

/// Where the results of a head go, or of a part of it.
type Grids<'a> = SmallVec<[AnyGrid<'a>; 2]>;

fn run<E: Narrow>(x: Rows<'_, f32>, heads: &[Bound<'_, E>], outs: &mut [SliceMut<'_>]) -> Result<()> {
    let m = x.count();
    let total = heads.iter().map(|h| h.cost(m)).fold(0, usize::saturating_add);
    let tasks = task_count(total);
    let mut parts = Vec::with_capacity(tasks + heads.len());
    let mut rest = outs;
    for head in heads {
        let made = head.head.epilogue.as_ref().map_or(1, |e| e.program.outputs().len());
        let Some((mine, others)) = std::mem::take(&mut rest).split_at_mut_checked(made) else { break };
        rest = others;
        let mut grids = Grids::new();
        for out in mine {
            grids.push(AnyGrid::new(out.reborrow(), m, head.n)?);
        }
        // a head's share of the tasks
        let tasks = (tasks as u128 * head.cost(m) as u128).div_ceil(total.max(1) as u128) as usize;
        let mut block = part_rows(m, x.len());
        if head.head.epilogue.is_some() || E::DTYPE != DType::F32 {
            block = block.min(kept_rows(head.sides.len()));
        }
        let cols = part_cols(head.n, tasks, m.div_ceil(block.max(1)));
        for row in (0..m).step_by(block.max(1)) {
            let rows = block.min(m - row);
            let (mut above, below): (Grids<'_>, Grids<'_>) = grids.into_iter().map(|g| g.split_rows(rows)).unzip();
            grids = below;
            for from in (0..head.n).step_by(cols) {
                let width = cols.min(head.n - from);
                let (outs, right): (Grids<'_>, Grids<'_>) = above.into_iter().map(|g| g.split_cols(width)).unzip();
                above = right;
                parts.push(Part { head, x: x.part(row, rows), row, from, width, outs });
            }
        }
    }
    let outcome = Mutex::new(Ok(()));
    team::each(total, parts, |part| {
        if let Err(error) = part.run() {
            *outcome.lock() = Err(error);
        }
    });
    outcome.into_inner()
}

/// x as rows of f32: as it lies where it is f32 and its rows are runs, else a copy.
fn left<'a, E: Narrow>(
    data: &'a [E],
    x: &View<'_>,
    (m, k): (usize, usize),
    wide: &'a mut Vec<f32>,
) -> Result<Rows<'a, f32>> {
    if k == 0 {
        return Rows::new(&[], m, 0, 0);
    }
    let flat = x.layout.reshape(&[m, k]);
    match (&flat, E::plain(data)) {
        (Some(flat), Some(data)) if flat.strides[1] == 1 || k == 1 => {
            return Rows::new(data.get(flat.offset..).unwrap_or_default(), m, flat.strides[0], k);
        }
        (Some(flat), _) => widen_matrix(data, Matrix::of(flat), wide),
        (None, _) => *wide = operands::dense(x)?,
    }
    Rows::new(wide, m, k, k)
}

/// A copy in f32 of a right side that has neither rows nor columns which are runs; else nothing.
fn copied<E: Narrow>(right: &View<'_>) -> Vec<f32> {
    let m = Matrix::of(&right.layout);
    let mut wide = Vec::new();
    if let (Some(data), false) = (E::of(&right.data), m.has_runs()) {
        widen_matrix(data, m, &mut wide);
    }
    wide
}
