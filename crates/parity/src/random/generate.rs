//! Making a random graph.

use super::{Known, Program, Step};
use crate::case::{Domain, InputSpec, Layout};
use crate::rng::Rng;
use candle_core::DType;
use candle_lazy_graph::{infer, BinaryOp, CmpOp, Dims, Exactness, Meta, Op, ReduceOp, UnaryOp};

/// No result of a random graph has more elements.
const MAX_ELEMENTS: usize = 4096;

/// No number of a random graph is larger.
const MAX_NUMBER: f64 = 1e3;

/// The shapes that leaves have, unless [`generate_from`] is told others.
pub const SHAPES: [&[usize]; 9] =
    [&[2, 3, 8], &[3, 8], &[8], &[2, 1, 8], &[8, 8], &[2, 2, 3, 8], &[2, 2, 3, 8], &[3, 4], &[]];

struct Maker {
    program: Program,
    rng: Rng,
}

/// A random graph of at most `size` nodes in `dtype` (a float).
#[must_use]
pub fn generate(seed: u64, size: usize, dtype: DType) -> Program {
    generate_from(seed, size, dtype, &SHAPES)
}

/// The same with leaves of these shapes. Equal seeds with shapes of the same pattern mostly give the same program at other
/// sizes.
#[must_use]
pub fn generate_from(seed: u64, size: usize, dtype: DType, shapes: &[&[usize]]) -> Program {
    let program = Program { seed, dtype, steps: Vec::new(), known: Vec::new(), roots: Vec::new() };
    let mut maker = Maker { program, rng: Rng::named(seed, "random graph") };
    let leaves = 3 + maker.rng.below(4);
    for _ in 0..leaves {
        let dims = shapes[maker.rng.below(shapes.len())];
        maker.leaf(dims, dtype, -2.0, 2.0);
    }
    // every third attempt or so does not fit; the bound ends the loop where nothing does
    for _ in 0..size * 6 {
        if maker.program.steps.len() >= size {
            break;
        }
        maker.grow();
    }
    maker.choose_roots();
    maker.program
}

impl Maker {
    fn leaf(&mut self, dims: &[usize], dtype: DType, low: f64, high: f64) -> usize {
        let layout = *self.rng.pick(&Layout::ALL).unwrap_or(&Layout::Contiguous);
        let mut spec = InputSpec::new(dims, dtype, layout, Domain::Any);
        if !spec.layout_applies() {
            spec.layout = Layout::Contiguous;
        }
        self.program.steps.push(Step::Leaf(spec));
        self.program.known.push(Known { dims: dims.to_vec(), dtype, low, high, exact: true });
        self.program.steps.len() - 1
    }

    /// A float node, often one that was made lately.
    fn any(&mut self) -> usize {
        let n = self.program.steps.len();
        for _ in 0..20 {
            let i = if self.rng.below(2) == 0 { n - 1 - self.rng.below(n.min(6)) } else { self.rng.below(n) };
            if self.program.known[i].dtype == self.program.dtype {
                return i;
            }
        }
        // leaves of the float dtype come first
        0
    }

    /// A float node with the same dims as `i`: perhaps `i` itself.
    fn like(&mut self, i: usize) -> usize {
        for _ in 0..12 {
            let j = self.any();
            if self.program.known[j].dims == self.program.known[i].dims {
                return j;
            }
        }
        i
    }

    /// Adds an op with the interval of its result, if inference takes it and the interval stays small.
    fn push(&mut self, op: Op, scalars: &[f64], inputs: &[usize], (low, high): (f64, f64)) -> Option<usize> {
        let known = &self.program.known;
        let metas: Vec<Meta<'_>> =
            inputs.iter().map(|&i| Meta { dims: &known[i].dims, dtype: known[i].dtype }).collect();
        let out = infer(&op, &metas).ok()?;
        let elements: usize = out.dims.iter().product();
        if elements > MAX_ELEMENTS || !(low.abs() <= MAX_NUMBER && high.abs() <= MAX_NUMBER) {
            return None;
        }
        let half = matches!(self.program.dtype, DType::F16 | DType::BF16);
        let same = match op.exactness() {
            Exactness::Exact => true,
            Exactness::ExactWide => !half,
            _ => false,
        };
        let exact = same && inputs.iter().all(|&i| known[i].exact);
        let dims = out.dims.to_vec();
        // rounding may step over a bound
        let slack = 1e-3 * (1.0 + low.abs().max(high.abs()));
        let (low, high) = if exact { (low, high) } else { (low - slack, high + slack) };
        self.program.known.push(Known { dims, dtype: out.dtype, low, high, exact });
        self.program.steps.push(Step::Op { op, scalars: scalars.to_vec(), inputs: inputs.to_vec() });
        Some(self.program.steps.len() - 1)
    }

