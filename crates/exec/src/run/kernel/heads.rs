//! Products of one left side, and what follows them.

use super::Ctx;
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::plan::{HeadStep, SourceStep};
use crate::run::slots::{kernel_error, with_views, SlotValue};
use candle_lazy_ops::fault;
use candle_lazy_ops::kernels::{products, Epilogue, Head, Source};
use candle_lazy_ops::view::{SliceMut, View};
use smallvec::SmallVec;

/// The results of all heads, in their order.
pub(super) fn run(ctx: &Ctx<'_>, heads: &[HeadStep], slots: &[SlotValue]) -> Result<SmallVec<[Buffer; 2]>> {
    let mut buffers: SmallVec<[Buffer; 2]> = SmallVec::new();
    for (i, output) in ctx.step.outputs.iter().enumerate() {
        buffers.push(ctx.take(i, &ctx.dims(&output.dims))?);
    }
    let params = (0..ctx.step.params.len()).map(|i| ctx.param(i)).collect::<Result<SmallVec<[f64; 4]>>>()?;
    with_views(slots, &ctx.step.inputs, |views| {
        let at = |i: u32| views.get(i as usize).ok_or_else(|| Error::Internal(format!("linear lacks input {i}")));
        let mut bound = Vec::with_capacity(heads.len());
        for head in heads {
            let rights = head.rights.iter().map(|&(w, transposed)| right(at(w)?, transposed)).collect::<Result<_>>()?;
            let Some(epilogue) = &head.epilogue else {
                bound.push(Head { rights, epilogue: None });
                continue;
            };
            let dims = ctx.dims(&head.dims);
            let mut inputs = Vec::with_capacity(epilogue.inputs.len());
            for source in &epilogue.inputs {
                inputs.push(match *source {
                    SourceStep::Product(i) => Source::Product(i as usize),
                    SourceStep::Input(i) => {
                        let view = at(i)?;
                        let layout = view.layout.broadcast_to(&dims).map_err(kernel_error)?;
                        Source::View(View { data: view.data, layout })
                    }
                });
            }
            let params = params.get(epilogue.params.clone()).unwrap_or_default();
            bound.push(Head { rights, epilogue: Some(Epilogue { program: &epilogue.program, inputs, params }) });
        }
        if fault::active("heads.order") {
            bound.reverse();
        }
        let mut outs: SmallVec<[SliceMut<'_>; 2]> = buffers.iter_mut().map(Buffer::slice_mut).collect();
        products(at(0)?, &bound, &mut outs).map_err(kernel_error)
    })?;
    Ok(buffers)
}

/// The right side as a product takes it.
fn right<'a>(w: &View<'a>, transposed: bool) -> Result<View<'a>> {
    let layout = if transposed { w.layout.permute(&[1, 0]).map_err(kernel_error)? } else { w.layout.clone() };
    Ok(View { data: w.data, layout })
}
