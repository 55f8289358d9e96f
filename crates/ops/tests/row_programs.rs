//! Row programs against a naive f64 interpreter, and the promise that bits depend on the row alone.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::DType;
use candle_lazy_ops::row::{
    programs, BinaryFn, Builder, Class, FloatKind, Input, Instr, Kind, ReduceFn, Reg, RowProgram, UnaryFn,
};
use candle_lazy_ops::view::Strided;
use common::*;
use proptest::prelude::{any, prop, proptest, ProptestConfig};

fn erf(x: f64) -> f64 {
    libm::erf(x)
}

fn unary(f: UnaryFn, x: f64) -> f64 {
    match f {
        UnaryFn::Neg => -x,
        UnaryFn::Abs => x.abs(),
        UnaryFn::Recip => 1.0 / x,
        UnaryFn::Sqr => x * x,
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Rsqrt => 1.0 / x.sqrt(),
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.ln(),
        UnaryFn::Sin => x.sin(),
        UnaryFn::Cos => x.cos(),
        UnaryFn::Tanh => x.tanh(),
        UnaryFn::Erf => erf(x),
        UnaryFn::Gelu => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * x * (1.0 + (c * (x + 0.044715 * x * x * x)).tanh())
        }
        UnaryFn::GeluErf => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        UnaryFn::Relu => {
            if x > 0.0 {
                x
            } else {
                0.0
            }
        }
        UnaryFn::Silu => x / (1.0 + (-x).exp()),
        UnaryFn::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        UnaryFn::Floor => x.floor(),
        UnaryFn::Ceil => x.ceil(),
        UnaryFn::Round => x.round(),
        UnaryFn::Sign => {
            if x > 0.0 {
                1.0
            } else if x < 0.0 {
                -1.0
            } else {
                0.0
            }
        }
    }
}

fn binary(f: BinaryFn, a: f64, b: f64) -> f64 {
    let t = |c: bool| if c { 1.0 } else { 0.0 };
    match f {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        BinaryFn::Mul => a * b,
        BinaryFn::Div | BinaryFn::Quotient => a / b,
        BinaryFn::Max => {
            if a < b {
                b
            } else {
                a
            }
        }
        BinaryFn::Min => {
            if a > b {
                b
            } else {
                a
            }
        }
        BinaryFn::Pow => a.powf(b),
        BinaryFn::Eq => t(a == b),
        BinaryFn::Ne => t(a != b),
        BinaryFn::Lt => t(a < b),
        BinaryFn::Le => t(a <= b),
        BinaryFn::Gt => t(a > b),
        BinaryFn::Ge => t(a >= b),
    }
}

