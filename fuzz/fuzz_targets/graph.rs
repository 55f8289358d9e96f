//! Bytes choose ops on small lazy tensors, sensible or not. What records is evaluated by several plans, which must agree bit
//! for bit or fail together.
#![no_main]

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Tensor, D};
use candle_lazy_exec::run::{eval_all_with, explain};
use candle_lazy_exec::{AttentionOptions, Error, EvalOptions, LazyTensor, RandomKey, Result};
use candle_lazy_fuzz::{contained, Choices};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

const CPU: Device = Device::Cpu;
const SHAPES: [&[usize]; 16] = [
    &[],
    &[1],
    &[4],
    &[3, 4],
    &[4, 3],
    &[2, 3, 4],
    &[1, 4],
    &[0, 4],
    &[4, 4],
    &[1, 2, 3, 4],
    &[2, 2, 3, 4],
    &[3, 2],
    &[2],
    &[1, 1, 1, 1, 1, 1, 1, 1, 2],
    &[2, 64],
    &[2, 4, 3],
];
const DTYPES: [DType; 9] =
    [DType::F32, DType::F32, DType::F32, DType::F16, DType::BF16, DType::F64, DType::U8, DType::U32, DType::I64];
/// Kinds of quantised weights, with a width that each can hold.
const QUANTISED: [(GgmlDType, usize); 6] = [
    (GgmlDType::F32, 4),
    (GgmlDType::F16, 4),
    (GgmlDType::Q8_0, 64),
    (GgmlDType::Q4_0, 64),
    (GgmlDType::BF16, 3),
    (GgmlDType::Q5_1, 64),
];
/// A result with more elements is dropped.
const LARGEST: usize = 4096;
const STEPS: usize = 40;

fn leaf(c: &mut Choices<'_>) -> Result<LazyTensor> {
    let shape = SHAPES[c.below(SHAPES.len())];
    let dtype = DTYPES[c.below(DTYPES.len())];
    let count: usize = shape.iter().product();
    let special = c.byte();
    let value = |i: usize| match special {
        250 => f32::NAN,
        251 => f32::INFINITY,
        252 => -0.0,
        253 => 1e30,
        s => ((i * 7 + usize::from(s)) % 9) as f32 * 0.5,
    };
    let tensor = Tensor::from_vec((0..count).map(value).collect::<Vec<f32>>(), shape, &CPU)?.to_dtype(dtype)?;
    let rank = tensor.rank();
    let tensor = match c.below(4) {
        1 if rank >= 2 => tensor.t()?,
        2 if rank >= 1 && tensor.dim(0)? > 1 => tensor.narrow(0, 1, 1)?,
        3 => tensor.broadcast_left(2)?,
        _ => tensor,
    };
    Ok(LazyTensor::from(tensor))
}

/// A custom op: the elements of its inputs added up place by place in f32, as many as the shortest has, if `honest`; else one
/// more than was stated.
struct Sum {
    honest: bool,
}

impl Sum {
    fn run(&self, inputs: &[(&CpuStorage, &Layout)]) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut total: Option<Vec<f32>> = None;
        for (storage, layout) in inputs {
            let data = storage.as_slice::<f32>()?;
            let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("sum: a strided input") };
            let part = &data[start..end];
            total = Some(match total {
                None => part.to_vec(),
                Some(sum) => sum.iter().zip(part).map(|(a, b)| a + b).collect(),
            });
        }
        let mut total = total.unwrap_or_default();
        if !self.honest {
            total.push(1.0);
        }
        let shape = Shape::from(total.len());
        Ok((CpuStorage::F32(total), shape))
    }
}

impl CustomOp1 for Sum {
    fn name(&self) -> &'static str {
        "sum1"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[(s, l)])
    }
}

impl CustomOp2 for Sum {
    fn name(&self) -> &'static str {
        "sum2"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2)])
    }
}

impl CustomOp3 for Sum {
    fn name(&self) -> &'static str {
        "sum3"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2), (s3, l3)])
    }
}

fn pick(c: &mut Choices<'_>, pool: &[LazyTensor]) -> Result<LazyTensor> {
    match pool.len() {
        0 => leaf(c),
        n => Ok(pool[c.below(n)].clone()),
    }
}

