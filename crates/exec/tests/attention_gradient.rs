//! The gradients of attention: those of its parts, without a matrix of scores.

#![allow(clippy::unwrap_used)] // what tests share fails by unwrapping, as tests do

use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::{eval_all_with, eval_all_with_report, run, vjp, AttentionOptions, EvalOptions, LazyTensor};
use candle_lazy_ops::kernels::with_threads;

const CPU: Device = Device::Cpu;

fn random(dims: &[usize], dtype: DType) -> LazyTensor {
    LazyTensor::from(Tensor::randn(0f64, 1.0, dims, &CPU).unwrap().to_dtype(dtype).unwrap())
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// q, k, v (and a mask) as variables or not, the result, and its cotangent.
fn recorded(x: &[LazyTensor], mask: Option<&LazyTensor>, g: &LazyTensor, how: &AttentionOptions) -> Vec<LazyTensor> {
    let x: Vec<LazyTensor> = x.iter().map(|x| x.variable().unwrap()).collect();
    let y = LazyTensor::attention(&x[0], &x[1], &x[2], mask, how).unwrap();
    vjp(&[&y], &[g], &[&x[0], &x[1], &x[2]]).unwrap().into_iter().flatten().collect()
}

#[test]
fn gradients_are_those_of_the_parts() {
    let kinds = [
        AttentionOptions::new(0.3),
        AttentionOptions::new(0.3).causal(true),
        AttentionOptions { softcap: Some(2.0), window: Some(9), ..AttentionOptions::new(0.3).causal(true) },
    ];
    // an ulp of f32 is 2⁻²³; both ways sum up to a few hundred terms of the largest gradient's size, in f16 and bf16 after rounding the parts
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        for (b, h, hk, s, t, d, dv) in [(2, 6, 2, 33, 70, 16, 8), (1, 3, 3, 1, 1, 4, 4), (1, 4, 1, 100, 131, 20, 12)] {
            // transposed, as heads come out of a projection
            let heads = |h: usize, s: usize, d: usize| random(&[b, s, h, d], dtype).transpose(1, 2).unwrap();
            let x = [heads(h, s, d), heads(hk, t, d), heads(hk, t, dv)];
            let (g, mask) = (heads(h, s, dv), random(&[s, t], dtype));
            for (how, mask) in kinds.iter().flat_map(|how| [(how, None), (how, Some(&mask))]) {
                let all = recorded(&x, mask, &g, how);
                let (ours, report) = eval_all_with_report(&all.iter().collect::<Vec<_>>()).unwrap();
                assert_eq!(report.kernels.get("attention_backward"), Some(&1), "{:?}", report.kernels);
                let again = recorded(&x, mask, &g, how);
                let options = EvalOptions { decompose: true, ..EvalOptions::default() };
                let (parts, report) = eval_all_with(&again.iter().collect::<Vec<_>>(), &options).unwrap();
                assert_eq!(report.kernels.get("attention_backward"), None);
                for (i, (ours, parts)) in ours.iter().zip(&parts).enumerate() {
                    assert_eq!((ours.dims(), ours.dtype()), (parts.dims(), dtype));
                    let (ours, parts) = (values(ours), values(parts));
                    let largest = parts.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                    for (a, b) in ours.iter().zip(&parts) {
                        let off = (a - b).abs() / largest.max(1e-3);
                        assert!(off <= tolerance, "{dtype:?} {how:?} input {i}: {a} and {b} of {largest}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_mask_that_needs_a_gradient_goes_through_the_parts() {
    let x = [random(&[1, 2, 5, 4], DType::F32), random(&[1, 1, 6, 4], DType::F32), random(&[1, 1, 6, 3], DType::F32)];
    let (mask, g) = (random(&[5, 6], DType::F32).variable().unwrap(), random(&[1, 2, 5, 3], DType::F32));
    let (q, how) = (x[0].variable().unwrap(), AttentionOptions::new(0.5));
    let y = LazyTensor::attention(&q, &x[1], &x[2], Some(&mask), &how).unwrap();
    let found: Vec<LazyTensor> = vjp(&[&y], &[&g], &[&q, &mask]).unwrap().into_iter().flatten().collect();
    let (got, report) = eval_all_with_report(&found.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(report.kernels.get("attention_backward"), None);
    assert_eq!((got[0].dims(), got[1].dims()), (&[1, 2, 5, 4][..], &[5, 6][..]));
    // the same q by the kernel
    let q = x[0].variable().unwrap();
    let y = LazyTensor::attention(&q, &x[1], &x[2], Some(&mask.detach()), &how).unwrap();
    let alone = vjp(&[&y], &[&g], &[&q]).unwrap().remove(0).unwrap().eval().unwrap();
    for (a, b) in values(&alone).iter().zip(values(&got[0])) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn no_matrix_of_scores_is_held() {
    let planned = |s: usize| {
        let x = [(); 3].map(|()| random(&[1, 2, s, 32], DType::F32));
        let found = recorded(&x, None, &random(&[1, 2, s, 32], DType::F32), &AttentionOptions::new(0.2).causal(true));
        // each thread has scratch of its own
        with_threads(2, || run::peak_bytes(&found.iter().collect::<Vec<_>>(), &EvalOptions::default()).unwrap())
    };
    let (once, twice, four) = (planned(1024), planned(2048), planned(4096));
    // a line: the second step is twice the first, where a square would make it four times that
    let (first, second) = (twice - once, four - twice);
    assert!(second <= first * 5 / 2, "{once} {twice} {four}");
    // one head's scores alone would be 64 MiB
    assert!(four < 4096 * 4096 * 4, "{four}");
}
