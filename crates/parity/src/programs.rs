//! Small graphs with a name: what passes, fusion and planning can get wrong, one thing each.
//!
//! A program is judged like a random graph: evaluated and replayed it is measured by eager Candle and f64, in every other mode by the bits
//! without passes.

use crate::case::{Domain, InputSpec, Layout};
use crate::modes::{Cell, Mode, Outcome};
use crate::random::{check_gradients, check_numbers, check_options, check_together, Known, Program, Step};
use crate::Result;
use candle_core::DType;
use candle_lazy_exec::EvalOptions;
use candle_lazy_graph::{infer, BinaryOp, CmpOp, Dims, Meta, Op, ReduceOp, UnaryOp};

/// A program and what it is about.
#[derive(Debug, Clone)]
pub struct Named {
    /// What it is about.
    pub name: &'static str,
    /// The graph.
    pub program: Program,
}

/// A program as it is written down.
struct Draft {
    program: Program,
}

type At = usize;

impl Draft {
    fn leaf(&mut self, dims: &[usize]) -> At {
        self.leaf_in(dims, Layout::Contiguous)
    }

    fn leaf_in(&mut self, dims: &[usize], layout: Layout) -> At {
        let dtype = self.program.dtype;
        self.program.steps.push(Step::Leaf(InputSpec::new(dims, dtype, layout, Domain::Any)));
        self.program.known.push(Known { dims: dims.to_vec(), dtype, low: -2.0, high: 2.0, exact: true });
        self.program.steps.len() - 1
    }

    fn op(&mut self, op: Op, scalars: &[f64], inputs: &[At]) -> Result<At> {
        let known = &self.program.known;
        let metas: Vec<Meta<'_>> =
            inputs.iter().map(|&i| Meta { dims: &known[i].dims, dtype: known[i].dtype }).collect();
        let out = infer(&op, &metas)?;
        let known = Known { dims: out.dims.to_vec(), dtype: out.dtype, low: 0.0, high: 0.0, exact: true };
        self.program.known.push(known);
        self.program.steps.push(Step::Op { op, scalars: scalars.to_vec(), inputs: inputs.to_vec() });
        Ok(self.program.steps.len() - 1)
    }

    fn unary(&mut self, f: UnaryOp, x: At) -> Result<At> {
        self.op(Op::Unary(f), &[], &[x])
    }

    fn binary(&mut self, f: BinaryOp, a: At, b: At) -> Result<At> {
        self.op(Op::Binary(f), &[], &[a, b])
    }

    fn affine(&mut self, x: At, mul: f64, add: f64) -> Result<At> {
        self.op(Op::Affine, &[mul, add], &[x])
    }

    fn reduce(&mut self, op: ReduceOp, x: At, axes: u32, keepdim: bool) -> Result<At> {
        self.op(Op::Reduce { op, axes, keepdim }, &[], &[x])
    }

    fn permute(&mut self, x: At, perm: &[u8]) -> Result<At> {
        self.op(Op::Permute { perm: perm.iter().copied().collect() }, &[], &[x])
    }

    fn narrow(&mut self, x: At, dim: u8, start: usize, len: usize) -> Result<At> {
        self.op(Op::Narrow { dim, start, len }, &[], &[x])
    }

    fn reshape(&mut self, x: At, dims: &[usize]) -> Result<At> {
        self.op(Op::Reshape { shape: Dims::from_slice(dims) }, &[], &[x])
    }

    fn softmax(&mut self, x: At, dim: u8) -> Result<At> {
        self.op(Op::Softmax { dim }, &[], &[x])
    }
}

/// Writes one program: its graph, and the roots.
type Write = fn(&mut Draft) -> Result<Vec<At>>;

use BinaryOp::{Add, Div, Mul, Sub};
use UnaryOp::{Exp, Gelu, Neg, Sigmoid, Silu, Sqr, Tanh};

