//! The functions on plain tensors: values against f64, gradients against central differences and against
//! Candle's composed ops, for every layout.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_lazy_ops as ops;
use candle_lazy_ops::AttentionParams;
use common::{max_diff, Rng};

const CPU: Device = Device::Cpu;
const LAYOUTS: [&str; 4] = ["contiguous", "transposed", "narrowed", "broadcast"];

fn draw(rng: &mut Rng, dims: &[usize], dtype: DType) -> Tensor {
    let n = dims.iter().product();
    Tensor::from_vec(rng.floats(n, 1.5), dims, &CPU).unwrap().to_dtype(dtype).unwrap()
}

/// A variable, and how a function's argument of shape `dims` is seen in it.
struct Arg {
    var: Var,
    layout: &'static str,
    dims: Vec<usize>,
}

impl Arg {
    fn new(rng: &mut Rng, layout: &'static str, dims: &[usize], dtype: DType) -> Self {
        let rank = dims.len();
        let mut stored = dims.to_vec();
        let layout = match layout {
            "transposed" if rank < 2 => "contiguous",
            "broadcast" | "narrowed" if rank < 1 => "contiguous",
            l => l,
        };
        match layout {
            "transposed" => stored.swap(rank - 1, rank - 2),
            "narrowed" => stored[rank - 1] += 2,
            "broadcast" => stored[0] = 1,
            _ => {}
        }
        Arg { var: Var::from_tensor(&draw(rng, &stored, dtype)).unwrap(), layout, dims: dims.to_vec() }
    }

    /// The argument, from any tensor of the variable's shape.
    fn view(&self, t: &Tensor) -> Result<Tensor> {
        let last = self.dims.len().saturating_sub(1);
        match self.layout {
            "transposed" => t.transpose(last, last - 1),
            "narrowed" => t.narrow(last, 1, self.dims[last]),
            "broadcast" => t.broadcast_as(self.dims.as_slice()),
            _ => Ok(t.clone()),
        }
    }
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

type F<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Gradients of Σ weights·f(args) for each variable.
fn tape(args: &[Arg], f: F<'_>, weights: &Tensor) -> Vec<Vec<f64>> {
    let views: Vec<Tensor> = args.iter().map(|a| a.view(a.var.as_tensor()).unwrap()).collect();
    let y = f(&views).unwrap();
    let loss = y.mul(&weights.to_dtype(y.dtype()).unwrap()).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    args.iter().map(|a| flat(grads.get(a.var.as_tensor()).expect("every tracked input has a gradient"))).collect()
}

/// Central differences in f64.
fn differences(args: &[Arg], f: F<'_>, weights: &Tensor) -> Vec<Vec<f64>> {
    let loss = |values: &[Tensor]| -> f64 {
        let views: Vec<Tensor> = args.iter().zip(values).map(|(a, v)| a.view(v).unwrap()).collect();
        let y = f(&views).unwrap();
        y.mul(weights).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    let base: Vec<Tensor> = args.iter().map(|a| a.var.as_tensor().copy().unwrap()).collect();
    let h = 1e-5;
    (0..args.len())
        .map(|i| {
            let shape = base[i].dims().to_vec();
            let v = flat(&base[i]);
            (0..v.len())
                .map(|j| {
                    let at = |d: f64| {
                        let mut w = v.clone();
                        w[j] += d;
                        let mut values = base.clone();
                        values[i] = Tensor::from_vec(w, shape.as_slice(), &CPU).unwrap();
                        loss(&values)
                    };
                    (at(h) - at(-h)) / (2.0 * h)
                })
                .collect()
        })
        .collect()
}

/// Checks `f` in f64 against differences for arguments in every layout, and in f32, f16, bf16 against f64's gradients.
fn check_grads(name: &str, dims: &[&[usize]], f: F<'_>) {
    for layout in LAYOUTS {
        let mut rng = Rng(97);
        let args: Vec<Arg> = dims.iter().map(|d| Arg::new(&mut rng, layout, d, DType::F64)).collect();
        let views: Vec<Tensor> = args.iter().map(|a| a.view(a.var.as_tensor()).unwrap()).collect();
        let out = f(&views).unwrap();
        let weights = draw(&mut rng, out.dims(), DType::F64);
        let got = tape(&args, f, &weights);
        let want = differences(&args, f, &weights);
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let d = max_diff(g, w);
            assert!(d < 1e-6, "{name} {layout}: gradient of input {i} off by {d:e}");
        }
        for (dtype, limit) in [(DType::F32, 2e-5), (DType::F16, 4e-2), (DType::BF16, 0.3)] {
            let narrow: Vec<Arg> = args
                .iter()
                .map(|a| Arg {
                    var: Var::from_tensor(&a.var.as_tensor().to_dtype(dtype).unwrap()).unwrap(),
                    layout: a.layout,
                    dims: a.dims.clone(),
                })
                .collect();
            let low = tape(&narrow, f, &weights);
            for (i, (g, w)) in low.iter().zip(&got).enumerate() {
                let scale = w.iter().fold(1f64, |m, v| m.max(v.abs()));
                let d = max_diff(g, w);
                assert!(d < limit * scale, "{name} {layout} {}: input {i} off by {d:e}", dtype.as_str());
            }
        }
    }
}

/// Checks values and gradients in f32 against a composition of Candle's own ops.
fn check_composed(name: &str, dims: &[&[usize]], f: F<'_>, composed: F<'_>) {
    for layout in LAYOUTS {
        let mut rng = Rng(98);
        let args: Vec<Arg> = dims.iter().map(|d| Arg::new(&mut rng, layout, d, DType::F32)).collect();
        let views: Vec<Tensor> = args.iter().map(|a| a.view(a.var.as_tensor()).unwrap()).collect();
        let (y, e) = (f(&views).unwrap(), composed(&views).unwrap());
        assert_eq!(y.dims(), e.dims(), "{name}");
        let d = max_diff(&flat(&y), &flat(&e));
        assert!(d < 1e-5, "{name} {layout}: values off by {d:e}");
        let weights = draw(&mut rng, y.dims(), DType::F32);
        let (got, want) = (tape(&args, f, &weights), tape(&args, composed, &weights));
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let scale = w.iter().fold(1f64, |m, v| m.max(v.abs()));
            let d = max_diff(g, w);
            assert!(d < 2e-5 * scale, "{name} {layout}: gradient of input {i} off by {d:e}");
        }
    }
}

