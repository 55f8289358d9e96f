//! Rows of a table, chosen by ids.

use crate::error::Error;
use crate::fault;
use crate::kernels;
use crate::storage::{cpu_view, filled};
use crate::view::{Strided, View};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

const OP: &str = "embedding";

/// The rows of a table `(n, h)` of any dtype that ids (u8, u32 or i64; any shape, which may be rank 0) name: ids' shape with h
/// behind it. As in Candle, an id that is its type's largest value gives a row of zeros. A row's gradient is the sum over its
/// uses in their order, f16 and bf16 summed in f32 and rounded once.
///
/// # Errors
/// A table that is no matrix, ids that are no integers, an id that is no row, two devices.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let &[_, width] = table.dims() else {
        return Err(Error::shape(OP, format!("the table has {:?}: needs (n, h)", table.dims())).into());
    };
    if !matches!(ids.dtype(), DType::U8 | DType::U32 | DType::I64) {
        return Err(Error::dtype(OP, format!("ids must be u8, u32 or i64, got {}", ids.dtype().as_str())).into());
    }
    if !table.device().same_device(ids.device()) {
        let (t, i) = (table.device().location(), ids.device().location());
        return Err(Error::unsupported(OP, format!("the table on {t:?}, ids on {i:?}")).into());
    }
    if table.device().is_cpu() {
        return table.apply_op2(ids, Rows);
    }
    let mut dims = ids.dims().to_vec();
    dims.push(width);
    table.index_select(&ids.flatten_all()?, 0)?.reshape(dims)
}

/// The lookup.
struct Rows;

impl CustomOp2 for Rows {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (table, ids) = (cpu_view(OP, s1, l1)?, cpu_view(OP, s2, l2)?);
        let mut dims = ids.dims().to_vec();
        dims.extend(table.dims().last());
        let shape = Shape::from(dims);
        let rows = filled(OP, table.dtype(), shape.elem_count(), |out| {
            kernels::index_select_as(OP, &table, &ids, 0, &mut out.reborrow())
        })?;
        Ok((rows, shape))
    }

    fn bwd(
        &self,
        table: &Tensor,
        ids: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, width) = table.dims2()?;
        let grad = grad.detach().reshape((ids.elem_count(), width))?;
        let added = grad.apply_op2_no_bwd(&ids.flatten_all()?, &Added { rows: n })?;
        Ok((Some(added), None))
    }
}

/// Zeros `(rows, h)` to which rows `(m, h)` are added where ids `(m)` say.
struct Added {
    rows: usize,
}

impl CustomOp2 for Added {
    fn name(&self) -> &'static str {
        "embedding-grad"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (grad, ids) = (cpu_view(OP, s1, l1)?, cpu_view(OP, s2, l2)?);
        let shape = Shape::from((self.rows, grad.dims().last().copied().unwrap_or(0)));
        let zero = filled(OP, grad.dtype(), 1, |out| kernels::fill(out, 0.0))?;
        let mut zeros: View<'_> = cpu_view(OP, &zero, &Layout::contiguous(()))?;
        zeros.layout = zeros.layout.broadcast_to(shape.dims())?;
        let mut ids = ids;
        if fault::active("grad.embedding.row") {
            ids.layout = Strided { strides: ids.layout.strides.iter().map(|_| 0).collect(), ..ids.layout };
        }
        let sum = filled(OP, grad.dtype(), shape.elem_count(), |out| {
            kernels::index_add(&zeros, &ids, &grad, 0, &mut out.reborrow())
        })?;
        Ok((sum, shape))
    }
}
