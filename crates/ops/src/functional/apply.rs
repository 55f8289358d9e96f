//! Row programs as Candle custom ops.

use crate::error::Error;
use crate::row::{Kind, Reg, RowProgram};
use crate::storage::{cpu_view, filled};
use crate::view::{Dims, View};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use smallvec::SmallVec;
use std::sync::Arc;

/// A program with one output, its row axes and its scalars.
#[derive(Clone, Debug)]
pub(crate) struct RowCall {
    pub(crate) name: &'static str,
    pub(crate) program: Arc<RowProgram>,
    pub(crate) row_axes: u32,
    pub(crate) params: SmallVec<[f64; 2]>,
}

impl RowCall {
    pub(crate) fn new(name: &'static str, program: impl Into<Arc<RowProgram>>, row_axes: u32) -> Self {
        Self { name, program: program.into(), row_axes, params: SmallVec::new() }
    }

    pub(crate) fn with_params(self, params: &[f64]) -> Self {
        Self { params: params.into(), ..self }
    }

    /// Runs on storages; the space has the dims of the first, to which the others broadcast.
    fn run(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let op = self.name;
        let dims: Dims = match inputs.first() {
            Some((_, l)) => l.dims().into(),
            None => return Err(Error::shape(op, "no input").into()),
        };
        let mut views: SmallVec<[View<'_>; 3]> = SmallVec::new();
        for (storage, layout) in inputs {
            let mut view = cpu_view(op, storage, layout)?;
            view.layout = view.layout.broadcast_to(&dims)?;
            views.push(view);
        }
        let Some(&(reg, dtype)) = self.program.outputs.first() else {
            return Err(Error::shape(op, "no output").into());
        };
        let shape = self.out_dims(reg, &dims);
        let n = self.program.output_len(0, &dims, self.row_axes);
        let storage = filled(op, dtype, n, |out| {
            self.program.run(&dims, self.row_axes, &views, &self.params, &mut [out.reborrow()])
        })?;
        Ok((storage, Shape::from(shape)))
    }

    fn out_dims(&self, reg: Reg, dims: &[usize]) -> Vec<usize> {
        match self.program.kind_of(reg) {
            Some(Kind::Vec) => dims.to_vec(),
            Some(Kind::Row) => {
                (0..dims.len()).filter(|&a| !(a < 32 && self.row_axes >> a & 1 == 1)).map(|a| dims[a]).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Runs without recording a backward.
    pub(crate) fn detached(self, inputs: &[&Tensor]) -> Result<Tensor> {
        let none = Untracked(self);
        match inputs {
            [x] => x.apply_op1_no_bwd(&none),
            [x, y] => x.apply_op2_no_bwd(y, &none),
            [x, y, z] => x.apply_op3_no_bwd(y, z, &none),
            _ => Err(Error::shape(none.0.name, format!("{} inputs", inputs.len())).into()),
        }
    }
}

/// A call without a backward.
struct Untracked(RowCall);

macro_rules! name {
    () => {
        fn name(&self) -> &'static str {
            self.0.name
        }
    };
}

macro_rules! fwd {
    (1) => {
        fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
            self.0.run(&[(s, l)])
        }
    };
    (2) => {
        fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
            self.0.run(&[(s, l), (s2, l2)])
        }
    };
    (3) => {
        fn cpu_fwd(
            &self,
            s: &CpuStorage,
            l: &Layout,
            s2: &CpuStorage,
            l2: &Layout,
            s3: &CpuStorage,
            l3: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            self.0.run(&[(s, l), (s2, l2), (s3, l3)])
        }
    };
}

impl CustomOp1 for Untracked {
    name!();
    fwd!(1);
}
impl CustomOp2 for Untracked {
    name!();
    fwd!(2);
}
impl CustomOp3 for Untracked {
    name!();
    fwd!(3);
}

/// A call of one input whose backward is `grad(x, result, gradient)`.
pub(crate) struct Tracked1<F>(pub(crate) RowCall, pub(crate) F);
/// A call of two inputs whose backward is `grad(x, y, gradient)`.
pub(crate) struct Tracked2<F>(pub(crate) RowCall, pub(crate) F);
/// A call of three inputs whose backward is `grad(x, y, z, gradient)`.
pub(crate) struct Tracked3<F>(pub(crate) RowCall, pub(crate) F);

type Grads2 = (Option<Tensor>, Option<Tensor>);
type Grads3 = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl<F: Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>> CustomOp1 for Tracked1<F> {
    name!();
    fwd!(1);
    fn bwd(&self, x: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        (self.1)(&x.detach(), &res.detach(), &grad.detach()).map(Some)
    }
}

impl<F: Fn(&Tensor, &Tensor, &Tensor) -> Result<Grads2>> CustomOp2 for Tracked2<F> {
    name!();
    fwd!(2);
    fn bwd(&self, x: &Tensor, y: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Grads2> {
        (self.1)(x, y, &grad.detach())
    }
}

impl<F: Fn(&Tensor, &Tensor, &Tensor, &Tensor) -> Result<Grads3>> CustomOp3 for Tracked3<F> {
    name!();
    fwd!(3);
    fn bwd(&self, x: &Tensor, y: &Tensor, z: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Grads3> {
        (self.1)(x, y, z, &grad.detach())
    }
}

/// Sums over the axes in the mask, in the fixed order of row programs, into `dtype`.
pub(crate) fn sum_axes(x: &Tensor, axes: u32, dtype: candle_core::DType) -> Result<Tensor> {
    use crate::row::{Class, ReduceFn};
    let class =
        Class::of(x.dtype()).ok_or_else(|| Error::unsupported("sum", format!("dtype {}", x.dtype().as_str())))?;
    if axes == 0 {
        return x.to_dtype(dtype);
    }
    let mut b = RowProgram::builder(class);
    let v = b.load(0);
    let s = b.reduce(ReduceFn::Sum, v);
    b.output(s, dtype);
    RowCall::new("sum", b.finish()?, axes).detached(&[x])
}

/// Mask of all axes but the last.
pub(crate) fn leading_axes(rank: usize) -> u32 {
    (1u32 << rank.saturating_sub(1).min(31)) - 1
}

/// Mask of one axis.
pub(crate) fn axis(op: &'static str, axis: usize, rank: usize) -> Result<u32> {
    if rank > 31 {
        return Err(Error::shape(op, format!("{rank} dims, at most 31 are supported")).into());
    }
    Ok(1 << axis)
}
