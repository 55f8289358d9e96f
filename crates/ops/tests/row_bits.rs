//! The promise that a row's bits depend on the row alone, and that sums keep their documented order.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::DType;
use candle_lazy_ops::row::{programs, Class, Instr, ReduceFn, RowProgram, UnaryFn};
use candle_lazy_ops::view::Strided;
use common::*;

/// The programs that the bit-equality tests run.
fn sample_programs(dtype: DType) -> Vec<(&'static str, RowProgram, usize)> {
    let class = Class::of(dtype).unwrap();
    vec![
        ("softmax", programs::softmax(class, dtype).unwrap(), 1),
        ("log_softmax", programs::log_softmax(class, dtype).unwrap(), 1),
        ("rms_norm", programs::rms_norm(true, dtype).unwrap(), 2),
        ("layer_norm", programs::layer_norm(true, true, dtype).unwrap(), 3),
        ("residual_rms_norm", programs::residual_rms_norm(dtype).unwrap(), 3),
        ("glu", programs::glu(UnaryFn::Silu, dtype).unwrap(), 2),
        ("gelu", programs::unary(UnaryFn::Gelu, dtype).unwrap(), 1),
    ]
}

fn bits(out: &[Data]) -> Vec<Vec<u64>> {
    out.iter().map(|d| d.bits()).collect()
}