    fn grow(&mut self) -> Option<usize> {
        let i = self.any();
        let k = self.program.known[i].clone();
        match self.rng.below(24) {
            0..=4 => self.unary(i, &k),
            5..=8 => self.binary(i, &k),
            9 => {
                let (mul, add) = (self.rng.below(9) as f64 / 4.0 - 1.0, self.rng.below(5) as f64 / 2.0 - 1.0);
                let ends = [k.low * mul + add, k.high * mul + add];
                self.push(Op::Affine, &[mul, add], &[i], (ends[0].min(ends[1]), ends[0].max(ends[1])))
            }
            10 | 11 => self.reduction(i, &k),
            12..=15 => self.movement(i, &k),
            16 => self.product(i, &k),
            17 => self.choice(i, &k),
            18 => self.round_trip(i, &k),
            _ => self.composite(i, &k),
        }
    }

    fn unary(&mut self, i: usize, k: &Known) -> Option<usize> {
        let f = *self.rng.pick(UnaryOp::ALL)?;
        let (low, high) = (k.low, k.high);
        let largest = low.abs().max(high.abs());
        let away = low > 0.05;
        let bounds = match f {
            UnaryOp::Neg => (-high, -low),
            UnaryOp::Abs => (0.0, largest),
            UnaryOp::Sqr => (0.0, largest * largest),
            UnaryOp::Exp if high < 4.0 && low > -20.0 => (low.exp(), high.exp()),
            UnaryOp::Recip if away => (1.0 / high, 1.0 / low),
            UnaryOp::Rsqrt if away => (1.0 / high.sqrt(), 1.0 / low.sqrt()),
            UnaryOp::Sqrt if away => (low.sqrt(), high.sqrt()),
            UnaryOp::Log if away => (low.ln(), high.ln()),
            // the sine of a large number is all rounding
            UnaryOp::Sin | UnaryOp::Cos if largest < 20.0 => (-1.0, 1.0),
            UnaryOp::Tanh | UnaryOp::Erf => (-1.0, 1.0),
            UnaryOp::Relu => (0.0, high.max(0.0)),
            UnaryOp::Gelu | UnaryOp::GeluErf | UnaryOp::Silu => (-0.3, high.max(0.0)),
            UnaryOp::Sigmoid => (0.0, 1.0),
            UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round if k.exact => (low - 1.0, high + 1.0),
            UnaryOp::Sign if k.exact => (-1.0, 1.0),
            _ => return None,
        };
        self.push(Op::Unary(f), &[], &[i], bounds)
    }

    fn binary(&mut self, i: usize, k: &Known) -> Option<usize> {
        let f = *self.rng.pick(BinaryOp::ALL)?;
        let j = if self.rng.below(2) == 0 { self.like(i) } else { self.any() };
        let o = self.program.known[j].clone();
        let ends = |f: fn(f64, f64) -> f64| {
            let all = [f(k.low, o.low), f(k.low, o.high), f(k.high, o.low), f(k.high, o.high)];
            (all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(f64::NEG_INFINITY, f64::max))
        };
        let bounds = match f {
            BinaryOp::Add => (k.low + o.low, k.high + o.high),
            BinaryOp::Sub => (k.low - o.high, k.high - o.low),
            BinaryOp::Mul => ends(|a, b| a * b),
            BinaryOp::Div if o.low > 0.05 => ends(|a, b| a / b),
            BinaryOp::Div => return None,
            BinaryOp::Maximum => (k.low.max(o.low), k.high.max(o.high)),
            BinaryOp::Minimum => (k.low.min(o.low), k.high.min(o.high)),
            BinaryOp::Pow if k.low > 0.05 && o.low.abs().max(o.high.abs()) < 4.0 => ends(f64::powf),
            BinaryOp::Pow => return None,
        };
        self.push(Op::Binary(f), &[], &[i, j], bounds)
    }