/// Ops that pick and place, that count, that draw, and what is opaque.
fn indexed_or_opaque(c: &mut Choices<'_>, pool: &[LazyTensor], op: u8) -> Result<LazyTensor> {
    let pick = |c: &mut Choices<'_>| pick(c, pool);
    let x = pick(c)?;
    let dim = c.below(6);
    Ok(match op {
        0 => x.gather(&pick(c)?, dim)?,
        1 => x.scatter(&pick(c)?, &pick(c)?, dim)?,
        2 => x.scatter_add(&pick(c)?, &pick(c)?, dim)?,
        3 => x.index_add(&pick(c)?, &pick(c)?, dim)?,
        4 => x.slice(dim, c.below(5), c.below(6), c.below(4))?,
        5 => match x.split(&[c.below(4), c.below(4)], dim)?.pop() {
            Some(part) => part,
            None => x,
        },
        6 => x.pad_with_zeros(dim, c.below(3), c.below(3))?,
        7 => x.pad_with_same(dim, c.below(3), c.below(3))?,
        8 => x.repeat(SHAPES[c.below(SHAPES.len())])?,
        9 => x.one_hot(c.below(5), 1.0, 0.0, DTYPES[c.below(DTYPES.len())])?,
        10 => x.to_device(&CPU)?,
        11 => x.argmax(dim)?,
        12 => x.argmin_keepdim(dim)?,
        13 => x.var(dim)?,
        14 => x.var_keepdim((dim, c.below(3)))?,
        15 => x.log_sum_exp(dim)?,
        16 => x.log_sum_exp_keepdim((dim, c.below(3)))?,
        17 => x.elu(f64::from(c.byte()) / 64.0)?,
        18 => x.clamp(f64::from(c.byte()) / 64.0 - 2.0, f64::from(c.byte()) / 64.0 - 2.0)?,
        19 => x.clamp(&pick(c)?, &pick(c)?)?,
        20 => x.dropout(f64::from(c.byte()) / 255.0, RandomKey::new(u64::from(c.byte())))?,
        21 => {
            let (lo, dtype) = (f64::from(c.byte()), DTYPES[c.below(DTYPES.len())]);
            LazyTensor::rand_from(&x, lo, lo + 1.0, SHAPES[c.below(SHAPES.len())], dtype)?
        }
        22 => LazyTensor::randn_from(&x, 0.0, 1.0, SHAPES[c.below(SHAPES.len())], DTYPES[c.below(DTYPES.len())])?,
        23 => x.cross_entropy(&pick(c)?)?,
        24 => {
            let groups = c.below(4);
            let weight = if c.below(2) == 0 { None } else { Some(pick(c)?) };
            let bias = if c.below(2) == 0 { None } else { Some(pick(c)?) };
            x.group_norm(groups, weight.as_ref(), bias.as_ref(), 1e-5)?
        }
        25 => x.custom_op1(Sum { honest: c.below(8) > 0 }, x.elem_count(), DType::F32)?,
        26 => {
            let y = pick(c)?;
            let stated = x.elem_count().min(y.elem_count());
            x.custom_op2(&y, Sum { honest: c.below(8) > 0 }, stated, DType::F32)?
        }
        27 => {
            let (y, z) = (pick(c)?, pick(c)?);
            let stated = x.elem_count().min(y.elem_count()).min(z.elem_count());
            x.custom_op3(&y, &z, Sum { honest: c.below(8) > 0 }, stated, DType::F32)?
        }
        28 | 29 => {
            let (kind, width) = QUANTISED[c.below(QUANTISED.len())];
            let rows = 1 + c.below(3);
            let numbers: Vec<f32> = (0..rows * width).map(|i| (i * 7 % 9) as f32 * 0.25 - 1.0).collect();
            let weight = QTensor::quantize(&Tensor::from_vec(numbers, (rows, width), &CPU)?, kind)?;
            x.qmatmul(&Arc::new(weight))?
        }
        30 => x.cumsum(dim)?,
        31 => x.flip(&[dim])?,
        32 => x.roll(c.below(9) as i32 - 4, dim)?,
        33 => x.dot(&pick(c)?)?,
        34 => x.mv(&pick(c)?)?,
        35 => x.norm()?,
        36 => x.round_to(c.below(7) as i32 - 3)?,
        37 => x.force_contiguous()?,
        38 => LazyTensor::tril2(c.below(5), DTYPES[c.below(DTYPES.len())], &CPU)?,
        39 => LazyTensor::eye(c.below(5), DTYPES[c.below(DTYPES.len())], &CPU)?,
        40 => LazyTensor::arange_step(0f32, f32::from(c.byte() % 8), 0.5, &CPU)?,
        41 => x.gelu_mul(&pick(c)?)?,
        42 => x.broadcast_pow(&pick(c)?)?,
        43 => x.erf()?,
        44 => x.gelu_erf()?,
        45 => x.sigmoid()?,
        46 => x.sin()?,
        47 => x.cos()?,
        48 => x.round()?,
        49 => x.ceil()?,
        50 => x.broadcast_ge(&pick(c)?)?,
        51 => x.maximum(f64::from(c.byte()) / 16.0)?,
        52 => x.slice_scatter0(&pick(c)?, c.below(4))?,
        _ => x.copy()?,
    })
}