#[test]
fn softmax_gradients_over_every_dim() {
    for dim in 0..3 {
        check_grads("softmax", &[&[2, 3, 4]], &|a| ops::softmax(&a[0], dim));
        check_composed("softmax", &[&[2, 3, 4]], &|a| ops::softmax(&a[0], dim), &|a| {
            candle_nn::ops::softmax(&a[0], dim)
        });
    }
}

#[test]
fn log_softmax_gradients_over_every_dim() {
    for dim in 0..3 {
        check_grads("log-softmax", &[&[2, 3, 4]], &|a| ops::log_softmax(&a[0], dim));
        check_composed("log-softmax", &[&[2, 3, 4]], &|a| ops::log_softmax(&a[0], dim), &|a| {
            candle_nn::ops::log_softmax(&a[0], dim)
        });
    }
}

#[test]
fn rms_norm_gradients() {
    check_grads("rms-norm", &[&[2, 3, 5], &[5]], &|a| ops::rms_norm(&a[0], Some(&a[1]), 1e-5));
    check_grads("rms-norm without weight", &[&[3, 5]], &|a| ops::rms_norm(&a[0], None, 1e-5));
    check_composed("rms-norm", &[&[2, 3, 5], &[5]], &|a| ops::rms_norm(&a[0], Some(&a[1]), 1e-5), &|a| {
        candle_nn::ops::rms_norm_slow(&a[0], &a[1], 1e-5)
    });
}

#[test]
fn layer_norm_gradients() {
    check_grads("layer-norm", &[&[2, 3, 5], &[5], &[5]], &|a| ops::layer_norm(&a[0], Some(&a[1]), Some(&a[2]), 1e-5));
    check_grads("layer-norm, weight", &[&[3, 5], &[5]], &|a| ops::layer_norm(&a[0], Some(&a[1]), None, 1e-5));
    check_grads("layer-norm, bias", &[&[3, 5], &[5]], &|a| ops::layer_norm(&a[0], None, Some(&a[1]), 1e-5));
    check_grads("layer-norm, plain", &[&[3, 5]], &|a| ops::layer_norm(&a[0], None, None, 1e-5));
    check_composed(
        "layer-norm",
        &[&[2, 3, 5], &[5], &[5]],
        &|a| ops::layer_norm(&a[0], Some(&a[1]), Some(&a[2]), 1e-5),
        &|a| candle_nn::ops::layer_norm_slow(&a[0], &a[1], &a[2], 1e-5),
    );
}