const PROGRAMS: &[(&str, Write)] = &[
    ("a bias and an activation", |d| {
        let (x, w, b) = (d.leaf(&[2, 3, 8]), d.leaf(&[5, 8]), d.leaf(&[5]));
        let y = d.op(Op::Linear { bias: true }, &[], &[x, w, b])?;
        let y = d.unary(Gelu, y)?;
        Ok(vec![d.reduce(ReduceOp::Sum, y, 0b100, true)?])
    }),
    ("permutes that undo one another", |d| {
        let x = d.leaf(&[4, 4, 3]);
        let once = d.permute(x, &[1, 0, 2])?;
        let twice = d.permute(once, &[1, 0, 2])?;
        Ok(vec![d.affine(twice, 2.0, 0.0)?, d.affine(once, 3.0, 0.0)?])
    }),
    ("a cast down and up", |d| {
        let x = d.leaf(&[3, 7]);
        let to = if d.program.dtype == DType::F16 { DType::BF16 } else { DType::F16 };
        let y = d.affine(x, 1.1, 0.3)?;
        let y = d.op(Op::Cast(to), &[], &[y])?;
        let y = d.op(Op::Cast(d.program.dtype), &[], &[y])?;
        Ok(vec![d.unary(Neg, y)?])
    }),
    ("two scalars", |d| {
        let x = d.leaf(&[3, 5]);
        let (a, b) = (d.affine(x, 1.5, 0.0)?, d.affine(x, 2.5, 0.5)?);
        Ok(vec![d.binary(Mul, a, b)?, a])
    }),
    ("four scalars of one chain", |d| {
        let x = d.leaf(&[3, 5]);
        let y = d.affine(x, 2.0, 1.0)?;
        let y = d.unary(Tanh, y)?;
        Ok(vec![d.affine(y, 3.0, -4.0)?])
    }),
    ("two ranges of one tensor", |d| {
        let x = d.leaf(&[6, 3]);
        let (a, b) = (d.narrow(x, 0, 0, 3)?, d.narrow(x, 0, 3, 3)?);
        Ok(vec![d.binary(Sub, a, b)?])
    }),
    ("a difference both ways", |d| {
        let (a, b) = (d.leaf(&[3, 4]), d.leaf(&[3, 4]));
        Ok(vec![d.binary(Sub, a, b)?, d.binary(Sub, b, a)?])
    }),
    ("two leaves of one shape", |d| {
        let (a, b) = (d.leaf(&[3, 4]), d.leaf(&[3, 4]));
        let y = d.affine(a, 2.0, 0.0)?;
        Ok(vec![d.binary(Sub, y, b)?])
    }),
    ("leaves of one shape in three layouts", |d| {
        let (a, b) = (d.leaf_in(&[4, 4], Layout::Transposed), d.leaf_in(&[4, 4], Layout::Narrowed));
        let c = d.leaf_in(&[4, 4], Layout::Stepped);
        let y = d.binary(Sub, a, b)?;
        Ok(vec![d.binary(Div, c, y)?, d.op(Op::Matmul, &[], &[a, b])?])
    }),
    ("a sum and its norm", |d| {
        let (x, y, w) = (d.leaf(&[5, 40]), d.leaf(&[5, 40]), d.leaf(&[40]));
        let sum = d.binary(Add, x, y)?;
        Ok(vec![d.op(Op::RmsNorm { weight: true }, &[1e-5], &[sum, w])?, sum])
    }),
    ("a sum of three and its softmax", |d| {
        let (x, y, z) = (d.leaf(&[5, 40]), d.leaf(&[5, 40]), d.leaf(&[5, 40]));
        let sum = d.binary(Add, x, y)?;
        let sum = d.binary(Add, z, sum)?;
        Ok(vec![sum, d.softmax(sum, 1)?])
    }),
    ("softmax over two dims", |d| {
        let (x, y) = (d.leaf(&[4, 4]), d.leaf(&[4, 4]));
        let (a, b) = (d.softmax(x, 0)?, d.softmax(y, 1)?);
        Ok(vec![d.binary(Add, a, b)?])
    }),
    ("softmax of a softmax over the other dim", |d| {
        let x = d.leaf(&[4, 4]);
        let y = d.softmax(x, 1)?;
        Ok(vec![d.softmax(y, 0)?, d.softmax(x, 0)?])
    }),
    ("a sum without its dim, read beside what was summed", |d| {
        let x = d.leaf(&[4, 4]);
        let y = d.unary(Exp, x)?;
        let s = d.reduce(ReduceOp::Sum, y, 0b10, false)?;
        Ok(vec![d.binary(Add, y, s)?])
    }),
    ("a sum without its dim, read by another group", |d| {
        let (x, z) = (d.leaf(&[4, 4]), d.leaf(&[4, 4]));
        let s = d.reduce(ReduceOp::Sum, x, 0b10, false)?;
        let e = d.unary(Exp, z)?;
        Ok(vec![d.binary(Mul, e, s)?])
    }),
    ("another group reads a sum without its dim", |d| {
        let (x, z) = (d.leaf(&[4, 4]), d.leaf(&[4, 4]));
        let e = d.unary(Exp, z)?;
        let s = d.reduce(ReduceOp::Sum, x, 0b10, false)?;
        Ok(vec![d.binary(Mul, s, e)?])
    }),
    ("a number per row", |d| {
        let (x, c) = (d.leaf(&[4, 6]), d.leaf(&[4, 1]));
        let y = d.binary(Mul, x, c)?;
        let m = d.reduce(ReduceOp::Mean, y, 0b10, true)?;
        Ok(vec![d.binary(Sub, y, m)?])
    }),
    ("a sum of a sum over one element", |d| {
        let x = d.leaf(&[3, 1]);
        let s = d.reduce(ReduceOp::Sum, x, 0b10, true)?;
        let s = d.unary(Neg, s)?;
        Ok(vec![d.reduce(ReduceOp::Max, s, 0b10, true)?])
    }),
    ("a product between two uses", |d| {
        let (x, w) = (d.leaf(&[4, 4]), d.leaf(&[4, 4]));
        let e = d.unary(Tanh, x)?;
        let p = d.op(Op::Matmul, &[], &[e, w])?;
        Ok(vec![d.binary(Add, p, e)?])
    }),
    ("a group that grew by what depends on another", |d| {
        let (x, y) = (d.leaf(&[8, 8]), d.leaf(&[8, 1]));
        let a = d.unary(Sqr, x)?;
        let part = d.narrow(a, 1, 0, 1)?;
        let root = d.softmax(part, 1)?;
        let b = d.unary(Tanh, y)?;
        let one = d.narrow(b, 0, 0, 1)?;
        // joins the group of `a`, which depends on that of `b` from now on
        let late = d.binary(Sub, a, one)?;
        let c = d.op(Op::CompareScalar(CmpOp::Ge), &[0.25], &[part])?;
        // may not join the group of `b`: it depends on that of `a`
        Ok(vec![root, late, d.op(Op::Where, &[], &[c, b, root])?])
    }),
    ("a small domain joined by a large one", |d| {
        let (a, b) = (d.leaf(&[1, 5]), d.leaf(&[3, 5]));
        let e = d.unary(Exp, a)?;
        Ok(vec![d.binary(Add, e, b)?])
    }),
    ("all stages of a softmax are wanted", |d| {
        let x = d.leaf(&[3, 9]);
        let e = d.unary(Exp, x)?;
        let s = d.reduce(ReduceOp::Sum, e, 0b10, true)?;
        Ok(vec![e, s, d.binary(Div, e, s)?])
    }),
    ("one input twice", |d| {
        let (a, b) = (d.leaf(&[3, 5]), d.leaf(&[3, 5]));
        let y = d.binary(Mul, a, b)?;
        Ok(vec![d.binary(Sub, y, a)?])
    }),
    ("a weight that every row shares", |d| {
        let (x, w) = (d.leaf(&[4, 6]), d.leaf(&[6]));
        let y = d.binary(Mul, x, w)?;
        let s = d.reduce(ReduceOp::Mean, y, 0b10, true)?;
        let y = d.binary(Sub, y, s)?;
        Ok(vec![d.binary(Mul, y, w)?])
    }),
    ("a value written into and read later", |d| {
        let (x, part) = (d.leaf(&[4, 3]), d.leaf(&[2, 3]));
        let y = d.unary(Sqr, x)?;
        let z = d.op(Op::SliceAssign { dim: 0, start: 1 }, &[], &[y, part])?;
        let later = d.op(Op::Matmul, &[], &[y, part]).or_else(|_| d.affine(y, 1.0, 1.0))?;
        Ok(vec![z, later])
    }),
    ("a value written into for the last time", |d| {
        let (x, part) = (d.leaf(&[4, 3]), d.leaf(&[2, 3]));
        let y = d.unary(Sqr, x)?;
        Ok(vec![d.op(Op::SliceAssign { dim: 0, start: 2 }, &[], &[y, part])?])
    }),
    ("three parts of an intermediate", |d| {
        let (a, b, c) = (d.leaf(&[2, 3]), d.leaf(&[2, 2]), d.leaf(&[2, 4]));
        let (a, b) = (d.unary(Tanh, a)?, d.unary(Neg, b)?);
        Ok(vec![d.op(Op::Concat { dim: 1 }, &[], &[a, b, c])?])
    }),
    ("views of an intermediate", |d| {
        let x = d.leaf(&[2, 3, 4]);
        let y = d.unary(Tanh, x)?;
        let p = d.permute(y, &[2, 0, 1])?;
        let r = d.reshape(p, &[4, 6])?;
        let n = d.narrow(y, 2, 1, 2)?;
        Ok(vec![d.affine(r, 2.0, 0.0)?, d.affine(n, 3.0, 0.0)?, d.affine(p, 5.0, 0.0)?])
    }),
    ("roots that are views", |d| {
        let x = d.leaf(&[3, 3, 3]);
        let y = d.unary(Tanh, x)?;
        Ok(vec![d.permute(y, &[1, 2, 0])?, d.narrow(y, 1, 1, 2)?])
    }),
    ("a root that is a permuted intermediate", |d| {
        let x = d.leaf(&[3, 4]);
        let y = d.unary(Tanh, x)?;
        Ok(vec![d.permute(y, &[1, 0])?])
    }),
    ("views of a leaf", |d| {
        let x = d.leaf(&[4, 5, 3]);
        let (n, p) = (d.narrow(x, 1, 2, 3)?, d.permute(x, &[2, 0, 1])?);
        Ok(vec![d.unary(Tanh, n)?, d.unary(Neg, p)?])
    }),
    ("a long chain", |d| {
        let mut x = d.leaf(&[2, 7]);
        for i in 0..40 {
            x = if i % 2 == 0 { d.unary(Tanh, x)? } else { d.affine(x, 1.25, 0.125)? };
        }
        Ok(vec![x])
    }),
    ("products in a row", |d| {
        let mut x = d.leaf(&[3, 4]);
        for _ in 0..4 {
            let w = d.leaf(&[4, 4]);
            x = d.op(Op::Matmul, &[], &[x, w])?;
            x = d.unary(Tanh, x)?;
        }
        Ok(vec![x])
    }),
    ("a choice by comparison", |d| {
        let (a, b) = (d.leaf(&[3, 5]), d.leaf(&[5]));
        let c = d.op(Op::Compare(CmpOp::Lt), &[], &[a, b])?;
        let s = d.op(Op::CompareScalar(CmpOp::Gt), &[0.3], &[a])?;
        let y = d.op(Op::Where, &[], &[c, a, b])?;
        let n = d.unary(Neg, y)?;
        Ok(vec![d.op(Op::Where, &[], &[s, n, y])?])
    }),
    ("partial rotary embeddings", |d| {
        let (b, h, s, dim, rotary) = (2, 3, 5, 10, 6);
        let x = d.leaf(&[b, h, s, dim]);
        let (cos, sin) = (d.leaf(&[s, rotary / 2]), d.leaf(&[s, rotary / 2]));
        let (head, rest) = (d.narrow(x, 3, 0, rotary)?, d.narrow(x, 3, rotary, dim - rotary)?);
        let mut roots = Vec::new();
        for interleaved in [false, true] {
            let turned = d.op(Op::Rope { interleaved }, &[], &[head, cos, sin])?;
            roots.push(d.op(Op::Concat { dim: 3 }, &[], &[turned, rest])?);
        }
        Ok(roots)
    }),
    ("a transformer block", |d| {
        let (b, s, h, n) = (2, 3, 8, 2);
        let x = d.leaf(&[b, s, h]);
        let norm = d.leaf(&[h]);
        let y = d.op(Op::RmsNorm { weight: true }, &[1e-5], &[x, norm])?;
        let mut heads = Vec::new();
        for _ in 0..3 {
            let w = d.leaf(&[h, h]);
            let p = d.op(Op::Linear { bias: false }, &[], &[y, w])?;
            let p = d.reshape(p, &[b, s, n, h / n])?;
            heads.push(d.permute(p, &[0, 2, 1, 3])?);
        }
        let (cos, sin) = (d.leaf(&[s, h / n / 2]), d.leaf(&[s, h / n / 2]));
        let q = d.op(Op::Rope { interleaved: false }, &[], &[heads[0], cos, sin])?;
        let k = d.op(Op::Rope { interleaved: false }, &[], &[heads[1], cos, sin])?;
        let op = Op::Attention { mask: false, causal: true, softcap: false, window: None };
        let a = d.op(op, &[0.5], &[q, k, heads[2]])?;
        let a = d.permute(a, &[0, 2, 1, 3])?;
        let a = d.reshape(a, &[b, s, h])?;
        let x = d.binary(Add, x, a)?;
        let (up, gate) = (d.leaf(&[12, h]), d.leaf(&[12, h]));
        let (u, g) =
            (d.op(Op::Linear { bias: false }, &[], &[x, up])?, d.op(Op::Linear { bias: false }, &[], &[x, gate])?);
        let y = d.op(Op::Glu { act: Silu }, &[], &[g, u])?;
        Ok(vec![d.unary(Sigmoid, y)?, x])
    }),
    ("projections of one input", |d| {
        let (x, b) = (d.leaf(&[2, 3, 8]), d.leaf(&[6]));
        let (wq, wk, wv) = (d.leaf(&[6, 8]), d.leaf(&[4, 8]), d.leaf(&[8, 4]));
        let q = d.op(Op::Linear { bias: true }, &[], &[x, wq, b])?;
        let k = d.op(Op::Linear { bias: false }, &[], &[x, wk])?;
        let v = d.op(Op::Matmul, &[], &[x, wv])?;
        let (q, k) = (d.affine(q, 0.5, 0.25)?, d.reshape(k, &[2, 3, 2, 2])?);
        Ok(vec![q, d.permute(k, &[0, 2, 1, 3])?, v])
    }),
    ("a gated unit between products", |d| {
        let (x, w1, w2) = (d.leaf(&[2, 3, 8]), d.leaf(&[6, 8]), d.leaf(&[6, 8]));
        let (b, turned, down) = (d.leaf(&[6]), d.leaf(&[3, 2, 6]), d.leaf(&[5, 6]));
        let gate = d.op(Op::Linear { bias: false }, &[], &[x, w1])?;
        let up = d.op(Op::Linear { bias: true }, &[], &[x, w2, b])?;
        let h = d.op(Op::Glu { act: Silu }, &[], &[gate, up])?;
        let turned = d.permute(turned, &[1, 0, 2])?;
        let h = d.binary(Add, h, turned)?;
        Ok(vec![d.op(Op::Linear { bias: false }, &[], &[h, down])?])
    }),
    ("a product that two steps read", |d| {
        let (x, w) = (d.leaf(&[3, 8]), d.leaf(&[4, 8]));
        let p = d.op(Op::Linear { bias: false }, &[], &[x, w])?;
        let turned = d.permute(p, &[1, 0])?;
        Ok(vec![d.affine(p, 2.0, 1.0)?, d.unary(Neg, turned)?])
    }),
    ("products of two left sides in one sum", |d| {
        let (x, y, w1, w2) = (d.leaf(&[3, 8]), d.leaf(&[3, 8]), d.leaf(&[4, 8]), d.leaf(&[4, 8]));
        let a = d.op(Op::Linear { bias: false }, &[], &[x, w1])?;
        let b = d.op(Op::Linear { bias: false }, &[], &[y, w2])?;
        Ok(vec![d.binary(Sub, a, b)?])
    }),
    ("a product that waits for another of its input", |d| {
        let (x, w1, w2, w3) = (d.leaf(&[4, 8]), d.leaf(&[4, 8]), d.leaf(&[4, 8]), d.leaf(&[4, 4]));
        let h = d.op(Op::Linear { bias: false }, &[], &[x, w1])?;
        let e = d.unary(Tanh, h)?;
        let turned = d.permute(e, &[1, 0])?;
        let gate = d.op(Op::Linear { bias: false }, &[], &[turned, w3])?;
        let gate = d.reduce(ReduceOp::Max, gate, 0b10, true)?;
        let y = d.op(Op::Linear { bias: false }, &[], &[x, w2])?;
        let y = d.binary(Add, y, h)?;
        let gate = d.op(Op::Broadcast { shape: Dims::from_slice(&[4, 4]) }, &[], &[gate])?;
        Ok(vec![d.binary(Mul, y, gate)?])
    }),
    ("a product that is added to another of its input", |d| {
        let (x, w1, w2) = (d.leaf(&[3, 8]), d.leaf(&[4, 8]), d.leaf(&[4, 8]));
        let h = d.op(Op::Linear { bias: false }, &[], &[x, w1])?;
        let y = d.op(Op::Linear { bias: false }, &[], &[x, w2])?;
        Ok(vec![d.binary(Sub, y, h)?, h])
    }),
    ("rows of a product that are reduced", |d| {
        let (x, w) = (d.leaf(&[3, 8]), d.leaf(&[4, 8]));
        let p = d.op(Op::Linear { bias: false }, &[], &[x, w])?;
        let y = d.affine(p, 0.5, 0.0)?;
        Ok(vec![d.softmax(y, 1)?])
    }),
    ("a product in chunks of columns", |d| {
        let (x, w, b) = (d.leaf(&[1100, 8]), d.leaf(&[70, 8]), d.leaf(&[70]));
        let y = d.op(Op::Linear { bias: true }, &[], &[x, w, b])?;
        Ok(vec![d.unary(Tanh, y)?])
    }),
    ("a product in blocks of rows", |d| {
        let (x, w, residual) = (d.leaf(&[140, 1024]), d.leaf(&[5, 1024]), d.leaf(&[140, 5]));
        let y = d.op(Op::Linear { bias: false }, &[], &[x, w])?;
        Ok(vec![d.binary(Add, y, residual)?])
    }),
];

