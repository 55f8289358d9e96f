//! Softmax, norms, activations and chains of them.

use super::super::Error;
use super::{by_row, bytes_of, eagerly, exactly, f64s, lazily, randn, ring, Row, Work, RING};
use candle_core::{DType, Result as CandleResult, Tensor, D};
use candle_lazy::exec::{LazyTensor, Result as LazyResult};

const SMALL: [usize; 3] = [4, 16, 1024];
const LARGE: [usize; 3] = [8, 128, 4096];
const EPS: f64 = 1e-6;

type Eager = fn(&Tensor, &[Tensor]) -> CandleResult<Tensor>;
type Lazy = fn(&LazyTensor, &[LazyTensor]) -> LazyResult<LazyTensor>;

/// Functions of x and of parameters that do not change: `params` are rows of x's width.
struct Map {
    params: usize,
    /// Whether the parameters have x's shape.
    whole: bool,
    /// The first is precise enough for f64.
    eager: &'static [Eager],
    lazy: Lazy,
}

fn work(dims: [usize; 3], map: &Map) -> Result<Work, Error> {
    let xs = ring(&dims, DType::F32)?;
    let shape: &[usize] = if map.whole { &dims } else { &dims[2..] };
    let params = (0..map.params).map(|_| randn(shape, DType::F32)).collect::<Result<Vec<_>, _>>()?;
    let one = xs.first().map_or(0, bytes_of);
    let params_bytes: usize = params.iter().map(bytes_of).sum();
    let lazies: Vec<LazyTensor> = params.iter().map(LazyTensor::from).collect();
    let eager = map.eager.iter().map(|&f| {
        let params = params.clone();
        eagerly(&xs, move |x| f(x, &params))
    });
    let (first, lazy) = (map.eager[0], map.lazy);
    let wide = params.iter().map(f64s).collect::<Result<Vec<_>, _>>()?;
    Ok(Work {
        eager: eager.collect(),
        lazy: lazily(&xs, move |x| lazy(x, &lazies)),
        rough: None,
        exact: exactly(&xs, move |x| by_row(first(x, &wide)?)),
        bytes: 2 * one + params_bytes,
        footprint: (RING + 1) * one + params_bytes,
        flops: 0.0,
        per: 1.0,
    })
}

fn rms(x: &Tensor, w: &Tensor) -> CandleResult<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(w)
}

fn layer(x: &Tensor, w: &Tensor, b: &Tensor) -> CandleResult<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(w)?.broadcast_add(b)
}

const SOFTMAX: Map = Map {
    params: 0,
    whole: false,
    eager: &[|x, _| candle_nn::ops::softmax(x, 2), |x, _| candle_nn::ops::softmax_last_dim(x)],
    lazy: |x, _| x.softmax(2),
};
const SOFTMAX_MID: Map =
    Map { params: 0, whole: false, eager: &[|x, _| candle_nn::ops::softmax(x, 1)], lazy: |x, _| x.softmax(1) };
const RMS: Map = Map {
    params: 1,
    whole: false,
    eager: &[|x, p| rms(x, &p[0]), |x, p| candle_nn::ops::rms_norm(x, &p[0], EPS as f32)],
    lazy: |x, p| x.rms_norm(Some(&p[0]), EPS),
};
const LAYER: Map = Map {
    params: 2,
    whole: false,
    eager: &[|x, p| layer(x, &p[0], &p[1]), |x, p| candle_nn::ops::layer_norm(x, &p[0], &p[1], EPS as f32)],
    lazy: |x, p| x.layer_norm(Some(&p[0]), Some(&p[1]), EPS),
};
const CHAIN: Map = Map {
    params: 0,
    whole: false,
    eager: &[|x, _| ((x.silu()?.mul(x)? + x)? * 2.0)?.affine(1.0, 1.0)?.tanh()],
    lazy: |x, _| ((x.silu()?.mul(x)? + x)? * 2.0)?.affine(1.0, 1.0)?.tanh(),
};
const RESIDUAL: Map = Map {
    params: 2,
    whole: true,
    eager: &[
        |x, p| rms(&(x + &p[0])?, &p[1].get(0)?.get(0)?),
        |x, p| candle_nn::ops::rms_norm(&(x + &p[0])?, &p[1].get(0)?.get(0)?, EPS as f32),
    ],
    lazy: |x, p| (x + &p[0])?.rms_norm(Some(&p[1].get(0)?.get(0)?), EPS),
};
const BIAS_GELU: Map = Map {
    params: 1,
    whole: false,
    eager: &[|x, p| x.broadcast_add(&p[0])?.gelu_erf()],
    lazy: |x, p| x.broadcast_add(&p[0])?.gelu_erf(),
};
const SWIGLU: Map =
    Map { params: 1, whole: true, eager: &[|x, p| x.silu()?.mul(&p[0])], lazy: |x, p| x.silu_mul(&p[0]) };

/// A function of x alone.
macro_rules! unary {
    ($f:ident) => {
        Map { params: 0, whole: false, eager: &[|x, _| x.$f()], lazy: |x, _| x.$f() }
    };
}

pub(super) fn rows() -> Vec<Row> {
    let row = |name: &str, dims: [usize; 3], floor: f64, map: Map| {
        Row::new(format!("{name}/{}x{}x{}", dims[0], dims[1], dims[2]), floor, move || work(dims, &map))
    };
    vec![
        row("softmax", SMALL, 6.0, SOFTMAX),
        row("softmax", LARGE, 4.0, SOFTMAX),
        row("softmax-mid", SMALL, 6.0, SOFTMAX_MID),
        row("rms_norm", SMALL, 2.5, RMS),
        row("rms_norm", LARGE, 2.0, RMS),
        row("layer_norm", SMALL, 4.0, LAYER),
        row("layer_norm", LARGE, 2.0, LAYER),
        row("gelu", SMALL, 20.0, unary!(gelu)),
        row("gelu_erf", SMALL, 6.0, unary!(gelu_erf)),
        row("silu", SMALL, 4.0, unary!(silu)),
        row("exp", SMALL, 4.0, unary!(exp)),
        row("tanh", SMALL, 4.0, unary!(tanh)),
        row("chain5", SMALL, 15.0, CHAIN),
        row("chain5", LARGE, 10.0, CHAIN),
        row("residual_rms", SMALL, 6.0, RESIDUAL),
        row("bias_gelu_erf", SMALL, 8.0, BIAS_GELU),
        row("swiglu", SMALL, 8.0, SWIGLU),
    ]
}
