//! Instructions that one loop does together, so that nothing is stored between them.
//!
//! The operations and their roundings stay those of the instructions one by one.

use super::program::{BinaryFn as B, Instr, Kind, ReduceFn, Reg, RowProgram, UnaryFn as U};

/// What is done in the place of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fused {
    /// Nothing: others do its work.
    Absorbed,
    /// Σ(x − shift)² over the row.
    Squares { x: Reg, shift: Option<Reg> },
    /// e^(x − shift).
    ShiftedExp { x: Reg, shift: Reg },
    /// x·mul + add with the same two numbers for all elements.
    Affine { x: Reg, mul: Reg, add: Reg },
    /// (x − shift) / root · weight + bias.
    Normal { x: Reg, shift: Option<Reg>, root: Reg, weight: Option<Reg>, bias: Option<Reg> },
}

impl Fused {
    /// Calls `f` with each register that is read.
    pub(crate) fn each_arg(&self, mut f: impl FnMut(Reg)) {
        match *self {
            Self::Absorbed => {}
            Self::Squares { x, shift } => [Some(x), shift].into_iter().flatten().for_each(f),
            Self::ShiftedExp { x, shift } => {
                f(x);
                f(shift);
            }
            Self::Affine { x, mul, add } => [x, mul, add].into_iter().for_each(f),
            Self::Normal { x, shift, root, weight, bias } => {
                [Some(x), shift, Some(root), weight, bias].into_iter().flatten().for_each(f);
            }
        }
    }
}

/// The instructions of a pass, as far as fusing needs to know.
struct Body<'a> {
    program: &'a RowProgram,
    kinds: &'a [Kind],
    alias: &'a [usize],
    /// Who reads each register in this pass, and whether it is stored.
    readers: Vec<Vec<usize>>,
    stored: Vec<bool>,
}

impl Body<'_> {
    fn root(&self, r: Reg) -> usize {
        self.alias.get(usize::from(r.0)).copied().unwrap_or(0)
    }

    fn instr(&self, i: usize) -> Instr {
        self.program.instrs[i]
    }

    fn is(&self, r: Reg, kind: Kind) -> bool {
        self.kinds[self.root(r)] == kind
    }

    /// The one reader of a value that nobody else sees.
    fn only_reader(&self, i: usize) -> Option<usize> {
        match self.readers[i].as_slice() {
            [reader] if !self.stored[i] => Some(*reader),
            _ => None,
        }
    }

    /// x and shift of a difference of elements and a number per row.
    fn shifted(&self, i: usize) -> Option<(Reg, Reg)> {
        match self.instr(i) {
            Instr::Binary(B::Sub, x, shift) if self.is(x, Kind::Vec) && self.is(shift, Kind::Row) => Some((x, shift)),
            _ => None,
        }
    }

    /// The square that a sum may take with it.
    fn square(&self, i: usize) -> Option<(usize, Reg)> {
        let Instr::Reduce(ReduceFn::Sum, a) = self.instr(i) else { return None };
        let a = self.root(a);
        match self.instr(a) {
            Instr::Unary(U::Sqr, x) if self.only_reader(a) == Some(i) && self.is(x, Kind::Vec) => Some((a, x)),
            _ => None,
        }
    }

    /// What reads `value` alone and is of `f` with another element.
    fn next(&self, f: B, value: usize) -> Option<(usize, Reg)> {
        let reader = self.only_reader(value)?;
        match self.instr(reader) {
            Instr::Binary(g, a, b) if g == f => {
                let other = if self.root(a) == value { b } else { a };
                (self.root(other) != value && self.is(other, Kind::Vec)).then_some((reader, other))
            }
            _ => None,
        }
    }

    /// The product that a sum may take with it, where both have a number for all elements: `(product, x, mul, add)`.
    fn affine(&self, i: usize) -> Option<(usize, Reg, Reg, Reg)> {
        let sides = |i: usize, f: B| match self.instr(i) {
            Instr::Binary(g, a, b) if g == f && self.is(a, Kind::Vec) && self.is(b, Kind::Const) => Some((a, b)),
            Instr::Binary(g, a, b) if g == f && self.is(b, Kind::Vec) && self.is(a, Kind::Const) => Some((b, a)),
            _ => None,
        };
        let (product, add) = sides(i, B::Add)?;
        let product = self.root(product);
        let (x, mul) = sides(product, B::Mul)?;
        (self.only_reader(product) == Some(i)).then_some((product, x, mul, add))
    }

    fn is_quotient(&self, i: usize) -> bool {
        matches!(self.instr(i), Instr::Binary(B::Quotient, x, d) if self.is(x, Kind::Vec) && self.is(d, Kind::Row))
    }

    /// A difference that all readers can form themselves.
    fn gone(&self, i: usize) -> Option<(Reg, Reg)> {
        let parts = self.shifted(i)?;
        let takes = |&reader: &usize| match self.instr(reader) {
            Instr::Unary(U::Exp, _) => true,
            Instr::Unary(U::Sqr, _) => {
                self.only_reader(reader).is_some_and(|sum| self.square(sum).is_some_and(|(square, _)| square == reader))
            }
            Instr::Binary(B::Quotient, x, d) => self.is_quotient(reader) && self.root(x) == i && self.root(d) != i,
            _ => false,
        };
        (!self.stored[i] && self.readers[i].iter().all(takes)).then_some(parts)
    }

    /// `x` itself, or what it is the difference of.
    fn source(&self, x: Reg) -> (Reg, Option<Reg>) {
        match self.gone(self.root(x)) {
            Some((x, shift)) => (x, Some(shift)),
            None => (x, None),
        }
    }
}