#[test]
fn group_norm_gradients() {
    let all: &[&[usize]] = &[&[2, 6, 4], &[6], &[6]];
    check_grads("group-norm", all, &|t| ops::group_norm(&t[0], 3, Some(&t[1]), Some(&t[2]), 0.1));
    check_grads("group-norm", &all[..2], &|t| ops::group_norm(&t[0], 2, Some(&t[1]), None, 0.1));
    check_grads("group-norm", &all[..2], &|t| ops::group_norm(&t[0], 1, None, Some(&t[1]), 0.1));
    check_grads("group-norm", &[&[1, 4, 2, 3]], &|t| ops::group_norm(&t[0], 4, None, None, 0.1));
}

#[test]
fn cross_entropy_gradients() {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let targets = Tensor::new(&[4u32, 0, 2], &CPU).unwrap().to_dtype(dtype).unwrap();
        check_grads("cross-entropy", &[&[3, 5]], &|t| ops::cross_entropy(&t[0], &targets));
    }
}

#[test]
fn a_target_that_is_its_types_largest_value_picks_nothing() {
    let x = Var::from_tensor(&Tensor::new(&[[1f32, 2., 4.], [3., -1., 0.]], &CPU).unwrap()).unwrap();
    let both = ops::cross_entropy(x.as_tensor(), &Tensor::new(&[1i64, i64::MAX], &CPU).unwrap()).unwrap();
    let one = ops::cross_entropy(&x.narrow(0, 0, 1).unwrap(), &Tensor::new(&[1i64], &CPU).unwrap()).unwrap();
    assert_eq!(flat(&both)[0] * 2.0, flat(&one)[0]);
    let grads = flat(both.backward().unwrap().get(x.as_tensor()).unwrap());
    assert!(grads[..3].iter().all(|g| *g != 0.0) && grads[3..].iter().all(|g| *g == 0.0), "{grads:?}");
}

#[test]
fn embedding_gradients() {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        for dims in [&[5usize][..], &[2, 3], &[1, 2, 2], &[]] {
            let count = dims.iter().product::<usize>();
            let ids: Vec<u32> = (0..count as u32).map(|i| i * i % 4).collect();
            let ids = Tensor::from_vec(ids, dims, &CPU).unwrap().to_dtype(dtype).unwrap();
            check_grads("embedding", &[&[4, 3]], &|t| ops::embedding(&t[0], &ids));
            let stepped = Tensor::stack(&[&ids, &ids], ids.rank()).unwrap().narrow(ids.rank(), 1, 1).unwrap();
            check_grads("embedding", &[&[4, 3]], &|t| ops::embedding(&t[0], &stepped.squeeze(ids.rank())?));
        }
    }
}

#[test]
fn an_id_that_is_its_types_largest_value_is_no_row() {
    let table = Var::from_tensor(&Tensor::new(&[[1f32, 2.], [3., 4.]], &CPU).unwrap()).unwrap();
    let y = ops::embedding(table.as_tensor(), &Tensor::new(&[1u32, u32::MAX, 1], &CPU).unwrap()).unwrap();
    assert_eq!(flat(&y), [3.0, 4.0, 0.0, 0.0, 3.0, 4.0]);
    assert_eq!(flat(y.backward().unwrap().get(table.as_tensor()).unwrap()), [0.0, 0.0, 2.0, 2.0]);
}

#[test]
fn activation_gradients() {
    check_grads("gelu", &[&[3, 7]], &|a| ops::gelu(&a[0]));
    check_grads("gelu-erf", &[&[3, 7]], &|a| ops::gelu_erf(&a[0]));
    check_grads("silu", &[&[3, 7]], &|a| ops::silu(&a[0]));
    check_grads("silu-mul", &[&[3, 7], &[3, 7]], &|a| ops::silu_mul(&a[0], &a[1]));
    check_grads("gelu-mul", &[&[3, 7], &[3, 7]], &|a| ops::gelu_mul(&a[0], &a[1]));
    check_grads("gelu-erf-mul", &[&[3, 7], &[3, 7]], &|a| ops::gelu_erf_mul(&a[0], &a[1]));
    check_composed("gelu", &[&[3, 7]], &|a| ops::gelu(&a[0]), &|a| a[0].gelu());
    check_composed("gelu-erf", &[&[3, 7]], &|a| ops::gelu_erf(&a[0]), &|a| a[0].gelu_erf());
    check_composed("silu", &[&[3, 7]], &|a| ops::silu(&a[0]), &|a| a[0].silu());
    check_composed("silu-mul", &[&[3, 7], &[3, 7]], &|a| ops::silu_mul(&a[0], &a[1]), &|a| a[0].silu()?.mul(&a[1]));
}

