//! What the tests share: a random source, strided operands, f64 references, tolerances.
#![allow(dead_code, unreachable_pub)] // each test file uses its own part of this module

use candle_core::DType;
use candle_lazy_ops::row::RowProgram;
use candle_lazy_ops::view::{Slice, SliceMut, Strided, View};
use candle_lazy_ops::Error;
use half::{bf16, f16};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// In [-r, r).
    pub fn float(&mut self, r: f64) -> f64 {
        ((self.next() >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0) * r
    }

    pub fn floats(&mut self, n: usize, r: f64) -> Vec<f64> {
        (0..n).map(|_| self.float(r)).collect()
    }
}

/// Owned elements of any dtype.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    U8(Vec<u8>),
    U32(Vec<u32>),
    I64(Vec<i64>),
    BF16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

macro_rules! each {
    ($e:expr, $v:ident => $body:expr) => {
        match $e {
            Data::U8($v) => $body,
            Data::U32($v) => $body,
            Data::I64($v) => $body,
            Data::BF16($v) => $body,
            Data::F16($v) => $body,
            Data::F32($v) => $body,
            Data::F64($v) => $body,
        }
    };
}

impl Data {
    pub fn new(dtype: DType, values: &[f64]) -> Self {
        match dtype {
            DType::U8 => Data::U8(values.iter().map(|&v| v as u8).collect()),
            DType::U32 => Data::U32(values.iter().map(|&v| v as u32).collect()),
            DType::I64 => Data::I64(values.iter().map(|&v| v as i64).collect()),
            DType::BF16 => Data::BF16(values.iter().map(|&v| bf16::from_f64(v)).collect()),
            DType::F16 => Data::F16(values.iter().map(|&v| f16::from_f64(v)).collect()),
            DType::F32 => Data::F32(values.iter().map(|&v| v as f32).collect()),
            _ => Data::F64(values.to_vec()),
        }
    }

    pub fn zeros(dtype: DType, n: usize) -> Self {
        Self::new(dtype, &vec![0.0; n])
    }

    pub fn len(&self) -> usize {
        each!(self, v => v.len())
    }

    pub fn slice(&self) -> Slice<'_> {
        match self {
            Data::U8(v) => Slice::U8(v),
            Data::U32(v) => Slice::U32(v),
            Data::I64(v) => Slice::I64(v),
            Data::BF16(v) => Slice::BF16(v),
            Data::F16(v) => Slice::F16(v),
            Data::F32(v) => Slice::F32(v),
            Data::F64(v) => Slice::F64(v),
        }
    }

    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        match self {
            Data::U8(v) => SliceMut::U8(v),
            Data::U32(v) => SliceMut::U32(v),
            Data::I64(v) => SliceMut::I64(v),
            Data::BF16(v) => SliceMut::BF16(v),
            Data::F16(v) => SliceMut::F16(v),
            Data::F32(v) => SliceMut::F32(v),
            Data::F64(v) => SliceMut::F64(v),
        }
    }

    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Data::U8(v) => v.iter().map(|&v| v as f64).collect(),
            Data::U32(v) => v.iter().map(|&v| v as f64).collect(),
            Data::I64(v) => v.iter().map(|&v| v as f64).collect(),
            Data::BF16(v) => v.iter().map(|v| v.to_f64()).collect(),
            Data::F16(v) => v.iter().map(|v| v.to_f64()).collect(),
            Data::F32(v) => v.iter().map(|&v| v as f64).collect(),
            Data::F64(v) => v.clone(),
        }
    }

    /// Bit patterns, for comparisons that a NaN or a sign of zero must not escape.
    pub fn bits(&self) -> Vec<u64> {
        match self {
            Data::U8(v) => v.iter().map(|&v| v as u64).collect(),
            Data::U32(v) => v.iter().map(|&v| v as u64).collect(),
            Data::I64(v) => v.iter().map(|&v| v as u64).collect(),
            Data::BF16(v) => v.iter().map(|v| v.to_bits() as u64).collect(),
            Data::F16(v) => v.iter().map(|v| v.to_bits() as u64).collect(),
            Data::F32(v) => v.iter().map(|v| v.to_bits() as u64).collect(),
            Data::F64(v) => v.iter().map(|v| v.to_bits()).collect(),
        }
    }
}

/// An operand: data under a layout.
#[derive(Clone, Debug)]
pub struct Operand {
    pub data: Data,
    pub layout: Strided,
}

impl Operand {
    pub fn contiguous(dtype: DType, dims: &[usize], values: &[f64]) -> Self {
        Operand { data: Data::new(dtype, values), layout: Strided::contiguous(dims) }
    }

    pub fn view(&self) -> View<'_> {
        View::new(self.data.slice(), self.layout.clone()).unwrap()
    }

    /// Elements in row-major order.
    pub fn values(&self) -> Vec<f64> {
        let all = self.data.to_f64();
        indices(&self.layout.dims).map(|i| all[offset(&self.layout, &i)]).collect()
    }

    /// The same elements, dense.
    pub fn dense(&self) -> Self {
        let dtype = self.data.slice().dtype();
        Self::contiguous(dtype, &self.layout.dims, &self.values())
    }
}