/// What is done for each instruction of a pass's body, `None` where it is the instruction itself. `by_rows`: whether the tile's rows are rows
/// of the program and lie one behind the other, so that a loop may take a number per row.
pub(crate) fn fuse(
    program: &RowProgram,
    kinds: &[Kind],
    alias: &[usize],
    body: &[usize],
    stores: impl Iterator<Item = usize>,
    by_rows: bool,
) -> Vec<Option<Fused>> {
    let n = program.instrs.len();
    let mut this = Body { program, kinds, alias, readers: vec![Vec::new(); n], stored: vec![false; n] };
    for i in stores {
        this.stored[i] = true;
    }
    for &i in body {
        program.instrs[i].each_arg(|r| {
            let a = alias.get(usize::from(r.0)).copied().unwrap_or(0);
            if !this.readers[a].contains(&i) {
                this.readers[a].push(i);
            }
        });
    }
    let mut fused = vec![None; n];
    if by_rows {
        with_rows(&this, body, &mut fused);
    }
    for &i in body.iter().filter(|&&i| kinds[i] == Kind::Vec) {
        if let Some((product, x, mul, add)) = this.affine(i) {
            if fused[i].is_none() && fused[product].is_none() {
                fused[product] = Some(Fused::Absorbed);
                fused[i] = Some(Fused::Affine { x, mul, add });
            }
        }
    }
    fused
}

