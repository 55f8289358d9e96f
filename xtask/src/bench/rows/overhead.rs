//! What recording, capturing and planning cost.

use super::super::measure::{self, Effort, Paired};
use super::super::Error;
use super::{bytes_of, eagerly, exactly, f64s, lazily, randn, ring, Floor, Row, Work, RING};
use candle_core::{DType, Device, Tensor};
use candle_lazy::exec::LazyTensor;

/// One addition.
fn add(count: usize) -> Result<Work, Error> {
    let xs = ring(&[count], DType::F32)?;
    let y = randn(&[count], DType::F32)?;
    let (wide, lazy) = (f64s(&y)?, LazyTensor::from(&y));
    let one = bytes_of(&y);
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| x + &y)],
        lazy: lazily(&xs, move |x| x + &lazy),
        rough: None,
        exact: exactly(&xs, move |x| Ok(((x + &wide)?, (x.abs()? + wide.abs()?)?))),
        bytes: 3 * one,
        footprint: (RING + 2) * one,
        flops: 0.0,
        per: 1.0,
    })
}

/// A chain of additions of a number to a scalar: nothing but overhead.
fn chain(nodes: usize) -> Result<Work, Error> {
    let xs: Vec<Tensor> = (0..RING).map(|i| Tensor::new(i as f32, &Device::Cpu)).collect::<Result<_, _>>()?;
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| (0..nodes).try_fold(x.clone(), |x, _| x + 1.0))],
        lazy: lazily(&xs, move |x| (0..nodes).try_fold(x.clone(), |x, _| x + 1.0)),
        rough: None,
        exact: exactly(&xs, move |x| {
            let value = (x + nodes as f64)?;
            Ok((value.clone(), value.abs()?))
        }),
        bytes: 0,
        footprint: 0,
        flops: 0.0,
        per: nodes as f64,
    })
}

/// How much longer one small addition takes from `eval_async().wait()` than from `eval()`, in microseconds.
fn wait(effort: Effort) -> Result<Paired, Error> {
    let xs: Vec<LazyTensor> = ring(&[1280], DType::F32)?.into_iter().map(LazyTensor::from).collect();
    let y = LazyTensor::from(randn(&[1280], DType::F32)?);
    let sum = |i: usize| &xs[i % RING] + &y;
    let mut more = f64::NAN;
    for _ in 0..effort.tries {
        let now = |i: usize| {
            std::hint::black_box(sum(i)?.eval()?);
            Ok(())
        };
        let both = measure::paired(effort, &now, &|i| {
            std::hint::black_box(sum(i)?.eval_async().wait()?);
            Ok(())
        })?;
        more = both.lazy_us - both.eager_us;
        if !both.disturbed() {
            break;
        }
    }
    Ok(measure::single(more, f64::NAN))
}

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new("overhead/add-1280", 0.6, || add(1280)),
        Row::at_most("overhead/chain-1000", 0.15, || chain(1000)),
        Row::own("async/wait", Floor::MostUs(3.0), wait),
    ]
}