pub fn offset(l: &Strided, index: &[usize]) -> usize {
    l.offset + index.iter().zip(&l.strides).map(|(i, s)| i * s).sum::<usize>()
}

/// All indices of a shape in row-major order.
pub fn indices(dims: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    let total: usize = dims.iter().product();
    (0..total).map(move |mut at| {
        let mut index = vec![0; dims.len()];
        for (i, &d) in index.iter_mut().zip(dims).rev() {
            *i = at % d;
            at /= d;
        }
        index
    })
}

/// The layouts that operands come in.
pub const LAYOUTS: [&str; 5] = ["contiguous", "transposed", "narrowed", "broadcast", "offset"];

/// A random operand of this shape in the named layout.
pub fn operand(rng: &mut Rng, layout: &str, dtype: DType, dims: &[usize], range: f64) -> Operand {
    let draw = |rng: &mut Rng, n: usize| {
        let mut v = rng.floats(n, range);
        if matches!(dtype, DType::U8) {
            v.iter_mut().for_each(|v| *v = v.abs().floor());
        }
        v
    };
    let rank = dims.len();
    match layout {
        "transposed" if rank >= 2 => {
            let mut swapped = dims.to_vec();
            swapped.swap(rank - 1, rank - 2);
            let n = swapped.iter().product();
            let mut perm: Vec<usize> = (0..rank).collect();
            perm.swap(rank - 1, rank - 2);
            Operand {
                data: Data::new(dtype, &draw(rng, n)),
                layout: Strided::contiguous(&swapped).permute(&perm).unwrap(),
            }
        }
        "narrowed" if rank >= 1 => {
            let mut big = dims.to_vec();
            big[rank - 1] += 3;
            let n = big.iter().product();
            Operand {
                data: Data::new(dtype, &draw(rng, n)),
                layout: Strided::contiguous(&big).narrow(rank - 1, 2, dims[rank - 1]).unwrap(),
            }
        }
        "broadcast" if rank >= 1 => {
            let mut small = dims.to_vec();
            let at = rng.below(rank);
            small[at] = 1;
            let n = small.iter().product();
            Operand {
                data: Data::new(dtype, &draw(rng, n)),
                layout: Strided::contiguous(&small).broadcast_to(dims).unwrap(),
            }
        }
        "offset" => {
            let n: usize = dims.iter().product();
            let mut layout = Strided::contiguous(dims);
            layout.offset = 5;
            Operand { data: Data::new(dtype, &draw(rng, n + 7)), layout }
        }
        _ => {
            let n = dims.iter().product();
            Operand::contiguous(dtype, dims, &draw(rng, n))
        }
    }
}

/// Distance between neighbours of `dtype` at magnitude `scale`.
pub fn ulp(dtype: DType, scale: f64) -> f64 {
    let (digits, smallest) = match dtype {
        DType::BF16 => (8, -133),
        DType::F16 => (11, -24),
        DType::F32 => (24, -149),
        _ => (53, -1074),
    };
    let e = if scale > 0.0 { scale.log2().floor() as i32 } else { -1074 };
    2f64.powi((e - digits + 1).max(smallest))
}

/// Largest absolute difference (NaN against NaN counts as equal, NaN against a number as infinite).
pub fn max_diff(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| {
            if x == y || x.is_nan() && y.is_nan() {
                0.0
            } else if x.is_nan() || y.is_nan() {
                f64::INFINITY
            } else {
                (x - y).abs()
            }
        })
        .fold(0.0, f64::max)
}

/// Largest finite magnitude.
pub fn scale_of(v: &[f64]) -> f64 {
    v.iter().filter(|v| v.is_finite()).fold(0.0, |m, v| m.max(v.abs()))
}

/// Asserts an error of at most `ulps` units of `dtype` at the scale of `want`.
pub fn assert_ulps(got: &[f64], want: &[f64], dtype: DType, ulps: f64, scale: f64, what: &str) {
    let diff = max_diff(got, want);
    let limit = ulps * ulp(dtype, scale);
    assert!(diff <= limit, "{what}: off by {diff:e}, allowed {limit:e}");
}

/// Runs `f` with kernels that use `n` threads.
pub fn on_threads<R>(n: usize, f: impl FnOnce() -> R) -> R {
    candle_lazy_ops::kernels::with_threads(n, f)
}

/// Runs a program and returns its outputs.
pub fn run(p: &RowProgram, dims: &[usize], axes: u32, inputs: &[Operand], params: &[f64]) -> Vec<Data> {
    try_run(p, dims, axes, inputs, params).unwrap()
}

pub fn try_run(
    p: &RowProgram,
    dims: &[usize],
    axes: u32,
    inputs: &[Operand],
    params: &[f64],
) -> Result<Vec<Data>, Error> {
    let views: Vec<View<'_>> = inputs.iter().map(|o| o.view()).collect();
    let mut outs: Vec<Data> = p
        .outputs()
        .iter()
        .enumerate()
        .map(|(i, &(_, dt))| Data::new(dt, &vec![77.0; p.output_len(i, dims, axes)]))
        .collect();
    let mut slices: Vec<SliceMut<'_>> = outs.iter_mut().map(|o| o.slice_mut()).collect();
    p.run(dims, axes, &views, params, &mut slices)?;
    Ok(outs)
}
