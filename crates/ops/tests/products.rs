//! Several products and their epilogues against one product and one program at a time: the same bits.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

use candle_lazy_ops::kernels::{matmul, products, with_threads, Epilogue, Head, Source};
use candle_lazy_ops::row::{BinaryFn, Class, FloatKind, RowProgram, UnaryFn};
use candle_lazy_ops::view::{Slice, SliceMut, Strided, View};
use half::{bf16, f16};

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + seed * 101) % 127) as f32 / 31.0 - 2.0).collect()
}

/// A float type that products have.
trait Float: Copy + Default + PartialEq + std::fmt::Debug {
    const KIND: FloatKind;
    fn of(x: f32) -> Self;
    fn slice(data: &[Self]) -> Slice<'_>;
    fn slice_mut(data: &mut [Self]) -> SliceMut<'_>;
    fn dtype() -> candle_core::DType {
        Self::slice(&[]).dtype()
    }
}

macro_rules! float {
    ($ty:ty, $kind:ident, $of:expr) => {
        impl Float for $ty {
            const KIND: FloatKind = FloatKind::$kind;
            fn of(x: f32) -> Self {
                $of(x)
            }
            fn slice(data: &[Self]) -> Slice<'_> {
                Slice::$kind(data)
            }
            fn slice_mut(data: &mut [Self]) -> SliceMut<'_> {
                SliceMut::$kind(data)
            }
        }
    };
}
float!(f32, F32, |x| x);
float!(f16, F16, f16::from_f32);
float!(bf16, BF16, bf16::from_f32);

fn floats<E: Float>(n: usize, seed: usize) -> Vec<E> {
    numbers(n, seed).into_iter().map(E::of).collect()
}

/// How a right side (k, n) lies: rows of its transpose, columns, or neither.
fn right(lies: usize, k: usize, n: usize) -> (Strided, usize) {
    let dims = vec![k, n];
    let (strides, len) = match lies {
        0 => (vec![1, k + 2], n * (k + 2)),
        1 => (vec![n + 1, 1], k * (n + 1)),
        _ => (vec![2 * n, 2], 2 * k * n),
    };
    (Strided { dims: dims.into(), strides: strides.into(), offset: 3 }, len + 3)
}

/// silu(p0) · p1 + bias, and p0 · residual in another dtype: both products read, operands per column, per element and turned.
fn program<E: Float>() -> RowProgram {
    let mut b = RowProgram::builder(Class::F32);
    let (p0, p1, bias, residual) = (b.load(0), b.load(1), b.load(2), b.load(3));
    let gate = b.unary(UnaryFn::Silu, p0);
    let gated = b.binary(BinaryFn::Mul, gate, p1);
    let sum = b.binary(BinaryFn::Add, gated, bias);
    let scale = b.param(0);
    let scaled = b.binary(BinaryFn::Mul, sum, scale);
    let rounded = b.round(E::KIND, scaled);
    let other = b.binary(BinaryFn::Mul, p0, residual);
    b.output(rounded, E::dtype());
    b.output(other, candle_core::DType::F32);
    b.finish().unwrap()
}

fn check<E: Float>((a, s, k): (usize, usize, usize), n: usize, lies: usize, threads: usize) {
    let m = a * s;
    let wide = k + 3;
    let xs = floats::<E>(m * wide, 1);
    let layout = Strided { dims: vec![a, s, k].into(), strides: vec![s * wide, wide, 1].into(), offset: 0 };
    let x = View::new(E::slice(&xs), layout).unwrap();
    let (own, len) = right(lies, k, n);
    let stores: Vec<Vec<E>> = (0..3).map(|i| floats(len, 2 + i)).collect();
    let rights: Vec<View<'_>> = stores.iter().map(|w| View::new(E::slice(w), own.clone()).unwrap()).collect();
    let bias = floats::<E>(n, 9);
    let dims = [a, s, n];
    let bias = View::new(E::slice(&bias), Strided::contiguous(&[n]).broadcast_to(&dims).unwrap()).unwrap();
    // a residual whose two leading dims lie exchanged: no rows at one distance
    let residual = numbers(m * n, 10);
    let turned = Strided { dims: dims.to_vec().into(), strides: vec![n, a * n, 1].into(), offset: 0 };
    let residual = View::new(Slice::F32(&residual), turned).unwrap();
    let program = program::<E>();
    let params = [0.75];
    // one at a time
    let product = |w: &View<'_>| {
        let mut out = vec![E::default(); m * n];
        matmul(&x, w, &mut E::slice_mut(&mut out)).unwrap();
        out
    };
    let want: Vec<Vec<E>> = rights.iter().map(product).collect();
    let (mut first, mut second) = (vec![E::default(); m * n], vec![0f32; m * n]);
    let inputs: Vec<View<'_>> = want[..2]
        .iter()
        .map(|p| View::new(E::slice(p), Strided::contiguous(&dims)).unwrap())
        .chain([bias.clone(), residual.clone()])
        .collect();
    let mut outs = [E::slice_mut(&mut first), SliceMut::F32(&mut second)];
    program.run(&dims, 0, &inputs, &params, &mut outs).unwrap();
    // all at once
    let epilogue = Epilogue {
        program: &program,
        inputs: vec![Source::Product(0), Source::Product(1), Source::View(bias), Source::View(residual)],
        params: &params,
    };
    let heads = [
        Head { rights: vec![rights[2].clone()], epilogue: None },
        Head { rights: rights[..2].to_vec(), epilogue: Some(epilogue) },
    ];
    let (mut plain, mut got, mut other) = (vec![E::of(7.0); m * n], vec![E::of(7.0); m * n], vec![7f32; m * n]);
    let mut outs = [E::slice_mut(&mut plain), E::slice_mut(&mut got), SliceMut::F32(&mut other)];
    with_threads(threads, || products(&x, &heads, &mut outs)).unwrap();
    let what = format!("{:?} {a}x{s}x{k} by {n}, right side {lies}, {threads} threads", E::dtype());
    assert!(plain == want[2], "{what}: the product alone");
    assert!(got == first, "{what}: the first result");
    assert!(other == second, "{what}: the second result");
}