/// The naive interpreter: every register is a full array over all elements.
fn naive(p: &RowProgram, dims: &[usize], axes: u32, inputs: &[Operand], params: &[f64]) -> Vec<Vec<f64>> {
    let all: Vec<Vec<usize>> = indices(dims).collect();
    let key = |i: &[usize]| -> Vec<usize> {
        i.iter().enumerate().map(|(a, &v)| if axes >> a & 1 == 1 { 0 } else { v }).collect()
    };
    // Flat position of each element's row representative.
    let strides = Strided::contiguous(dims);
    let row: Vec<usize> = all.iter().map(|i| offset(&strides, &key(i))).collect();
    let n: f64 = (0..dims.len()).filter(|a| axes >> a & 1 == 1).map(|a| dims[a]).product::<usize>() as f64;
    let mut regs: Vec<Vec<f64>> = Vec::new();
    for instr in p.instrs() {
        let get = |r: Reg| &regs[r.0 as usize];
        let v: Vec<f64> = match *instr {
            Instr::Load { input } | Instr::LoadRow { input } => inputs[input as usize].values(),
            Instr::Param { index } => vec![params[index as usize]; all.len()],
            Instr::RowLen => vec![n; all.len()],
            Instr::Unary(f, a) => get(a).iter().map(|&x| unary(f, x)).collect(),
            Instr::Binary(f, a, b) => get(a).iter().zip(get(b)).map(|(&x, &y)| binary(f, x, y)).collect(),
            Instr::Select(c, a, b) => {
                (0..all.len()).map(|i| if get(c)[i] != 0.0 { get(a)[i] } else { get(b)[i] }).collect()
            }
            Instr::Round(k, a) => get(a)
                .iter()
                .map(|&x| match k {
                    FloatKind::F16 => half::f16::from_f64(x).to_f64(),
                    FloatKind::BF16 => half::bf16::from_f64(x).to_f64(),
                    FloatKind::F32 => x as f32 as f64,
                })
                .collect(),
            Instr::RootMean { sum, eps } => get(sum).iter().map(|&x| (x / n + params[eps as usize]).sqrt()).collect(),
            Instr::Reduce(f, a) => {
                let start = match f {
                    ReduceFn::Sum => 0.0,
                    ReduceFn::Max => f64::NEG_INFINITY,
                    ReduceFn::Min => f64::INFINITY,
                };
                let mut acc = vec![start; all.len()];
                for (i, &x) in get(a).iter().enumerate() {
                    let m = &mut acc[row[i]];
                    *m = match f {
                        ReduceFn::Sum => *m + x,
                        ReduceFn::Max => m.max(x),
                        ReduceFn::Min => m.min(x),
                    };
                }
                row.iter().map(|&r| acc[r]).collect()
            }
        };
        regs.push(v);
    }
    p.outputs()
        .iter()
        .map(|&(r, _)| {
            let v = &regs[r.0 as usize];
            match p.kind_of(r) {
                Some(Kind::Vec) => v.clone(),
                Some(Kind::Row) => (0..all.len()).filter(|&i| row[i] == i).map(|i| v[i]).collect(),
                _ => vec![v.first().copied().unwrap_or(0.0)],
            }
        })
        .collect()
}

/// A random program of class F64 whose values stay tame.
fn random_program(rng: &mut Rng, inputs: u16, rowable: &[bool], outs: usize) -> RowProgram {
    let mut b: Builder = RowProgram::builder(Class::F64);
    let mut regs: Vec<Reg> = Vec::new();
    for i in 0..inputs {
        regs.push(if rowable[i as usize] && rng.below(2) == 0 { b.load_row(i) } else { b.load(i) });
    }
    regs.push(b.param(0));
    regs.push(b.row_len());
    let first = b.load(0);
    regs.push(first);
    for _ in 0..3 + rng.below(10) {
        let pick = |rng: &mut Rng| regs[rng.below(regs.len())];
        let (x, y, z) = (pick(rng), pick(rng), pick(rng));
        let r = match rng.below(13) {
            0 => b.unary(UnaryFn::Tanh, x),
            1 => b.unary(UnaryFn::Sigmoid, x),
            2 => b.unary(UnaryFn::Neg, x),
            3 => b.unary(UnaryFn::Abs, x),
            4 => b.binary(BinaryFn::Add, x, y),
            5 => b.binary(BinaryFn::Sub, x, y),
            6 => {
                let t = b.unary(UnaryFn::Tanh, y);
                b.binary(BinaryFn::Mul, x, t)
            }
            7 => b.binary(BinaryFn::Max, x, y),
            8 => {
                let half = b.unary(UnaryFn::Sign, z);
                b.select(half, x, y)
            }
            9 | 10 => {
                let f = [ReduceFn::Sum, ReduceFn::Max, ReduceFn::Min][rng.below(3)];
                let t = b.unary(UnaryFn::Tanh, x);
                let v = if b.kind_of(t) == Some(Kind::Vec) { t } else { b.binary(BinaryFn::Add, t, first) };
                b.reduce(f, v)
            }
            11 => {
                let t = b.unary(UnaryFn::Tanh, x);
                let sqr = b.unary(UnaryFn::Sqr, t);
                b.root_mean(sqr, 0)
            }
            _ => b.binary(BinaryFn::Min, x, y),
        };
        regs.push(r);
    }
    for _ in 0..outs {
        let r = regs[regs.len() - 1 - rng.below(4)];
        b.output(r, DType::F64);
    }
    b.finish().unwrap()
}

