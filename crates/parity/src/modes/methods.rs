//! Methods that stand for no single op but are made of several: `LazyTensor`'s against Candle's, bit for bit, in every dtype and
//! layout, with gradients.

use super::{gradient, Cell, Mode, Outcome};
use crate::case::{Domain, InputSpec, Layout};
use crate::cases::{FLOATS, INTEGERS};
use crate::compare::same_bits;
use crate::rng::Rng;
use crate::value::to_tensor;
use crate::verify::{caught, Options, Summary};
use crate::Result;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_lazy_exec::LazyTensor;
use candle_nn::encoding::one_hot;
use half::{bf16, f16};

type Lazily = fn(&[LazyTensor], DType) -> candle_lazy_exec::Result<Vec<LazyTensor>>;
type Eagerly = fn(&[Tensor], DType) -> candle_core::Result<Vec<Tensor>>;

struct Method {
    name: &'static str,
    /// Of the dtype of the cell; ids where `ids` says how many there are.
    inputs: &'static [&'static [usize]],
    ids: Option<usize>,
    lazily: Lazily,
    eagerly: Eagerly,
}

/// The same code on both sides: of the inputs, and of the type (ours or Candle's) and the dtype where there are none.
macro_rules! method {
    ($name:literal, $inputs:expr, |$x:ident| $made:expr) => {
        Method { name: $name, inputs: $inputs, ids: None, lazily: |$x, _| Ok($made), eagerly: |$x, _| Ok($made) }
    };
    ($name:literal, $inputs:expr, |$t:ident, $x:ident, $dtype:ident| $made:expr) => {
        Method {
            name: $name,
            inputs: $inputs,
            ids: None,
            lazily: |$x, $dtype| {
                type $t = LazyTensor;
                Ok($made)
            },
            eagerly: |$x, $dtype| {
                type $t = Tensor;
                Ok($made)
            },
        }
    };
}

const X: &[&[usize]] = &[&[3, 5, 4]];
const CPU: Device = Device::Cpu;