#[test]
fn heads_and_epilogues_change_no_bit() {
    for (a, s) in [(0, 3), (1, 1), (1, 2), (2, 2), (1, 5), (3, 3), (5, 13)] {
        for n in [0, 1, 5, 64, 200] {
            for k in [0, 1, 16, 75] {
                for lies in 0..3 {
                    check::<f32>((a, s, k), n, lies, 1);
                    check::<bf16>((a, s, k), n, lies, 1);
                }
                check::<f16>((a, s, k), n, 0, 1);
            }
        }
    }
}

#[test]
fn threads_blocks_and_chunks_change_no_bit() {
    for threads in [2, 3] {
        // one row in parts of its columns
        check::<f32>((1, 1, 700), 1030, 0, threads);
        check::<bf16>((1, 3, 700), 1030, 1, threads);
        // more products than are kept at once
        check::<f32>((10, 30, 130), 700, 0, threads);
        check::<f16>((10, 30, 130), 700, 1, threads);
        // more rows than a block has, and pieces of their elements
        check::<f32>((7, 20, 2100), 130, 2, threads);
    }
}

#[test]
fn vectors_are_one_row() {
    let (x, w) = (numbers(5, 1), numbers(15, 2));
    let x = View::new(Slice::F32(&x), Strided::contiguous(&[5])).unwrap();
    let w = View::new(Slice::F32(&w), Strided::contiguous(&[5, 3])).unwrap();
    let (mut got, mut want) = ([0f32; 3], [0f32; 3]);
    products(&x, &[Head { rights: vec![w.clone()], epilogue: None }], &mut [SliceMut::F32(&mut got)]).unwrap();
    let row = View { data: x.data, layout: Strided::contiguous(&[1, 5]) };
    matmul(&row, &w, &mut SliceMut::F32(&mut want)).unwrap();
    assert_eq!(got, want);
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let data = numbers(64, 1);
    let view = |dims: &[usize]| View::new(Slice::F32(&data), Strided::contiguous(dims)).unwrap();
    let program = program::<f32>();
    let params = [1.0];
    let epilogue = |inputs| Some(Epilogue { program: &program, inputs, params: &params });
    let operands =
        || vec![Source::Product(0), Source::Product(1), Source::View(view(&[2, 3])), Source::View(view(&[2, 3]))];
    let two = || vec![view(&[4, 3]), view(&[4, 3])];
    let run = |x: &View<'_>, head: Head<'_>, outs: usize| {
        let (mut a, mut b, mut c) = ([0f32; 6], [0f32; 6], [0f32; 6]);
        let mut all = [SliceMut::F32(&mut a), SliceMut::F32(&mut b), SliceMut::F32(&mut c)];
        products(x, &[head], &mut all[..outs]).map_err(|e| e.to_string())
    };
    let x = view(&[2, 4]);
    let good = Head { rights: two(), epilogue: epilogue(operands()) };
    assert_eq!(run(&x, good.clone(), 2), Ok(()));
    let mut other = operands();
    other[2] = Source::View(view(&[3, 2]));
    let mut third = operands();
    third[0] = Source::Product(2);
    let halves = vec![f16::ONE; 12];
    let half = View::new(Slice::F16(&halves), Strided::contiguous(&[4, 3])).unwrap();
    let doubles = vec![1f64; 8];
    let double = View::new(Slice::F64(&doubles), Strided::contiguous(&[2, 4])).unwrap();
    let wide = View::new(Slice::F64(&doubles), Strided::contiguous(&[4, 2])).unwrap();
    for (x, head, outs, says) in [
        (&x, good.clone(), 1, "no place"),
        (&x, good.clone(), 3, "no head makes"),
        (&x, Head { rights: two(), epilogue: None }, 1, "without an epilogue"),
        (&x, Head { rights: vec![view(&[3, 4])], epilogue: None }, 1, "[2, 4] x [3, 4]"),
        (&x, Head { rights: vec![view(&[4, 3]), view(&[4, 2])], epilogue: epilogue(operands()) }, 2, "[4, 2]"),
        (&x, Head { rights: vec![half], epilogue: None }, 1, "f16"),
        (&x, Head { rights: two(), epilogue: epilogue(other) }, 2, "[3, 2] beside [2, 3]"),
        (&x, Head { rights: two(), epilogue: epilogue(third) }, 2, "product 2 of 2"),
        (&x, Head { rights: two(), epilogue: epilogue(operands()[..3].to_vec()) }, 2, "4 inputs wanted, 3 given"),
        (&x, Head { rights: vec![view(&[4, 2])], epilogue: None }, 1, "4 elements"),
        (&double, Head { rights: vec![wide], epilogue: None }, 1, "f64"),
    ] {
        let told = run(x, head, outs).unwrap_err();
        assert!(told.contains(says), "{told} lacks {says}");
    }
}