fn check_random(seed: u64, dims: &[usize], axes: u32) {
    let mut rng = Rng(seed);
    let n_in = 1 + rng.below(3);
    let mut inputs = Vec::new();
    let mut rowable = Vec::new();
    for _ in 0..n_in {
        let layout = LAYOUTS[rng.below(LAYOUTS.len())];
        if rng.below(4) == 0 {
            // Does not vary along the row axes.
            let small: Vec<usize> =
                dims.iter().enumerate().map(|(a, &d)| if axes >> a & 1 == 1 { 1 } else { d }).collect();
            let mut o = operand(&mut rng, layout, DType::F64, &small, 2.0);
            o.layout = o.layout.broadcast_to(dims).unwrap();
            inputs.push(o);
            rowable.push(true);
        } else {
            inputs.push(operand(&mut rng, layout, DType::F64, dims, 2.0));
            rowable.push(axes == 0);
        }
    }
    let n_out = 1 + rng.below(3);
    let p = random_program(&mut rng, n_in as u16, &rowable, n_out);
    let got = run(&p, dims, axes, &inputs, &[0.75]);
    let want = naive(&p, dims, axes, &inputs, &[0.75]);
    for (g, w) in got.iter().zip(&want) {
        let g = g.to_f64();
        let scale = scale_of(w).max(1.0);
        let d = max_diff(&g, w);
        assert!(d <= 1e-10 * scale, "seed {seed} dims {dims:?} axes {axes:#b}: {d:e}\n{p:?}");
    }
    if axes == 0 {
        check_in_place(&mut rng, &p, dims, &inputs, &got);
    }
}