const NONE: &[&[usize]] = &[];
const METHODS: &[Method] = &[
    method!("pad_with_zeros(1, 2, 1)", X, |x| vec![x[0].pad_with_zeros(1, 2, 1)?]),
    method!("pad_with_zeros(2, 0, 3)", X, |x| vec![x[0].pad_with_zeros(D::Minus1, 0, 3)?]),
    method!("pad_with_zeros(0, 0, 0)", X, |x| vec![x[0].pad_with_zeros(0, 0, 0)?]),
    method!("pad_with_same(1, 2, 1)", X, |x| vec![x[0].pad_with_same(1, 2, 1)?]),
    method!("pad_with_same(2, 0, 2)", X, |x| vec![x[0].pad_with_same(2, 0, 2)?]),
    method!("repeat(2, 1, 3)", X, |x| vec![x[0].repeat((2, 1, 3))?]),
    method!("repeat(2, 1, 1, 2), a dim more", X, |x| vec![x[0].repeat((2, 1, 1, 2))?]),
    method!("chunk(2, 1)", X, |x| x[0].chunk(2, 1)?),
    method!("chunk(8, 1), more than there are", X, |x| x[0].chunk(8, 1)?),
    Method {
        name: "split([1, 3, 1], 1)",
        inputs: X,
        ids: None,
        lazily: |x, _| x[0].split(&[1, 3, 1], 1),
        // Candle has no method for it
        eagerly: |x, _| Ok(vec![x[0].narrow(1, 0, 1)?, x[0].narrow(1, 1, 3)?, x[0].narrow(1, 4, 1)?]),
    },
    method!("pad, repeat, roll and flatten of nothing", &[&[2, 0, 4]], |x| vec![
        x[0].pad_with_zeros(1, 1, 2)?,
        x[0].pad_with_zeros(0, 1, 0)?,
        x[0].repeat((1, 2, 2))?,
        x[0].roll(1, 2)?,
        x[0].flatten_all()?,
    ]),
    method!("flatten(0, 1)", X, |x| vec![x[0].flatten(0, 1)?]),
    method!("flatten_all, flatten_from, flatten_to", X, |x| {
        vec![x[0].flatten_all()?, x[0].flatten_from(1)?, x[0].flatten_to(1)?]
    }),
    method!("squeeze, unsqueeze", &[&[3, 1, 4]], |x| vec![
        x[0].squeeze(1)?,
        x[0].unsqueeze(1)?,
        x[0].unsqueeze(D::Minus1)?
    ]),
    method!("transpose, t", X, |x| vec![x[0].transpose(0, 2)?, x[0].t()?]),
    method!("roll", X, |x| vec![x[0].roll(2, 1)?, x[0].roll(-1, 0)?, x[0].roll(0, 2)?]),
    Method {
        name: "flip",
        inputs: X,
        ids: None,
        lazily: |x, _| Ok(vec![x[0].flip(&[0, 2])?, x[0].flip(&[1])?]),
        // Candle's selects by index, and its index_select takes what lies in order
        eagerly: |x, _| Ok(vec![x[0].contiguous()?.flip(&[0, 2])?, x[0].contiguous()?.flip(&[1])?]),
    },
    method!("get, get_on_dim", X, |x| vec![x[0].get(1)?, x[0].get_on_dim(2, 3)?]),
    method!("broadcast_left, expand", &[&[3, 1, 4]], |x| vec![x[0].broadcast_left(2)?, x[0].expand((3, 2, 4))?]),
    method!("stack", &[&[3, 4], &[3, 4]], |T, x, _d| vec![T::stack(x, 0)?, T::stack(x, 1)?, T::stack(x, 2)?]),
    method!("meshgrid", &[&[3], &[4]], |T, x, _d| {
        let (mut grids, more) = (T::meshgrid(x, false)?, T::meshgrid(x, true)?);
        grids.extend(more);
        grids
    }),
    method!("slice_scatter0", &[&[5, 4], &[2, 4]], |x| vec![x[0].slice_scatter0(&x[1], 2)?]),
    method!("slice_scatter(1)", &[&[3, 5], &[3, 2]], |x| vec![x[0].slice_scatter(&x[1], 1, 2)?]),
    method!("slice_assign", &[&[5, 4], &[2, 3]], |x| vec![x[0].slice_assign(&[1..3, 0..3], &x[1])?]),
    method!("narrow of a negative dim", X, |x| vec![x[0].narrow(D::Minus2, 1, 2)?]),
    method!("max_all, min_all", X, |x| vec![x[0].max_all()?, x[0].min_all()?]),
    method!("zeros_like, ones_like", X, |x| vec![x[0].zeros_like()?, x[0].ones_like()?]),
    method!("tril2", NONE, |T, _x, d| vec![T::tril2(1, d, &CPU)?, T::tril2(5, d, &CPU)?, T::tril2(0, d, &CPU)?]),
    method!("triu2", NONE, |T, _x, d| vec![T::triu2(1, d, &CPU)?, T::triu2(5, d, &CPU)?, T::triu2(0, d, &CPU)?]),
    method!("eye", NONE, |T, _x, d| vec![T::eye(1, d, &CPU)?, T::eye(6, d, &CPU)?, T::eye(0, d, &CPU)?]),
    method!("zeros, ones", NONE, |T, _x, d| vec![
        T::zeros((2, 3), d, &CPU)?,
        T::ones((2, 0, 3), d, &CPU)?,
        T::ones((), d, &CPU)?
    ]),
    Method {
        name: "one_hot(7, 2, 1)",
        inputs: &[&[3, 4]],
        ids: Some(7),
        lazily: |x, d| Ok(vec![x[0].one_hot(7, 2.0, 1.0, d)?]),
        eagerly: |x, d| {
            let ids = x[0].clone();
            Ok(vec![match d {
                DType::F32 => one_hot(ids, 7, 2f32, 1f32)?,
                DType::F64 => one_hot(ids, 7, 2f64, 1f64)?,
                DType::F16 => one_hot(ids, 7, f16::from_f32(2.0), f16::ONE)?,
                DType::BF16 => one_hot(ids, 7, bf16::from_f32(2.0), bf16::ONE)?,
                DType::U8 => one_hot(ids, 7, 2u8, 1u8)?,
                DType::U32 => one_hot(ids, 7, 2u32, 1u32)?,
                _ => one_hot(ids, 7, 2i64, 1i64)?,
            }])
        },
    },
];

/// The inputs of a method, views of variables where `tracked`.
fn inputs(
    method: &Method,
    dtype: DType,
    layout: Layout,
    seed: u64,
    tracked: bool,
) -> Result<(Vec<Option<Var>>, Vec<Tensor>)> {
    let mut rng = Rng::named(seed, method.name);
    let (mut vars, mut inputs) = (Vec::new(), Vec::new());
    for dims in method.inputs {
        let dtype = if method.ids.is_some() { DType::U32 } else { dtype };
        let spec = InputSpec::new(dims, dtype, layout, method.ids.map_or(Domain::Any, Domain::Ids));
        let spec = if spec.layout_applies() { spec } else { InputSpec { layout: Layout::Contiguous, ..spec } };
        let storage = to_tensor(&spec.fill(&spec.storage_dims(), &mut rng), dtype)?;
        let var = (tracked && spec.is_tracked()).then(|| Var::from_tensor(&storage)).transpose()?;
        inputs.push(spec.view(var.as_ref().map_or(&storage, |v| v.as_tensor()))?);
        vars.push(var);
    }
    Ok((vars, inputs))
}