#[test]
fn matmul_gradients_with_broadcast_batches() {
    check_grads("matmul", &[&[3, 4], &[4, 2]], &|a| ops::matmul(&a[0], &a[1]));
    check_grads("matmul, shared right", &[&[2, 3, 4], &[4, 2]], &|a| ops::matmul(&a[0], &a[1]));
    check_grads("matmul, both", &[&[2, 1, 3, 4], &[3, 4, 2]], &|a| ops::matmul(&a[0], &a[1]));
    check_grads("matmul, shared left", &[&[3, 4], &[2, 4, 2]], &|a| ops::matmul(&a[0], &a[1]));
}

#[test]
fn linear_gradients() {
    check_grads("linear", &[&[2, 3, 4], &[5, 4], &[5]], &|a| ops::linear(&a[0], &a[1], Some(&a[2])));
    check_grads("linear, one row", &[&[4], &[5, 4], &[5]], &|a| ops::linear(&a[0], &a[1], Some(&a[2])));
    check_composed("linear", &[&[2, 3, 4], &[5, 4], &[5]], &|a| ops::linear(&a[0], &a[1], Some(&a[2])), &|a| {
        a[0].broadcast_matmul(&a[1].t()?.contiguous()?)?.broadcast_add(&a[2])
    });
}

#[test]
fn lora_gradients_reach_x_a_b_and_the_base() {
    check_grads("lora", &[&[2, 3, 4], &[4, 2], &[2, 5]], &|a| ops::lora(&a[0], &a[1], &a[2], 0.7));
    check_grads("lora-add", &[&[2, 3, 5], &[2, 3, 4], &[4, 2], &[2, 5]], &|a| {
        ops::lora_add(&a[0], &a[1], &a[2], &a[3], 0.7)
    });
    check_composed(
        "lora-add",
        &[&[3, 5], &[3, 4], &[4, 2], &[2, 5]],
        &|a| ops::lora_add(&a[0], &a[1], &a[2], &a[3], 0.7),
        &|a| {
            let c = |t: &Tensor| t.contiguous();
            a[0].add(&(c(&a[1])?.matmul(&c(&a[2])?)?.matmul(&c(&a[3])?)? * 0.7)?)
        },
    );
}

#[test]
fn rope_gradients_reach_x_and_the_tables() {
    check_grads("rope", &[&[2, 2, 3, 4], &[3, 2], &[3, 2]], &|a| ops::rope(&a[0], &a[1], &a[2]));
    check_grads("rope-i", &[&[2, 2, 3, 4], &[3, 2], &[3, 2]], &|a| ops::rope_i(&a[0], &a[1], &a[2]));
    check_grads("rope, batched, long tables", &[&[2, 2, 3, 4], &[2, 5, 2], &[2, 5, 2]], &|a| {
        ops::rope(&a[0], &a[1], &a[2])
    });
    check_composed("rope", &[&[2, 2, 3, 4], &[3, 2], &[3, 2]], &|a| ops::rope(&a[0], &a[1], &a[2]), &|a| {
        candle_nn::rotary_emb::rope_slow(&a[0].contiguous()?, &a[1], &a[2])
    });
    check_composed("rope-i", &[&[2, 2, 3, 4], &[3, 2], &[3, 2]], &|a| ops::rope_i(&a[0], &a[1], &a[2]), &|a| {
        candle_nn::rotary_emb::rope_i_slow(&a[0].contiguous()?, &a[1], &a[2])
    });
}

const QKV: [&[usize]; 3] = [&[1, 4, 3, 2], &[1, 2, 5, 2], &[1, 2, 5, 3]];

#[test]
fn attention_gradients_reach_q_k_and_v() {
    for p in [
        AttentionParams::new(0.7),
        AttentionParams::new(0.7).causal(),
        AttentionParams { softcap: Some(1.5), window: Some(3), ..AttentionParams::new(0.7).causal() },
    ] {
        check_grads("attention", &QKV, &|a| ops::attention(&a[0], &a[1], &a[2], None, &p));
    }
}

#[test]
fn attention_gradients_with_a_fixed_mask() {
    let mask = draw(&mut Rng(5), &[3, 5], DType::F32);
    let p = AttentionParams::new(0.7);
    check_grads("attention", &QKV, &|a| ops::attention(&a[0], &a[1], &a[2], Some(&mask), &p));
}