/// Some inputs are what an output holds before: the bits are those of a run beside its inputs.
fn check_in_place(rng: &mut Rng, p: &RowProgram, dims: &[usize], inputs: &[Operand], want: &[Data]) {
    let mut outs = want.to_vec();
    let places: Vec<Option<usize>> = (0..inputs.len())
        .map(|i| {
            let k = (i + rng.below(2)) % outs.len().max(inputs.len());
            (k < outs.len() && p.may_run_in_place(k)).then_some(k)
        })
        .scan(Vec::new(), |taken, k| {
            let k = k.filter(|k| !taken.contains(k));
            taken.extend(k);
            Some(k)
        })
        .collect();
    for (input, place) in inputs.iter().zip(&places) {
        if let Some(k) = place {
            outs[*k] = input.dense().data;
        }
    }
    let given: Vec<Input<'_>> = inputs
        .iter()
        .zip(&places)
        .map(|(input, place)| place.map_or_else(|| Input::View(input.view()), Input::Output))
        .collect();
    let mut slices: Vec<_> = outs.iter_mut().map(Data::slice_mut).collect();
    p.run_in_place(dims, &given, &[0.75], &mut slices).unwrap();
    for (k, (got, want)) in outs.iter().zip(want).enumerate() {
        assert_eq!(got.bits(), want.bits(), "output {k} of {dims:?}, in place of {places:?}\n{p:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_agree_with_the_naive_interpreter(
        seed in any::<u64>(),
        dims in prop::collection::vec(1usize..7, 0..5),
        axes in any::<u32>(),
    ) {
        let axes = axes & ((1u32 << dims.len()) - 1);
        check_random(seed, &dims, axes);
    }

    #[test]
    fn random_programs_over_rows_of_boundary_lengths(
        seed in any::<u64>(),
        n in prop::sample::select(vec![1usize, 15, 16, 17, 1023, 1024, 1025]),
        place in 0usize..3,
    ) {
        let mut dims = vec![2usize, 3];
        dims.insert(place, n);
        check_random(seed, &dims, 1 << place);
        check_random(seed, &dims, 0);
    }
}

#[test]
fn random_programs_over_long_rows() {
    for (i, n) in [8191usize, 8192, 8193, 20_000].into_iter().enumerate() {
        for place in 0..2 {
            let mut dims = vec![3usize];
            dims.insert(place, n);
            for seed in 0..4 {
                check_random(seed * 97 + i as u64, &dims, 1 << place);
            }
        }
    }
}

#[test]
fn every_unary_function_agrees_with_f64() {
    use UnaryFn::*;
    let all = [
        Neg, Abs, Recip, Sqr, Sqrt, Rsqrt, Exp, Log, Sin, Cos, Tanh, Erf, Gelu, GeluErf, Relu, Silu, Sigmoid, Floor,
        Ceil, Round, Sign,
    ];
    let mut rng = Rng(3);
    for f in all {
        let positive = matches!(f, Sqrt | Rsqrt | Log | Recip);
        let values: Vec<f64> = rng
            .floats(3000, 6.0)
            .into_iter()
            .map(|v| if positive { v.abs() + 0.01 } else { v } as f32 as f64)
            .collect();
        for dtype in [DType::F32, DType::F64] {
            let p = programs::unary(f, dtype).unwrap();
            let x = Operand::contiguous(dtype, &[3000], &values);
            let got = run(&p, &[3000], 0, &[x], &[])[0].to_f64();
            for ((&g, &v), i) in got.iter().zip(&values).zip(0..) {
                let want = unary(f, v);
                let scale = want.abs().max(if matches!(f, Gelu | GeluErf) { v.abs() } else { 0.0 });
                let limit = 4.0 * ulp(dtype, scale.max(1e-30));
                assert!((g - want).abs() <= limit, "{f:?} {} at {v} (#{i}): {g} for {want}", dtype.as_str());
            }
        }
    }
}

#[test]
fn every_binary_function_agrees_with_f64_also_on_special_values() {
    use BinaryFn::*;
    let specials = [0.0, -0.0, 1.0, -2.5, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 3.0];
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for x in specials {
        for y in specials {
            a.push(x);
            b.push(y);
        }
    }
    for f in [Add, Sub, Mul, Div, Max, Min, Pow, Eq, Ne, Lt, Le, Gt, Ge] {
        for (class, dtype) in [(Class::F32, DType::F32), (Class::F64, DType::F64)] {
            let mut builder = RowProgram::builder(class);
            let (x, y) = (builder.load(0), builder.load(1));
            let z = builder.binary(f, x, y);
            builder.output(z, dtype);
            let p = builder.finish().unwrap();
            let ops = [Operand::contiguous(dtype, &[64], &a), Operand::contiguous(dtype, &[64], &b)];
            let got = run(&p, &[64], 0, &ops, &[])[0].to_f64();
            let want: Vec<f64> = a.iter().zip(&b).map(|(&x, &y)| binary(f, x, y)).collect();
            assert!(max_diff(&got, &want) < 1e-5, "{f:?}: {got:?} {want:?}");
        }
    }
}

#[test]
fn comparisons_store_as_u8_and_select_reads_them() {
    let mut b = RowProgram::builder(Class::F32);
    let (x, y) = (b.load(0), b.load(1));
    let lt = b.binary(BinaryFn::Lt, x, y);
    let s = b.select(lt, x, y);
    b.output(lt, DType::U8);
    b.output(s, DType::F16);
    let p = b.finish().unwrap();
    let ops = [
        Operand::contiguous(DType::F32, &[4], &[1.0, 2.0, 3.0, f64::NAN]),
        Operand::contiguous(DType::F16, &[4], &[2.0, 1.0, 3.0, 0.0]),
    ];
    let out = run(&p, &[4], 0, &ops, &[]);
    assert_eq!(out[0], Data::U8(vec![1, 0, 0, 0]));
    assert_eq!(out[1].to_f64(), [1.0, 1.0, 3.0, 0.0]);
}
#[test]
fn empty_rows_and_empty_tensors() {
    let mut b = RowProgram::builder(Class::F32);
    let x = b.load(0);
    let (s, m, l) = (b.reduce(ReduceFn::Sum, x), b.reduce(ReduceFn::Max, x), b.reduce(ReduceFn::Min, x));
    let n = b.row_len();
    for r in [s, m, l, n, x] {
        b.output(r, DType::F32);
    }
    let p = b.finish().unwrap();
    let x = Operand::contiguous(DType::F32, &[3, 0], &[]);
    let out = run(&p, &[3, 0], 0b10, &[x], &[]);
    assert_eq!(out[0].to_f64(), [0.0; 3]);
    assert_eq!(out[1].to_f64(), [f64::NEG_INFINITY; 3]);
    assert_eq!(out[2].to_f64(), [f64::INFINITY; 3]);
    assert_eq!(out[3].to_f64(), [0.0]);
    assert_eq!(out[4].len(), 0);
    let x = Operand::contiguous(DType::F32, &[0, 4], &[]);
    let out = run(&p, &[0, 4], 0b10, &[x], &[]);
    assert_eq!(out.iter().map(|o| o.len()).collect::<Vec<_>>(), [0, 0, 0, 1, 0]);
    // No elements, and dims whose product would overflow.
    let huge = [1usize << 40, 1 << 40, 0];
    let x = Operand::contiguous(DType::F32, &huge, &[]);
    let softmax = programs::softmax(Class::F32, DType::F32).unwrap();
    assert_eq!(run(&softmax, &huge, 0b100, &[x], &[])[0].len(), 0);
    let x = Operand::contiguous(DType::F32, &[], &[2.5]);
    let out = run(&p, &[], 0, &[x], &[]);
    assert_eq!(out.iter().map(|o| o.to_f64()[0]).collect::<Vec<_>>(), [2.5, 2.5, 2.5, 1.0, 2.5]);
}

#[test]
fn extremes_treat_nan_as_candle_does() {
    use candle_core::{Device, Tensor};
    let nan = f32::NAN;
    let rows: [[f32; 20]; 4] = [
        {
            let mut r = [1.0; 20];
            r[0] = nan;
            r[3] = 7.0;
            r
        },
        {
            let mut r = [1.0; 20];
            r[5] = nan;
            r[3] = 7.0;
            r
        },
        [nan; 20],
        {
            let mut r = [f32::NEG_INFINITY; 20];
            r[19] = nan;
            r
        },
    ];
    let t = Tensor::new(&rows, &Device::Cpu).unwrap();
    let eager_max: Vec<f32> = t.max(1).unwrap().to_vec1().unwrap();
    let eager_min: Vec<f32> = t.min(1).unwrap().to_vec1().unwrap();
    let mut b = RowProgram::builder(Class::F32);
    let x = b.load(0);
    let (m, l) = (b.reduce(ReduceFn::Max, x), b.reduce(ReduceFn::Min, x));
    b.output(m, DType::F32);
    b.output(l, DType::F32);
    let p = b.finish().unwrap();
    let flat: Vec<f64> = rows.iter().flatten().map(|&v| v as f64).collect();
    let out = run(&p, &[4, 20], 0b10, &[Operand::contiguous(DType::F32, &[4, 20], &flat)], &[]);
    let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<_>>();
    assert_eq!(max_diff(&out[0].to_f64(), &wide(eager_max)), 0.0);
    assert_eq!(max_diff(&out[1].to_f64(), &wide(eager_min)), 0.0);
}

#[test]
fn softmax_of_special_rows_is_eagers() {
    use candle_core::{Device, Tensor};
    let inf = f32::INFINITY;
    let rows = [
        [-inf, -inf, -inf, -inf],
        [0.0, -inf, 1.0, -inf],
        [inf, 0.0, 1.0, 2.0],
        [f32::NAN, 0.0, 1.0, 2.0],
        [0.0, f32::NAN, 1.0, 2.0],
        [3.0e38, -3.0e38, 0.0, 3.0e38],
    ];
    let t = Tensor::new(&rows, &Device::Cpu).unwrap();
    let want: Vec<f32> = candle_nn::ops::softmax(&t, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let flat: Vec<f64> = rows.iter().flatten().map(|&v| v as f64).collect();
    let p = programs::softmax(Class::F32, DType::F32).unwrap();
    let got = run(&p, &[6, 4], 0b10, &[Operand::contiguous(DType::F32, &[6, 4], &flat)], &[])[0].to_f64();
    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
    assert!(max_diff(&got, &want) < 1e-6, "{got:?}\n{want:?}");
}