/// The results on plain inputs.
fn check(method: &Method, dtype: DType, layout: Layout, seed: u64) -> Result<Option<Cell>> {
    let (_, inputs) = inputs(method, dtype, layout, seed, false)?;
    let mut cell = Cell::of(Outcome::Passed);
    let leaves: Vec<LazyTensor> = inputs.iter().map(LazyTensor::from).collect();
    let (got, want) = ((method.lazily)(&leaves, dtype)?, (method.eagerly)(&inputs, dtype)?);
    if got.len() != want.len() {
        cell.outcome = Outcome::Failed(format!("{} results instead of {}", got.len(), want.len()));
        return Ok(Some(cell));
    }
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        if (got.dims(), got.dtype()) != (want.dims(), want.dtype()) {
            let what = format!("result {i} is recorded as {:?} {:?}", got.dtype(), got.dims());
            cell.outcome = Outcome::Failed(format!("{what} instead of {:?} {:?}", want.dtype(), want.dims()));
            return Ok(Some(cell));
        }
        let (got, report) = got.eval_with_report()?;
        for (name, count) in report.kernels {
            *cell.kernels.entry(name).or_default() += count;
        }
        if let Err(what) = same_bits(&format!("result {i} against Candle's"), &got, want)? {
            cell.outcome = Outcome::Failed(what);
            return Ok(Some(cell));
        }
    }
    Ok(Some(cell))
}

/// The gradients of one loss over all results.
fn check_gradients(method: &Method, dtype: DType, layout: Layout, seed: u64) -> Result<Option<Cell>> {
    if !dtype.is_float() || method.inputs.is_empty() || method.ids.is_some() {
        return Ok(None);
    }
    let joined = |tensors: &[Tensor]| -> Result<Tensor> {
        let flat = tensors.iter().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&flat, 0)?)
    };
    let (vars, leaves) = inputs(method, dtype, layout, seed, true)?;
    let leaves: Vec<LazyTensor> = leaves.iter().map(LazyTensor::from).collect();
    let got =
        (method.lazily)(&leaves, dtype)?.iter().map(LazyTensor::eval).collect::<std::result::Result<Vec<_>, _>>()?;
    let ours = gradient::gradients(&joined(&got)?, &vars)?;
    let (vars, leaves) = inputs(method, dtype, layout, seed, true)?;
    let theirs = gradient::gradients(&joined(&(method.eagerly)(&leaves, dtype)?)?, &vars)?;
    let mut cell = Cell::of(Outcome::Passed);
    for (i, pair) in ours.iter().zip(&theirs).enumerate() {
        let what = match pair {
            (Some(ours), Some(theirs)) => {
                same_bits(&format!("the gradient of input {i} against Candle's"), ours, theirs)?.err()
            }
            (None, None) => None,
            (ours, _) => {
                let which = if ours.is_some() { "ours alone" } else { "Candle's alone" };
                Some(format!("input {i} has a gradient of {which}"))
            }
        };
        if let Some(what) = what {
            cell.outcome = Outcome::Failed(what);
            return Ok(Some(cell));
        }
    }
    Ok(Some(cell))
}

/// Runs every method in every dtype and layout.
pub(crate) fn run(options: &Options, modes: &[Mode], summary: &mut Summary) {
    let dtypes = FLOATS.into_iter().chain(INTEGERS);
    for dtype in dtypes.filter(|d| options.dtype.is_none_or(|only| only == *d)) {
        for method in METHODS {
            for layout in Layout::ALL {
                if method.inputs.is_empty() && layout != Layout::Contiguous {
                    continue;
                }
                let name = format!("{}, {} {}", method.name, dtype.as_str(), layout.name());
                let mut count = |mode: Mode, check: fn(&Method, DType, Layout, u64) -> Result<Option<Cell>>| {
                    if let Some(cell) =
                        modes.contains(&mode).then(|| caught(|| check(method, dtype, layout, options.seed))).flatten()
                    {
                        summary.count("method", &name, &mode.name(), &cell);
                    }
                };
                count(Mode::AllPasses, check);
                count(Mode::Tracked, check_gradients);
            }
        }
    }
}