fn step(c: &mut Choices<'_>, pool: &[LazyTensor]) -> Result<LazyTensor> {
    let op = c.byte();
    if let Some(op) = (op % 128).checked_sub(72) {
        return indexed_or_opaque(c, pool, op);
    }
    let pick = |c: &mut Choices<'_>| pick(c, pool);
    let x = pick(c)?;
    let dim = c.below(6);
    Ok(match op % 128 {
        0 => leaf(c)?,
        1 => x.neg()?,
        2 => x.abs()?,
        3 => x.recip()?,
        4 => x.sqr()?,
        5 => x.sqrt()?,
        6 => x.rsqrt()?,
        7 => x.exp()?,
        8 => x.log()?,
        9 => x.tanh()?,
        10 => x.gelu()?,
        11 => x.silu()?,
        12 => x.relu()?,
        13 => x.floor()?,
        14 => x.sign()?,
        15 => x.add(&pick(c)?)?,
        16 => x.broadcast_add(&pick(c)?)?,
        17 => x.broadcast_sub(&pick(c)?)?,
        18 => x.broadcast_mul(&pick(c)?)?,
        19 => x.broadcast_div(&pick(c)?)?,
        20 => x.broadcast_maximum(&pick(c)?)?,
        21 => x.broadcast_minimum(&pick(c)?)?,
        22 => x.broadcast_lt(&pick(c)?)?,
        23 => x.eq(f64::from(c.byte()))?,
        24 => x.affine(f64::from(c.byte()) / 16.0, f64::from(c.byte()) / 16.0)?,
        25 => x.powf(f64::from(c.byte()) / 64.0)?,
        26 => x.where_cond(&pick(c)?, &pick(c)?)?,
        27 => x.to_dtype(DTYPES[c.below(DTYPES.len())])?,
        28 => x.sum(dim)?,
        29 => x.sum_keepdim((dim, c.below(3)))?,
        30 => x.mean_keepdim(dim)?,
        31 => x.mean_all()?,
        32 => x.max(dim)?,
        33 => x.min_keepdim(dim)?,
        34 => x.sum_all()?,
        35 => x.matmul(&pick(c)?)?,
        36 => x.broadcast_matmul(&pick(c)?)?,
        37 => x.reshape(SHAPES[c.below(SHAPES.len())])?,
        38 => x.reshape(((), c.below(5)))?,
        39 => x.permute((c.below(3), c.below(3), c.below(3)))?,
        40 => x.transpose(dim, c.below(4))?,
        41 => x.t()?,
        42 => x.narrow(dim, c.below(5), c.below(5))?,
        43 => x.broadcast_as(SHAPES[c.below(SHAPES.len())])?,
        44 => x.contiguous()?,
        45 => x.detach(),
        46 => LazyTensor::cat(&[&x, &pick(c)?], dim)?,
        47 => LazyTensor::stack(&[&x, &pick(c)?], dim)?,
        48 => x.index_select(&pick(c)?, dim)?,
        49 => x.embedding(&pick(c)?)?,
        50 => x.slice_scatter(&pick(c)?, dim, c.below(5))?,
        51 => x.slice_set_owned(&pick(c)?, dim, c.below(5))?,
        52 => x.slice_assign(&[c.below(3)..c.below(5), 0..c.below(5)], &pick(c)?)?,
        53 => x.softmax(dim)?,
        54 => x.log_softmax(D::Minus1)?,
        55 => x.rms_norm(if c.below(2) == 0 { None } else { Some(pick(c)?) }.as_ref(), 1e-5)?,
        56 => x.layer_norm(Some(&pick(c)?), if c.below(2) == 0 { None } else { Some(pick(c)?) }.as_ref(), 1e-5)?,
        57 => x.linear(&pick(c)?, if c.below(2) == 0 { None } else { Some(pick(c)?) }.as_ref())?,
        58 => x.lora(&pick(c)?, &pick(c)?, 0.5)?,
        59 => x.lora_add(&pick(c)?, &pick(c)?, &pick(c)?, 0.5)?,
        60 => x.silu_mul(&pick(c)?)?,
        61 => x.rope(&pick(c)?, &pick(c)?)?,
        62 => x.rope_i(&pick(c)?, &pick(c)?)?,
        63 => {
            let mut options = AttentionOptions::new(0.5).causal(c.below(2) == 1);
            options.window = [None, Some(1), Some(0), Some(3)][c.below(4)];
            options.softcap = [None, Some(2.0), Some(0.0)][c.below(3)];
            let (k, v) = (pick(c)?, pick(c)?);
            let mask = if c.below(3) == 0 { Some(pick(c)?) } else { None };
            LazyTensor::attention(&x, &k, &v, mask.as_ref(), &options)?
        }
        64 => {
            LazyTensor::filled(f64::from(c.byte()), SHAPES[c.below(SHAPES.len())], DTYPES[c.below(DTYPES.len())], &CPU)?
        }
        65 => LazyTensor::causal_mask(c.below(5), c.below(5), Some(c.below(3)), DTYPES[c.below(DTYPES.len())], &CPU)?,
        66 => x.squeeze(dim)?,
        67 => x.unsqueeze(dim)?,
        68 => x.flatten(dim, c.below(4))?,
        69 => x.get_on_dim(dim, c.below(5))?,
        70 => match x.chunk(c.below(5), dim)?.pop() {
            Some(part) => part,
            None => x,
        },
        _ => LazyTensor::arange(0u32, u32::from(c.byte() % 8), &CPU)?,
    })
}