#[test]
fn bits_do_not_depend_on_layout() {
    let mut rng = Rng(11);
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        for dims in [vec![5usize, 33], vec![3, 1025], vec![40, 3, 17], vec![2, 3072], vec![2, 9000]] {
            let axis = dims.len() - 1;
            for (name, p, n) in sample_programs(dtype) {
                let axes = if p.instrs().iter().any(|i| matches!(i, Instr::Reduce(..))) { 1 << axis } else { 0 };
                for layout in LAYOUTS {
                    let ops: Vec<Operand> = (0..n).map(|_| operand(&mut rng, layout, dtype, &dims, 3.0)).collect();
                    let dense: Vec<Operand> = ops.iter().map(|o| o.dense()).collect();
                    let params = vec![1e-5; p.params() as usize];
                    let a = run(&p, &dims, axes, &ops, &params);
                    let b = run(&p, &dims, axes, &dense, &params);
                    assert!(bits(&a) == bits(&b), "{name} {layout} {dims:?} {}", dtype.as_str());
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_where_the_row_axis_stands() {
    let mut rng = Rng(5);
    for n in [7usize, 1024, 1500, 9001] {
        let x = operand(&mut rng, "contiguous", DType::F32, &[6, n], 4.0);
        let p = programs::softmax(Class::F32, DType::F32).unwrap();
        let last = run(&p, &[6, n], 0b10, std::slice::from_ref(&x), &[])[0].to_f64();
        // The transposed view has the row first; its output is row-major over (n, 6).
        let t = Operand { layout: x.layout.permute(&[1, 0]).unwrap(), ..x };
        let first = run(&p, &[n, 6], 0b01, &[t], &[])[0].to_f64();
        for r in 0..6 {
            for j in 0..n {
                assert_eq!(last[r * n + j].to_bits(), first[j * 6 + r].to_bits(), "n {n}");
            }
        }
    }
}

/// What the additions of segments round away belongs to a sum wherever it is read: in the sweep that adds up, or in a later one.
#[test]
fn a_sum_of_many_segments_is_complete_however_its_row_lies() {
    for n in [2048usize, 3072, 8192] {
        // one addition to 4096² rounds a 1 away, several make 2 of it
        let number = |i: usize| match (i % n, i % 1024) {
            (0, _) => 4096.0,
            (_, 0) => 1.0,
            _ => 0.0,
        };
        let values: Vec<f64> = (0..2 * n).map(number).collect();
        let x = Operand::contiguous(DType::F32, &[2, n], &values);
        let w = Operand { layout: Strided::contiguous(&[1, n]).broadcast_to(&[2, n]).unwrap(), ..x.clone() };
        for (name, p, inputs) in sample_programs(DType::F32) {
            if !p.instrs().iter().any(|i| matches!(i, Instr::Reduce(..))) {
                continue;
            }
            let ops: Vec<Operand> = [x.clone(), w.clone(), w.clone()].into_iter().take(inputs).collect();
            let turned: Vec<Operand> =
                ops.iter().map(|o| Operand { layout: o.layout.permute(&[1, 0]).unwrap(), ..o.clone() }).collect();
            let params = vec![1e-5; p.params() as usize];
            let rows = run(&p, &[2, n], 0b10, &ops, &params)[0].to_f64();
            let columns = run(&p, &[n, 2], 0b01, &turned, &params)[0].to_f64();
            for (i, row) in rows.iter().enumerate() {
                assert_eq!(row.to_bits(), columns[i % n * 2 + i / n].to_bits(), "{name} {n} at {i}");
            }
        }
    }
}

/// A reduction alone.
fn reduce(f: ReduceFn, dtype: DType) -> RowProgram {
    let mut b = RowProgram::builder(Class::of(dtype).unwrap());
    let x = b.load(0);
    let y = b.reduce(f, x);
    b.output(y, dtype);
    b.finish().unwrap()
}

/// More rows than run together, in tiles of columns that have no data.
#[test]
fn many_rows_over_an_empty_middle_dim_are_what_each_reduction_starts_with() {
    for dtype in [DType::F32, DType::F64] {
        let x = Operand::contiguous(dtype, &[2, 0, 40], &[]);
        for (f, want) in [(ReduceFn::Sum, 0.0), (ReduceFn::Max, f64::NEG_INFINITY), (ReduceFn::Min, f64::INFINITY)] {
            let got = &run(&reduce(f, dtype), &[2, 0, 40], 0b010, std::slice::from_ref(&x), &[])[0];
            assert_eq!(got.to_f64(), vec![want; 80], "{f:?} {}", dtype.as_str());
        }
    }
}

/// Rows over a middle dim lie in tiles of columns; the same rows over the last dim do not.
#[test]
fn rows_over_a_middle_dim_have_the_bits_of_rows_over_the_last() {
    let mut rng = Rng(29);
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let mut all = sample_programs(dtype);
        all.retain(|(_, p, _)| p.instrs().iter().any(|i| matches!(i, Instr::Reduce(..))));
        all.push(("sum", reduce(ReduceFn::Sum, dtype), 1));
        all.push(("max", reduce(ReduceFn::Max, dtype), 1));
        all.push(("min", reduce(ReduceFn::Min, dtype), 1));
        for (n, m) in [(1usize, 16usize), (2, 300), (15, 37), (16, 64), (17, 33), (128, 20), (129, 37), (1500, 17)] {
            let (lead, dims) = (2usize, [2usize, n, m]);
            for (name, p, inputs) in &all {
                // which dims of the inputs are repeated
                for repeated in [&[][..], &[0], &[1], &[0, 2], &[0, 1, 2]] {
                    let ops: Vec<Operand> = (0..*inputs)
                        .map(|_| {
                            let mut values = rng.floats(lead * n * m, 3.0);
                            // some rows begin with, or hold, what is no number
                            for (i, v) in [(0, f64::NAN), (m / 2, f64::INFINITY), (m * (n / 2) + 3, f64::NAN)] {
                                values[i] = v;
                            }
                            let mut x = Operand::contiguous(dtype, &dims, &values);
                            for &d in repeated {
                                x.layout.strides[d] = 0;
                            }
                            x
                        })
                        .collect();
                    let params = vec![1e-5; p.params() as usize];
                    let middle = &run(p, &dims, 0b010, &ops, &params)[0];
                    let turned: Vec<Operand> = ops
                        .iter()
                        .map(|x| {
                            Operand { layout: x.layout.permute(&[0, 2, 1]).unwrap(), data: x.data.clone() }.dense()
                        })
                        .collect();
                    let last = &run(p, &[lead, m, n], 0b100, &turned, &params)[0];
                    let (middle, last) = (middle.bits(), last.bits());
                    let per_row = middle.len() == lead * m;
                    for l in 0..lead {
                        for (r, j) in (0..m).flat_map(|r| (0..if per_row { 1 } else { n }).map(move |j| (r, j))) {
                            let at = if per_row { l * m + r } else { (l * n + j) * m + r };
                            let want = last[if per_row { l * m + r } else { (l * m + r) * n + j }];
                            let what =
                                format!("{name} {} {n} x {m} repeated {repeated:?} at {l} {r} {j}", dtype.as_str());
                            assert_eq!(middle[at], want, "{what}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let mut rng = Rng(6);
    for dims in [vec![96usize, 1000], vec![4, 20_000], vec![300_000]] {
        for (name, p, n) in sample_programs(DType::F32) {
            let axes = 1 << (dims.len() - 1);
            let axes = if p.instrs().iter().any(|i| matches!(i, Instr::Reduce(..))) { axes } else { 0 };
            let ops: Vec<Operand> = (0..n).map(|_| operand(&mut rng, "contiguous", DType::F32, &dims, 3.0)).collect();
            let params = vec![1e-5; p.params() as usize];
            let one = on_threads(1, || bits(&run(&p, &dims, axes, &ops, &params)));
            let four = on_threads(4, || bits(&run(&p, &dims, axes, &ops, &params)));
            assert!(one == four, "{name} {dims:?}");
        }
    }
}

#[test]
fn bits_of_a_row_do_not_depend_on_its_company() {
    let mut rng = Rng(7);
    for n in [3usize, 100, 2049, 8192, 10_000] {
        let rows = 37;
        let x = operand(&mut rng, "contiguous", DType::F32, &[rows, n], 3.0);
        for (name, p, inputs) in sample_programs(DType::F32) {
            if inputs > 1 {
                continue;
            }
            let all = run(&p, &[rows, n], 0b10, std::slice::from_ref(&x), &[])[0].bits();
            for r in [0, 1, 17, rows - 1] {
                let one = Operand { data: x.data.clone(), layout: x.layout.narrow(0, r, 1).unwrap() };
                let alone = run(&p, &[1, n], 0b10, &[one], &[])[0].bits();
                assert!(alone == all[r * n..(r + 1) * n], "{name} n {n} row {r}");
            }
        }
    }
}

#[test]
fn sums_of_half_precision_rows_do_not_stall() {
    for dtype in [DType::F16, DType::BF16] {
        for n in [4096usize, 32_768, 65_520] {
            let x = Operand::contiguous(dtype, &[1, n], &vec![0.25; n]);
            let p = programs::softmax(Class::F32, dtype).unwrap();
            let total: f64 = run(&p, &[1, n], 0b10, &[x], &[])[0].to_f64().iter().sum();
            // Each of the n equal outputs is rounded once to the storage type.
            let each = Data::new(dtype, &[1.0 / n as f64]).to_f64()[0] * n as f64;
            assert!((total - each).abs() < 1e-9 && (total - 1.0).abs() < 4e-3, "{n}: {total}");
        }
    }
}

#[test]
fn random_half_rows_sum_to_one() {
    let mut rng = Rng(8);
    for dtype in [DType::F16, DType::BF16] {
        for n in [4096usize, 32_768, 65_520] {
            let x = operand(&mut rng, "contiguous", dtype, &[2, n], 2.0);
            let p = programs::softmax(Class::F32, dtype).unwrap();
            let y = run(&p, &[2, n], 0b10, &[x], &[])[0].to_f64();
            for row in y.chunks(n) {
                let total: f64 = row.iter().sum();
                // Rounding errors of n terms, each half an ulp at most and of either sign.
                assert!((total - 1.0).abs() < 4e-3, "{n}: {total}");
            }
        }
    }
}

#[test]
fn a_sum_has_the_documented_order() {
    // An independent statement of the order: 128 lanes, each the sum of every 128th of 1,024 elements; then the lanes in
    // halves and in f64, rounded once, then the segments, whose additions' errors are added last.
    let mut rng = Rng(9);
    for n in [1usize, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025, 5000, 8193, 20_000] {
        let v: Vec<f32> = rng.floats(n, 1.0).iter().map(|&v| v as f32).collect();
        let (mut total, mut lost) = (0f32, 0f32);
        for seg in v.chunks(1024) {
            let mut wide = [0f64; 128];
            for (lane, wide) in wide.iter_mut().enumerate() {
                let mut sum = 0f32;
                for x in seg.iter().skip(lane).step_by(128) {
                    sum += x;
                }
                *wide = f64::from(sum);
            }
            for w in [64, 32, 16, 8, 4, 2, 1] {
                for i in 0..w {
                    wide[i] += wide[i + w];
                }
            }
            // what an addition of two f32 rounds away is an f32, which their sum in f64 shows
            let (part, sum) = (wide[0] as f32, total + wide[0] as f32);
            lost += (f64::from(total) + f64::from(part) - f64::from(sum)) as f32;
            total = sum;
        }
        let total = total + lost;
        let mut b = RowProgram::builder(Class::F32);
        let x = b.load(0);
        let s = b.reduce(ReduceFn::Sum, x);
        b.output(s, DType::F32);
        let p = b.finish().unwrap();
        let x = Operand { data: Data::F32(v), layout: Strided::contiguous(&[n]) };
        assert_eq!(run(&p, &[n], 1, &[x], &[])[0], Data::F32(vec![total]), "n {n}");
    }
}