#[test]
fn attention_gradients_reach_a_tracked_mask() {
    let p = AttentionParams { softcap: Some(2.0), ..AttentionParams::new(0.7).causal() };
    let dims: Vec<&[usize]> = QKV.iter().copied().chain([&[4usize, 3, 5][..]]).collect();
    check_grads("attention with mask", &dims, &|a| ops::attention(&a[0], &a[1], &a[2], Some(&a[3]), &p));
}

#[test]
fn the_kernel_and_the_composition_of_attention_agree() {
    let mut rng = Rng(6);
    let (q, k, v) = (
        draw(&mut rng, &[2, 4, 70, 16], DType::F32),
        draw(&mut rng, &[2, 2, 90, 16], DType::F32),
        draw(&mut rng, &[2, 2, 90, 8], DType::F32),
    );
    let mask = draw(&mut rng, &[2, 1, 70, 90], DType::F32);
    let tracked = Var::from_tensor(&mask).unwrap();
    let p = AttentionParams { softcap: Some(9.0), window: Some(40), ..AttentionParams::new(0.25).causal() };
    let a = ops::attention(&q, &k, &v, Some(&mask), &p).unwrap();
    let b = ops::attention(&q, &k, &v, Some(tracked.as_tensor()), &p).unwrap();
    assert!(max_diff(&flat(&a), &flat(&b)) < 1e-5);
}

#[test]
fn one_tensor_in_several_places() {
    // q, k and v are views of one storage, x is both sides of a product, and a mask shares it too.
    let v = Var::from_tensor(&draw(&mut Rng(7), &[1, 2, 4, 4], DType::F64)).unwrap();
    let x = v.as_tensor();
    let y = ops::attention(x, x, x, Some(&x.detach().narrow(1, 0, 1).unwrap()), &AttentionParams::new(0.5)).unwrap();
    assert!(y.sum_all().unwrap().backward().unwrap().get(x).is_some());
    let y = ops::silu_mul(x, x).unwrap();
    let g = y.sum_all().unwrap().backward().unwrap();
    let e = (x.silu().unwrap() * x).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(max_diff(&flat(g.get(x).unwrap()), &flat(e.get(x).unwrap())) < 1e-12);
}

#[test]
fn a_backward_can_run_twice() {
    let v = Var::from_tensor(&draw(&mut Rng(8), &[3, 4], DType::F32)).unwrap();
    let loss = ops::softmax(v.as_tensor(), 1).unwrap().sqr().unwrap().sum_all().unwrap();
    let a = flat(loss.backward().unwrap().get(v.as_tensor()).unwrap());
    let b = flat(loss.backward().unwrap().get(v.as_tensor()).unwrap());
    assert_eq!(a, b);
}

#[test]
fn half_precision_gradients_of_shared_parameters_do_not_stall() {
    // 8,192 rows each add 1 to the bias gradient: a sum kept in f16 would stop at 2,048, in bf16 at 256.
    for dtype in [DType::F16, DType::BF16] {
        let rows = 8192;
        let x = draw(&mut Rng(9), &[rows, 4], dtype);
        let ones = Tensor::ones(4, dtype, &CPU).unwrap();
        let bias = Var::from_tensor(&Tensor::zeros(4, dtype, &CPU).unwrap()).unwrap();
        let y = ops::layer_norm(&x, Some(&ones), Some(bias.as_tensor()), 1e-5).unwrap();
        let g = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(g.get(bias.as_tensor()).unwrap()), [rows as f64; 4]);
        let w = Tensor::ones((4, 4), dtype, &CPU).unwrap();
        let y = ops::linear(&x, &w, Some(bias.as_tensor())).unwrap();
        let g = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(g.get(bias.as_tensor()).unwrap()), [rows as f64; 4]);
    }
}

#[test]
fn half_precision_values_round_once() {
    for dtype in [DType::F16, DType::BF16] {
        let x = draw(&mut Rng(10), &[5, 300], dtype);
        let (wide, ulp) = (x.to_dtype(DType::F64).unwrap(), common::ulp(dtype, 1.0));
        let w = Tensor::ones(300, DType::F64, &CPU).unwrap();
        let pairs = [
            (ops::softmax(&x, 1).unwrap(), ops::softmax(&wide, 1).unwrap()),
            (ops::gelu(&x).unwrap(), ops::gelu(&wide).unwrap()),
            (
                ops::rms_norm(&x, Some(&w.to_dtype(dtype).unwrap()), 1e-6).unwrap(),
                ops::rms_norm(&wide, Some(&w), 1e-6).unwrap(),
            ),
        ];
        for (got, want) in pairs {
            let d = max_diff(&flat(&got), &flat(&want));
            assert!(d <= 2.0 * ulp, "{d:e}");
        }
    }
}