/// The bits of a result, or nothing where it failed. Integer arithmetic of Candle's that panics (division by zero, overflow)
/// is contained by the library and no finding; any other contained panic is one.
fn outcome(build: &dyn Fn() -> Vec<LazyTensor>, options: &EvalOptions) -> Option<Vec<String>> {
    let roots = build();
    let roots: Vec<&LazyTensor> = roots.iter().collect();
    // FUZZ_SHOW=1 with one input prints its graphs and plans
    if std::env::var_os("FUZZ_SHOW").is_some() {
        eprintln!("{}", explain(&roots, options).unwrap_or_else(|e| e.to_string()));
    }
    let outcome = eval_all_with(&roots, options);
    match outcome {
        Ok((tensors, _)) => Some(tensors.iter().map(bits).collect()),
        Err(Error::Panic { message, .. }) if message.contains("attempt to") => None,
        Err(error @ (Error::Panic { .. } | Error::Internal(_))) => panic!("{error}"),
        Err(_) => None,
    }
}

fn bits(tensor: &Tensor) -> String {
    if tensor.elem_count() == 0 {
        // Candle cannot read every view without elements
        return format!("{} {:?}", tensor.dtype().as_str(), tensor.dims());
    }
    let flat = tensor.flatten_all().and_then(|t| t.contiguous());
    let flat = flat.unwrap_or_else(|e| panic!("a result that cannot be read: {e}"));
    let text = if flat.dtype() == DType::I64 {
        format!("{:?}", flat.to_vec1::<i64>())
    } else {
        let wide = flat.to_dtype(DType::F64).and_then(|t| t.to_vec1::<f64>());
        let wide = wide.unwrap_or_else(|e| panic!("a result that cannot be read: {e}"));
        format!("{wide:?}")
    };
    format!("{} {:?} {text}", tensor.dtype().as_str(), tensor.dims())
}

fn build(data: &[u8]) -> Vec<LazyTensor> {
    let mut c = Choices::new(data);
    let mut pool: Vec<LazyTensor> = Vec::new();
    for _ in 0..STEPS {
        if c.is_empty() {
            break;
        }
        match step(&mut c, &pool) {
            Ok(x) if x.elem_count() <= LARGEST => pool.push(x),
            Ok(_) => {}
            Err(error) => {
                // an error of recording names this file
                let text = error.to_string();
                assert!(text.contains("fuzz_targets/graph.rs") || matches!(error, Error::Candle(_)), "{text}");
            }
        }
    }
    // the last ones are wanted, the rest is held by nobody else
    pool.split_off(pool.len().saturating_sub(3))
}

fuzz_target!(|data: &[u8]| contained(|| {
    let Some((&mode, data)) = data.split_first() else { return };
    let make = || build(data);
    let all = outcome(&make, &EvalOptions::default());
    let other = match mode % 8 {
        0 => EvalOptions { cache: false, ..EvalOptions::default() },
        1 => EvalOptions::default(),
        2 => EvalOptions::only_pass("fuse"),
        3 => EvalOptions::only_pass("cse"),
        4 => EvalOptions::only_pass("split_bias"),
        5 => EvalOptions::only_pass("noop_views"),
        _ => EvalOptions::no_passes(),
    };
    let again = outcome(&make, &other);
    // with everything held until the end, what becomes ready differs, the values do not
    assert_eq!(all.is_some(), again.is_some(), "one plan fails, the other ({other:?}) does not");
    assert_eq!(all, again, "{other:?}");
    if mode & 0x80 != 0 {
        let roots = make();
        for root in &roots {
            let _ = root.first_nonfinite();
            let _ = root.eval_checked();
        }
    }
}));
