//! Softmax and norms of dense rows, a few rows at a time from beginning to end.
//!
//! The tile interpreter asks for each tile of each instruction where its operands lie; for rows of a thousand elements that takes as long as the
//! arithmetic. These are the instructions of the same schedule in the same order, with the same roundings, where it is one of the few that
//! most rows are run by.

use super::fuse::Fused;
use super::loops::RootMean;
use super::prepared::Resolved;
use super::program::{BinaryFn as B, Instr, Kind, ReduceFn, Reg, RowProgram};
use super::quotient::{exp_row, normal_of, reciprocal, Operands, Scale};
use super::reduce::{max_of_row, sum_of_row};
use super::schedule::{Facts, Pass};
use super::span::Map1;
#[cfg(target_arch = "x86_64")]
use super::wide;
use crate::fault;
use crate::math::Real;
use crate::simd::versions;
use smallvec::SmallVec;

/// Steps of a norm: its mean, the mean of its squares, and its elements.
pub(super) const STEPS: usize = 3;
/// No rows are longer that are run so: a few of them stay near the processor.
pub(super) const LONGEST: usize = 8192;

/// The most inputs whose elements are added up to a row: a product, its bias and a residual.
const ADDENDS: usize = 3;

/// The elements of a row: those of an input, or sums of several inputs' in this order.
pub(crate) type Source = SmallVec<[usize; ADDENDS]>;

/// What a schedule comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Whole {
    pub(crate) what: What,
    /// The output that the rows go to; another one, if there is one, gets the sums that they are made of.
    pub(crate) out: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// e^(x − max x) / Σ e^(x − max x).
    Softmax { x: Source },
    /// (x − mean) / √(Σ(x − mean)²/n + eps) · weight + bias, with or without a mean; weight and bias are inputs.
    Norm { x: Source, centred: bool, eps: u16, weight: Option<usize>, bias: Option<usize> },
}

/// Whether these loops may run: not where a fault is to be seen that only the interpreter has.
pub(super) fn may_run() -> bool {
    fault::none_but(&["row.whole.softmax", "row.whole.norm", "row.whole.sums", "row.gated.tail"])
}

impl Whole {
    /// The inputs that have an element for each of the row.
    pub(crate) fn inputs(&self) -> impl Iterator<Item = usize> + '_ {
        let (x, weight, bias) = match &self.what {
            What::Softmax { x } => (x, None, None),
            What::Norm { x, weight, bias, .. } => (x, *weight, *bias),
        };
        x.iter().copied().chain(weight).chain(bias)
    }

    /// What a schedule's only pass comes to, if it is one of these; its outputs, `roots`, are computed in place.
    pub(crate) fn find(
        program: &RowProgram,
        Resolved { alias, kinds }: &Resolved,
        pass: &Pass,
        roots: &[usize],
        facts: Facts,
    ) -> Option<Self> {
        if facts.elementwise || facts.segmented || facts.columns || !(0..roots.len()).all(|k| facts.direct.has(k)) {
            return None;
        }
        // nothing else is computed behind the rows
        let root = pass.body.last().copied()?;
        let (out, sums) = match *roots {
            [a] if a == root => (0, None),
            [sum, a] if a == root && sum != root => (1, Some(sum)),
            [a, sum] if a == root && sum != root => (0, Some(sum)),
            _ => return None,
        };
        let at = |r: Reg| alias.get(usize::from(r.0)).copied().unwrap_or(0);
        let instr = |i: usize| program.instrs.get(i).copied();
        // an input that is read in place
        let input = |i: usize| match instr(i)? {
            Instr::Load { input } if facts.borrowed.has(usize::from(input)) => Some(usize::from(input)),
            _ => None,
        };
        let mut steps = Vec::new();
        for &i in &pass.body {
            if input(i).is_none() {
                steps.push((i, instr(i)?, pass.fused.get(i).copied().flatten()));
            }
        }
        let mut steps = steps.as_slice();
        // the register that is summed up first, or read: what stands before it is added up for it
        let mut source = Source::new();
        let mut x = None;
        while let [(i, Instr::Binary(B::Add, a, b), None), rest @ ..] = steps {
            if kinds.get(*i) != Some(&Kind::Vec) || source.len() == ADDENDS {
                return None;
            }
            match x {
                None => source.extend([input(at(*a))?, input(at(*b))?]),
                Some(sum) if at(*a) == sum => source.push(input(at(*b))?),
                // the order of two addends changes no bit of a number
                Some(sum) if at(*b) == sum => source.push(input(at(*a))?),
                Some(_) => return None,
            }
            (x, steps) = (Some(*i), rest);
        }
        let x = match (x, steps) {
            (Some(x), _) => x,
            (None, [(_, Instr::Reduce(_, x), None), ..] | [(_, _, Some(Fused::Squares { x, .. })), ..]) => {
                source.push(input(at(*x))?);
                at(*x)
            }
            _ => return None,
        };
        // of sums only the last is kept
        if sums.is_some_and(|sum| sum != x || source.len() < 2) {
            return None;
        }
        let what = match *steps {
            [(max, Instr::Reduce(ReduceFn::Max, a), None), (e, _, Some(Fused::ShiftedExp { x: b, shift })), (sum, Instr::Reduce(ReduceFn::Sum, c), None), (q, Instr::Binary(B::Quotient, d, by), None)]
                if at(a) == x
                    && at(b) == x
                    && at(shift) == max
                    && at(c) == e
                    && at(d) == e
                    && at(by) == sum
                    && q == root =>
            {
                What::Softmax { x: source }
            }
            [ref mean @ .., (squares, _, Some(Fused::Squares { x: a, shift: around })), (root_mean, Instr::RootMean { sum, eps }, None), (y, _, Some(Fused::Normal { x: b, shift, root: by, weight, bias }))]
                if at(a) == x
                    && at(b) == x
                    && at(sum) == squares
                    && at(by) == root_mean
                    && y == root
                    && around.map(at) == shift.map(at) =>
            {
                let mean = match *mean {
                    [] => None,
                    [(sum, Instr::Reduce(ReduceFn::Sum, c), None), (m, Instr::Binary(B::Div, d, n), None)]
                        if at(c) == x && at(d) == sum && instr(at(n)) == Some(Instr::RowLen) =>
                    {
                        Some(m)
                    }
                    _ => return None,
                };
                let of = |r: Option<Reg>| match r {
                    None => Some(None),
                    Some(r) => input(at(r)).map(Some),
                };
                let (weight, bias) = (of(weight)?, of(bias)?);
                if mean != shift.map(at) {
                    return None;
                }
                What::Norm { x: source, centred: mean.is_some(), eps, weight, bias }
            }
            _ => return None,
        };
        Some(Self { what, out })
    }
}