    fn reduction(&mut self, i: usize, k: &Known) -> Option<usize> {
        let f = *self.rng.pick(ReduceOp::ALL)?;
        let axes = self.rng.below(1 << k.dims.len()) as u32;
        let count: usize = k.dims.iter().enumerate().filter(|(d, _)| axes & (1 << d) != 0).map(|(_, &n)| n).product();
        let n = count as f64;
        let bounds = match f {
            ReduceOp::Sum => ((k.low * n).min(k.low), (k.high * n).max(k.high)),
            // over one element not a number
            ReduceOp::Var if count < 2 => return None,
            ReduceOp::Var => (0.0, (k.high - k.low).powi(2)),
            ReduceOp::LogSumExp => (k.low, k.high + n.max(1.0).ln()),
            ReduceOp::Mean | ReduceOp::Max | ReduceOp::Min => (k.low, k.high),
        };
        let keepdim = self.rng.below(2) == 0;
        self.push(Op::Reduce { op: f, axes, keepdim }, &[], &[i], bounds)
    }

    fn movement(&mut self, i: usize, k: &Known) -> Option<usize> {
        let bounds = (k.low, k.high);
        let rank = k.dims.len();
        let dim = self.rng.below(rank.max(1));
        let size = k.dims.get(dim).copied().unwrap_or(0);
        match self.rng.below(8) {
            0 => {
                let mut shape = k.dims.clone();
                if rank >= 2 && self.rng.below(2) == 0 {
                    let last = shape.pop()?;
                    *shape.last_mut()? *= last;
                } else {
                    shape.insert(dim, 1);
                }
                self.push(Op::Reshape { shape: Dims::from_slice(&shape) }, &[], &[i], bounds)
            }
            1 => {
                let mut perm: Vec<u8> = (0..rank as u8).collect();
                for d in (1..rank).rev() {
                    perm.swap(d, self.rng.below(d + 1));
                }
                self.push(Op::Permute { perm: perm.into_iter().collect() }, &[], &[i], bounds)
            }
            2 if size > 1 => {
                let start = self.rng.below(size);
                let len = 1 + self.rng.below(size - start);
                self.push(Op::Narrow { dim: dim as u8, start, len }, &[], &[i], bounds)
            }
            3 => {
                let shape: Vec<usize> = [2].into_iter().chain(k.dims.iter().copied()).collect();
                self.push(Op::Broadcast { shape: Dims::from_slice(&shape) }, &[], &[i], bounds)
            }
            4 => self.push(Op::Contiguous, &[], &[i], bounds),
            5 if rank > 0 => {
                let j = self.like(i);
                let o = &self.program.known[j];
                let bounds = (k.low.min(o.low), k.high.max(o.high));
                self.push(Op::Concat { dim: dim as u8 }, &[], &[i, j], bounds)
            }
            6 if size > 0 => {
                let count = 1 + self.rng.below(5);
                let ids = self.leaf(&[count], DType::U32, 0.0, size as f64);
                self.push(Op::IndexSelect { dim: dim as u8 }, &[], &[i, ids], bounds)
            }
            7 if size > 1 => {
                let (start, len) = (self.rng.below(size), 1);
                let part = self.push(Op::Narrow { dim: dim as u8, start: 0, len }, &[], &[i], bounds)?;
                let part = self.push(Op::Unary(UnaryOp::Neg), &[], &[part], (-k.high, -k.low))?;
                let bounds = (k.low.min(-k.high), k.high.max(-k.low));
                self.push(Op::SliceAssign { dim: dim as u8, start }, &[], &[i, part], bounds)
            }
            _ => None,
        }
    }

    fn product(&mut self, i: usize, k: &Known) -> Option<usize> {
        let &[.., _, inner] = &k.dims[..] else {
            return None;
        };
        let out = 1 + self.rng.below(9);
        let weight = self.leaf(&[inner, out], self.program.dtype, -0.5, 0.5);
        let reach = k.low.abs().max(k.high.abs()) * 0.5 * inner as f64;
        self.push(Op::Matmul, &[], &[i, weight], (-reach, reach))
    }

    fn choice(&mut self, i: usize, k: &Known) -> Option<usize> {
        if !k.exact {
            return None;
        }
        let f = *self.rng.pick(CmpOp::ALL)?;
        let condition = self.push(Op::CompareScalar(f), &[0.25], &[i], (0.0, 1.0))?;
        let (a, b) = (self.like(i), self.like(i));
        let (ka, kb) = (&self.program.known[a], &self.program.known[b]);
        let bounds = (ka.low.min(kb.low), ka.high.max(kb.high));
        self.push(Op::Where, &[], &[condition, a, b], bounds)
    }