/// What takes numbers per row.
fn with_rows(this: &Body<'_>, body: &[usize], fused: &mut [Option<Fused>]) {
    let kinds = this.kinds;
    for &i in body {
        if let (Kind::Row, Some((square, x))) = (kinds[i], this.square(i)) {
            let (x, shift) = this.source(x);
            fused[square] = Some(Fused::Absorbed);
            fused[i] = Some(Fused::Squares { x, shift });
            continue;
        }
        if kinds[i] != Kind::Vec {
            continue;
        }
        match this.instr(i) {
            Instr::Unary(U::Exp, x) => {
                if let Some((x, shift)) = this.gone(this.root(x)) {
                    fused[i] = Some(Fused::ShiftedExp { x, shift });
                }
            }
            Instr::Binary(B::Quotient, x, root) if this.is_quotient(i) => {
                let (x, shift) = this.source(x);
                let (mut end, mut weight, mut bias) = (i, None, None);
                // a product of two quotients belongs to the first
                let free = |next: &(usize, Reg)| fused[next.0].is_none();
                if let Some((next, w)) = this.next(B::Mul, end).filter(free) {
                    (end, weight) = (next, Some(w));
                    if let Some((next, b)) = this.next(B::Add, end).filter(free) {
                        fused[end] = Some(Fused::Absorbed);
                        (end, bias) = (next, Some(b));
                    }
                }
                if end != i {
                    fused[i] = Some(Fused::Absorbed);
                }
                if end != i || shift.is_some() {
                    fused[end] = Some(Fused::Normal { x, shift, root, weight, bias });
                }
            }
            _ => {}
        }
    }
    for &i in body {
        if kinds[i] == Kind::Vec && !this.readers[i].is_empty() && this.gone(i).is_some() {
            fused[i] = Some(Fused::Absorbed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::emit;
    use super::super::program::{kinds, Builder, Class};
    use super::*;
    use crate::simd::tests::with_each;
    use crate::view::{Slice, SliceMut, Strided, View};
    use candle_core::DType;

    fn fused(make: impl Fn(&mut Builder)) -> Vec<Option<Fused>> {
        let mut b = RowProgram::builder(Class::F32);
        make(&mut b);
        let program = b.finish().unwrap();
        let n = program.instrs.len();
        let alias: Vec<usize> = (0..n).collect();
        let kinds = kinds(&program.instrs).unwrap();
        let roots: Vec<usize> = program.outputs.iter().map(|(r, _)| usize::from(r.0)).collect();
        let body: Vec<usize> = (0..n).filter(|&i| kinds[i] != Kind::Const).collect();
        fuse(&program, &kinds, &alias, &body, roots.into_iter(), true)
    }

    fn count(fused: &[Option<Fused>]) -> (usize, usize) {
        let absorbed = fused.iter().filter(|f| matches!(f, Some(Fused::Absorbed))).count();
        (absorbed, fused.iter().flatten().count() - absorbed)
    }

    #[test]
    fn norms_and_softmax_keep_no_value_between_their_loops() {
        let layer_norm = fused(|b| {
            let (x, w, bias) = (b.load(0), b.load(1), b.load(2));
            let y = emit::layer_norm(b, x, Some(w), Some(bias), 0).unwrap();
            b.output(y, DType::F32);
        });
        // the difference, the square, the quotient, the product
        assert_eq!(count(&layer_norm), (4, 2), "{layer_norm:?}");
        let rms = fused(|b| {
            let (x, w) = (b.load(0), b.load(1));
            let y = emit::rms_norm(b, x, Some(w), 0).unwrap();
            b.output(y, DType::F32);
        });
        assert_eq!(count(&rms), (2, 2), "{rms:?}");
        let softmax = fused(|b| {
            let x = b.load(0);
            let y = emit::softmax(b, x).unwrap();
            b.output(y, DType::F32);
        });
        assert_eq!(count(&softmax), (1, 1), "{softmax:?}");
    }

    #[test]
    fn what_somebody_else_reads_is_kept() {
        // the difference is an output too
        let shown = fused(|b| {
            let x = b.load(0);
            let max = b.reduce(ReduceFn::Max, x);
            let shifted = b.binary(B::Sub, x, max);
            let e = b.unary(U::Exp, shifted);
            b.output(e, DType::F32);
            b.output(shifted, DType::F32);
        });
        assert_eq!(count(&shown), (0, 0), "{shown:?}");
        // log-softmax reads the difference after its sum
        let log = fused(|b| {
            let x = b.load(0);
            let y = emit::log_softmax(b, x).unwrap();
            b.output(y, DType::F32);
        });
        assert_eq!(count(&log), (0, 0), "{log:?}");
        // a product of two quotients: one takes it, the other is stored
        let both = fused(|b| {
            let (x, w) = (b.load(0), b.load(1));
            let (p, q) = (emit::rms_norm(b, x, None, 0).unwrap(), emit::rms_norm(b, w, None, 0).unwrap());
            let y = b.binary(B::Mul, p, q);
            b.output(y, DType::F32);
        });
        assert_eq!(count(&both), (3, 3), "{both:?}");
        // the square has a second reader
        let twice = fused(|b| {
            let x = b.load(0);
            let square = b.unary(U::Sqr, x);
            let sum = b.reduce(ReduceFn::Sum, square);
            let y = b.binary(B::Mul, square, sum);
            b.output(y, DType::F32);
        });
        assert_eq!(count(&twice), (0, 0), "{twice:?}");
    }

    /// The program's first output for inputs x, w, b of `rows` rows.
    fn run(program: &RowProgram, rows: usize, cols: usize, inputs: &[Vec<f32>]) -> Vec<u32> {
        let dims = [rows, cols];
        let views: Vec<View<'_>> = inputs
            .iter()
            .map(|data| {
                let dense = Strided::contiguous(&[data.len() / cols.max(1), cols]);
                View { data: Slice::F32(data), layout: dense.broadcast_to(&dims).unwrap() }
            })
            .collect();
        let mut out = vec![vec![7f32; rows * cols]; program.outputs.len()];
        let mut outs: Vec<SliceMut<'_>> = out.iter_mut().map(|o| SliceMut::F32(o)).collect();
        program.run(&dims, 2, &views, &[1e-5], &mut outs).unwrap();
        // which of the NaNs it is nobody says
        out[0].iter().map(|v| if v.is_nan() { f32::NAN } else { *v }.to_bits()).collect()
    }

    /// Element `j` of a row that no ordinary data has, `x` in most places.
    fn unusual(row: usize, j: usize, x: f32) -> f32 {
        match (row, j) {
            (0, 0) | (1, 3) => f32::NAN,
            (2, _) => f32::NEG_INFINITY,
            (3, 1) => f32::INFINITY,
            (4, _) => [0.0, -0.0][j % 2],
            (5, _) => x * 1e-32,
            (6, _) => x * 1e17,
            // what one addition rounds away, seven make good
            (_, 0) => 4096.0,
            (_, _) => f32::from(u8::from(j.is_multiple_of(1024))),
        }
    }

    #[test]
    fn fused_or_not_the_bits_are_the_same() {
        type Make = fn(&mut Builder) -> (Reg, Vec<Reg>);
        // with every intermediate value as an output nothing can be fused
        let makes: [(usize, Make); 8] = [
            (3, |b| {
                let (x, more, w) = (b.load(0), b.load(1), b.load(2));
                let sum = b.binary(B::Add, x, more);
                let x = b.binary(B::Add, w, sum);
                let mean = b.reduce(ReduceFn::Sum, x);
                let n = b.row_len();
                let mean = b.binary(B::Div, mean, n);
                let centred = b.binary(B::Sub, x, mean);
                let sqr = b.unary(U::Sqr, centred);
                let squares = b.reduce(ReduceFn::Sum, sqr);
                let root = b.root_mean(squares, 0);
                let q = b.binary(B::Quotient, centred, root);
                (b.binary(B::Mul, q, w), vec![sum, x, centred, sqr, q])
            }),
            (2, |b| {
                let (x, more) = (b.load(0), b.load(1));
                let x = b.binary(B::Add, x, more);
                let max = b.reduce(ReduceFn::Max, x);
                let shifted = b.binary(B::Sub, x, max);
                let e = b.unary(U::Exp, shifted);
                let sum = b.reduce(ReduceFn::Sum, e);
                (b.binary(B::Quotient, e, sum), vec![x, shifted, e])
            }),
            (3, |b| {
                let (x, more, w) = (b.load(0), b.load(1), b.load(2));
                let x = b.binary(B::Add, x, more);
                let sqr = b.unary(U::Sqr, x);
                let sum = b.reduce(ReduceFn::Sum, sqr);
                let root = b.root_mean(sum, 0);
                let q = b.binary(B::Quotient, x, root);
                (b.binary(B::Mul, q, w), vec![x, sqr, q])
            }),
            (2, |b| {
                let (x, w) = (b.load(0), b.load(1));
                let mul = b.param(0);
                let add = b.unary(U::Neg, mul);
                let scaled = b.binary(B::Mul, mul, x);
                let moved = b.binary(B::Add, add, scaled);
                let product = b.binary(B::Mul, moved, w);
                let again = b.binary(B::Mul, product, mul);
                (b.binary(B::Add, again, mul), vec![scaled, moved, product, again])
            }),
            (1, |b| {
                let x = b.load(0);
                let max = b.reduce(ReduceFn::Max, x);
                let shifted = b.binary(B::Sub, x, max);
                let e = b.unary(U::Exp, shifted);
                let sum = b.reduce(ReduceFn::Sum, e);
                (b.binary(B::Quotient, e, sum), vec![shifted, e])
            }),
            (2, |b| {
                let (x, w) = (b.load(0), b.load(1));
                let sqr = b.unary(U::Sqr, x);
                let sum = b.reduce(ReduceFn::Sum, sqr);
                let root = b.root_mean(sum, 0);
                let q = b.binary(B::Quotient, x, root);
                (b.binary(B::Mul, w, q), vec![sqr, q])
            }),
            (3, |b| {
                let (x, w, bias) = (b.load(0), b.load(1), b.load(2));
                let mean = emit::mean(b, x);
                let centred = b.binary(B::Sub, x, mean);
                let sqr = b.unary(U::Sqr, centred);
                let sum = b.reduce(ReduceFn::Sum, sqr);
                let root = b.root_mean(sum, 0);
                let q = b.binary(B::Quotient, centred, root);
                let product = b.binary(B::Mul, q, w);
                (b.binary(B::Add, product, bias), vec![centred, sqr, q, product])
            }),
            (1, |b| {
                let x = b.load(0);
                let mean = emit::mean(b, x);
                let centred = b.binary(B::Sub, x, mean);
                let sqr = b.unary(U::Sqr, centred);
                let sum = b.reduce(ReduceFn::Sum, sqr);
                let root = b.root_mean(sum, 0);
                (b.binary(B::Quotient, centred, root), vec![centred, sqr])
            }),
        ];
        for (inputs, make) in makes {
            let program = |all: bool| {
                let mut b = RowProgram::builder(Class::F32);
                let params = b.param(0);
                let (y, inner) = make(&mut b);
                let _ = params;
                b.output(y, DType::F32);
                for r in inner.into_iter().filter(|_| all) {
                    b.output(r, DType::F32);
                }
                b.finish().unwrap()
            };
            let sizes = [(1, 1), (3, 5), (2, 17), (7, 100), (5, 1024), (3, 1300), (2, 2048), (4, 5000), (2, 9000)];
            for (special, (rows, cols)) in sizes.into_iter().flat_map(|size| [(false, size), (true, size)]) {
                let data: Vec<Vec<f32>> = (0..inputs)
                    .map(|k| {
                        let count = if k == 0 { rows * cols } else { cols };
                        let number = |i: usize| ((i * 37 + k * 101) % 127) as f32 / 31.0 - 2.0;
                        let ordinary = (0..count).map(number);
                        if special && k == 0 {
                            ordinary.enumerate().map(|(i, x)| unusual(i / cols, i % cols, x)).collect()
                        } else {
                            ordinary.collect()
                        }
                    })
                    .collect();
                with_each(|isa| {
                    let (fused, plain) =
                        (run(&program(false), rows, cols, &data), run(&program(true), rows, cols, &data));
                    assert!(fused == plain, "{isa:?} {rows}x{cols} with {inputs} inputs");
                });
            }
        }
    }
}