/// Rows of one run of memory, `pitch` elements apart (0: the same one for all).
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) pitch: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    fn row(&self, r: usize, cols: usize) -> &'a [T] {
        let from = r * self.pitch;
        // the row behind the last one, which is asked for ahead, is not there
        self.data.get(from..from + cols).unwrap_or_default()
    }
}

/// The elements of rows, which may be sums.
#[derive(Clone)]
pub(super) struct Elements<'a, T> {
    pub(super) x: Rows<'a, T>,
    /// What is added to them, one after the other.
    pub(super) plus: SmallVec<[Rows<'a, T>; ADDENDS - 1]>,
}

/// Where rows that are sums are added up.
pub(super) enum Room<'a, T> {
    /// They are none.
    None,
    /// In scratch, one behind another for as many as are needed at a time.
    Scratch(&'a mut [T]),
    /// Each in its own place, where it stays.
    Kept(&'a mut [T]),
}

impl<T> Room<'_, T> {
    /// That of row `r`, which is number `k` of those that are needed; empty where there is none.
    #[inline(always)]
    fn of(&mut self, r: usize, k: usize, cols: usize) -> &mut [T] {
        let (room, at) = match self {
            Self::None => return &mut [],
            Self::Scratch(room) => (room, k),
            Self::Kept(room) => (room, r),
        };
        room.get_mut(at * cols..(at + 1) * cols).unwrap_or_default()
    }
}

impl<'a, T: Real> Elements<'a, T> {
    /// Adds up row `r` in `room`, if its elements are sums.
    #[inline(always)]
    fn add(&self, r: usize, room: &mut [T]) {
        let Some((first, others)) = self.plus.split_first() else { return };
        let cols = room.len();
        sum_of(room, self.x.row(r, cols), first.row(r, cols), first.row(r + 1, cols));
        for plus in others {
            add_to(room, plus.row(r, cols), plus.row(r + 1, cols));
        }
    }

    /// Row `r`: as it lies, or as it was added up in `room`.
    #[inline(always)]
    fn row<'b>(&self, r: usize, cols: usize, room: &'b [T]) -> &'b [T]
    where
        'a: 'b,
    {
        if self.plus.is_empty() {
            self.x.row(r, cols)
        } else {
            room
        }
    }
}

/// `out[i] = x[i] + y[i]`; `next` is what is read next in the place of `y`.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // prefetching is for AVX-512 alone
fn sum_of<T: Real>(out: &mut [T], x: &[T], y: &[T], next: &[T]) {
    #[cfg(target_arch = "x86_64")]
    if wide::add(out, x, y, next) {
        return;
    }
    for ((sum, &x), &y) in out.iter_mut().zip(x).zip(y) {
        *sum = x + y;
    }
}