    fn round_trip(&mut self, i: usize, k: &Known) -> Option<usize> {
        if !k.exact {
            return None;
        }
        let narrow = *self.rng.pick(&[DType::F16, DType::BF16])?;
        let (low, high) = (k.low - 0.01 * k.low.abs(), k.high + 0.01 * k.high.abs());
        let there = self.push(Op::Cast(narrow), &[], &[i], (low, high))?;
        self.push(Op::Cast(self.program.dtype), &[], &[there], (low, high))
    }

    fn composite(&mut self, i: usize, k: &Known) -> Option<usize> {
        let dtype = self.program.dtype;
        let (rank, width) = (k.dims.len(), k.dims.last().copied().unwrap_or(1));
        // a large eps keeps a row of equal numbers from dividing rounding by rounding
        let (eps, reach) = (0.1, (width as f64).sqrt() + 1.0);
        match self.rng.below(9) {
            0 if rank > 0 => {
                let dim = self.rng.below(rank) as u8;
                self.push(Op::Softmax { dim }, &[], &[i], (0.0, 1.0))
            }
            1 if rank > 0 => {
                let dim = self.rng.below(rank) as u8;
                self.push(Op::LogSoftmax { dim }, &[], &[i], (k.low - k.high - 9.0, 0.0))
            }
            2 if rank > 0 => self.push(Op::RmsNorm { weight: false }, &[eps], &[i], (-reach, reach)),
            3 if rank > 0 => {
                let (w, b) = (self.leaf(&[width], dtype, -1.0, 1.0), self.leaf(&[width], dtype, -1.0, 1.0));
                let op = Op::LayerNorm { weight: true, bias: true };
                self.push(op, &[eps], &[i, w, b], (-reach - 1.0, reach + 1.0))
            }
            4 if rank > 0 => {
                let out = 1 + self.rng.below(9);
                let (w, b) = (self.leaf(&[out, width], dtype, -0.5, 0.5), self.leaf(&[out], dtype, -1.0, 1.0));
                let reach = k.low.abs().max(k.high.abs()) * 0.5 * width as f64 + 1.0;
                self.push(Op::Linear { bias: true }, &[], &[i, w, b], (-reach, reach))
            }
            5 if rank > 0 => {
                let (a, b) = (self.leaf(&[width, 2], dtype, -0.5, 0.5), self.leaf(&[2, 5], dtype, -0.5, 0.5));
                let reach = k.low.abs().max(k.high.abs()) * 0.5 * width as f64;
                self.push(Op::Lora { base: false }, &[0.5], &[i, a, b], (-reach, reach))
            }
            6 => {
                let j = self.like(i);
                let o = &self.program.known[j];
                let reach = (k.high.max(0.3)) * o.low.abs().max(o.high.abs());
                self.push(Op::Glu { act: UnaryOp::Silu }, &[], &[i, j], (-reach, reach))
            }
            7 if rank == 4 && width % 2 == 0 => {
                let table = [k.dims[2], width / 2];
                let (cos, sin) = (self.leaf(&table, dtype, -1.0, 1.0), self.leaf(&table, dtype, -1.0, 1.0));
                let reach = 2.0 * k.low.abs().max(k.high.abs());
                let interleaved = self.rng.below(2) == 0;
                self.push(Op::Rope { interleaved }, &[], &[i, cos, sin], (-reach, reach))
            }
            8 if rank == 4 && k.low.abs().max(k.high.abs()) < 20.0 => {
                let (key, value) = (self.like(i), self.like(i));
                let v = self.program.known[value].clone();
                let causal = self.rng.below(2) == 0;
                let op = Op::Attention { mask: false, causal, softcap: false, window: None };
                self.push(op, &[0.25], &[i, key, value], (v.low, v.high))
            }
            _ => None,
        }
    }

    /// The last node, a few others, and everything that nothing reads stays out of the roots with even odds (so that there is
    /// dead code).
    fn choose_roots(&mut self) {
        let n = self.program.steps.len();
        let mut roots = vec![n - 1];
        for _ in 0..3 {
            roots.push(self.rng.below(n));
        }
        let read: Vec<usize> = self
            .program
            .steps
            .iter()
            .flat_map(|s| if let Step::Op { inputs, .. } = s { inputs.clone() } else { Vec::new() })
            .collect();
        for i in 0..n {
            if !read.contains(&i) && self.rng.below(2) == 0 {
                roots.push(i);
            }
        }
        roots.retain(|&r| matches!(self.program.steps[r], Step::Op { .. }));
        roots.sort_unstable();
        roots.dedup();
        self.program.roots = roots;
    }
}