/// Computes a program in a mode and judges it. `None` where the mode says nothing about programs.
///
/// # Errors
/// When something fails that should not.
pub fn check(named: &Named, mode: Mode) -> Result<Option<Cell>> {
    let program = &named.program;
    let wrong = match mode {
        Mode::NoPasses => check_options(program, &EvalOptions::no_passes())?,
        Mode::OnlyPass(name) => check_options(program, &EvalOptions::only_pass(name))?,
        Mode::AllPasses => check_options(program, &EvalOptions::default())?,
        Mode::Cold => check_options(program, &EvalOptions { cache: false, ..EvalOptions::default() })?,
        Mode::Warm => {
            check_options(program, &EvalOptions::default())?;
            check_options(program, &EvalOptions::default())?
        }
        Mode::Replay => check_numbers(program)?,
        Mode::Tracked => check_gradients(program)?,
        Mode::Batched => check_together(program)?,
        _ => return Ok(None),
    };
    Ok(Some(Cell::of(wrong.map_or(Outcome::Passed, |what| Outcome::Failed(format!("{what}\n{program}"))))))
}

/// Every program in `dtype`.
///
/// # Errors
/// When inference refuses one: a mistake in the table.
pub fn programs(dtype: DType) -> Result<Vec<Named>> {
    let mut all = Vec::with_capacity(PROGRAMS.len());
    for (i, (name, write)) in PROGRAMS.iter().enumerate() {
        let program = Program { seed: i as u64, dtype, steps: Vec::new(), known: Vec::new(), roots: Vec::new() };
        let mut draft = Draft { program };
        draft.program.roots = write(&mut draft)?;
        all.push(Named { name, program: draft.program });
    }
    Ok(all)
}