/// `out[i] = out[i] + y[i]`, likewise.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // as above
fn add_to<T: Real>(out: &mut [T], y: &[T], next: &[T]) {
    #[cfg(target_arch = "x86_64")]
    if wide::add_to(out, y, next) {
        return;
    }
    for (sum, &y) in out.iter_mut().zip(y) {
        *sum = *sum + y;
    }
}

versions! {
/// Softmax of rows of `cols` elements; scratch is of one row.
pub(super) fn softmax<T: Real>(of: &Elements<'_, T>, out: &mut [T], room: Room<'_, T>, cols: usize) = softmax_body;
}

#[inline(always)]
fn softmax_body<T: Real, const FMA: bool>(of: &Elements<'_, T>, out: &mut [T], mut room: Room<'_, T>, cols: usize) {
    for (r, out) in out.chunks_exact_mut(cols.max(1)).enumerate() {
        let room = room.of(r, 0, cols);
        of.add(r, room);
        let x = of.row(r, cols, room);
        let shift = max_of_row(x);
        exp_row::<T, FMA>(out, x, shift);
        let sum = sum_of_row(out, None);
        match reciprocal::<T, FMA>(sum) {
            Some((high, low)) => scale::<T, FMA>(out, high, low),
            None => out.iter_mut().for_each(|x| *x = *x / sum),
        }
        if let (true, Some(last)) = (fault::active("row.whole.softmax"), out.last_mut()) {
            *last = fault::nudged(*last);
        }
    }
}

/// `x[i] = x[i]·(high + low)`
#[inline(always)]
fn scale<T: Real, const FMA: bool>(x: &mut [T], high: T, low: T) {
    #[cfg(target_arch = "x86_64")]
    if wide::scale_in_place(x, high, low) {
        return;
    }
    for x in x {
        *x = Scale::<T, FMA> { high, low }.call(*x);
    }
}

/// What [`norm`] does beside its elements.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a, T> {
    pub(super) centred: bool,
    /// The length of a row of the program, and the number beside the mean of the squares.
    pub(super) n: f64,
    pub(super) eps: f64,
    pub(super) weight: Option<Rows<'a, T>>,
    pub(super) bias: Option<Rows<'a, T>>,
}

versions! {
/// Norms of rows of `cols` elements; scratch is of [`STEPS`] rows.
pub(super) fn norm<T: Real>(of: &Elements<'_, T>, norm: Norm<'_, T>, out: &mut [T], room: Room<'_, T>, cols: usize) = norm_body;
}

#[inline(always)]
fn norm_body<T: Real, const FMA: bool>(
    of: &Elements<'_, T>,
    norm: Norm<'_, T>,
    out: &mut [T],
    mut room: Room<'_, T>,
    cols: usize,
) {
    let cols = cols.max(1);
    let rows = out.len() / cols;
    // Each row goes through three steps, and rows follow one another at a step's distance: the numbers that a row waits for at the end of a sum
    // come while another row is read. (No closures: they would not be compiled for the instruction set.)
    let mut shift = [T::ZERO; STEPS];
    let mut root = [T::ZERO; STEPS];
    // where the row of each step has its numbers
    let [mut first, mut second, mut third] = [0, 2, 1];
    for r in 0..rows + 2 {
        if r < rows {
            of.add(r, room.of(r, first, cols));
            if norm.centred {
                let x = of.row(r, cols, room.of(r, first, cols));
                shift[first] = sum_of_row(x, None) / T::from_f64(norm.n);
            }
        }
        if (1..=rows).contains(&r) {
            let x = of.row(r - 1, cols, room.of(r - 1, second, cols));
            let squares = sum_of_row(x, Some(shift[second]));
            root[second] = RootMean { n: norm.n, eps: norm.eps }.call(squares);
        }
        if let Some(done) = r.checked_sub(2) {
            let mut operands = Operands { x: of.row(done, cols, room.of(done, third, cols)), weight: None, bias: None };
            if let Some(rows) = &norm.weight {
                operands.weight = Some(rows.row(done, cols));
            }
            if let Some(rows) = &norm.bias {
                operands.bias = Some(rows.row(done, cols));
            }
            let out = &mut out[done * cols..][..cols];
            normal_of::<T, FMA>(out, &operands, shift[third], root[third], of.x.row(r + 1, cols));
            if let (true, Some(last)) = (fault::active("row.whole.norm"), out.last_mut()) {
                *last = fault::nudged(*last);
            }
        }
        (first, second, third) = (third, first, second);
    }
}
