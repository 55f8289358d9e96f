//! What a node does.

#[cfg(feature = "custom-metal")]
use super::NodeId;
use candle_core::{DType, Result as CandleResult, Shape};
use candle_lazy_exec::LazyTensor as Recorded;
use candle_lazy_graph::infer::broadcast_shapes;

/// An operation of the graph.
#[derive(Debug, Clone)]
pub enum Operation {
    /// A tensor that is given.
    Input,
    /// The matrix product of two inputs, batch dims broadcast.
    Matmul,
    /// The sum of two inputs.
    Add,
    /// The elementwise product of two inputs.
    Mul,
    /// The input times a number.
    MulScalar {
        /// The number.
        value: f32,
    },
    /// (x·A·B)·scale of the inputs x (…, in), A (in, rank), B (rank, out).
    #[cfg(feature = "custom-metal")]
    LoRA {
        /// The node of A.
        a: NodeId,
        /// The node of B.
        b: NodeId,
        /// The factor.
        scale: f32,
    },
    /// Softmax over a dim.
    #[cfg(feature = "custom-metal")]
    Softmax {
        /// The dim.
        dim: usize,
    },
    /// x/√(mean(x²) + eps) over the last dim.
    #[cfg(feature = "custom-metal")]
    RMSNorm {
        /// What is added to the mean.
        eps: f32,
    },
}

impl Operation {
    /// The name: `input`, `matmul`, `add`, `mul`, `mul_scalar`, `lora`, `softmax` or `rms_norm`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Matmul => "matmul",
            Self::Add => "add",
            Self::Mul => "mul",
            Self::MulScalar { .. } => "mul_scalar",
            #[cfg(feature = "custom-metal")]
            Self::LoRA { .. } => "lora",
            #[cfg(feature = "custom-metal")]
            Self::Softmax { .. } => "softmax",
            #[cfg(feature = "custom-metal")]
            Self::RMSNorm { .. } => "rms_norm",
        }
    }

    /// The shape of the result, of the inputs' shapes. `add` and `mul` want equal shapes.
    ///
    /// # Errors
    /// A text that says what does not fit.
    pub fn output_shape(&self, inputs: &[&Shape]) -> Result<Shape, String> {
        match (self, inputs) {
            (Self::Input, _) => Err("Input operation has no inputs to compute a shape from".to_string()),
            (Self::Matmul, [a, b]) => {
                let ([lead_a @ .., m, k], [lead_b @ .., kb, n]) = (a.dims(), b.dims()) else {
                    return Err(format!("Matmul requires tensors of at least 2 dims, got {a:?} and {b:?}"));
                };
                let lead = broadcast_shapes(lead_a, lead_b).filter(|_| k == kb);
                let Some(mut dims) = lead else {
                    return Err(format!("Shape mismatch for matmul: {a:?} and {b:?}"));
                };
                dims.extend([*m, *n]);
                Ok(Shape::from(dims.as_slice()))
            }
            (Self::Add | Self::Mul, [a, b]) if a == b => Ok((*a).clone()),
            (Self::Add | Self::Mul, [a, b]) => Err(format!("Shape mismatch for {}: {a:?} and {b:?}", self.name())),
            (Self::MulScalar { .. }, [x]) => Ok((*x).clone()),
            // v1 recorded the input's shape, which is wrong where in and out differ
            #[cfg(feature = "custom-metal")]
            (Self::LoRA { .. }, [x, a, b]) => match (x.dims(), a.dims(), b.dims()) {
                ([lead @ .., k], [ka, r], [rb, n]) if k == ka && r == rb => {
                    let mut dims = lead.to_vec();
                    dims.push(*n);
                    Ok(Shape::from(dims))
                }
                _ => Err(format!("Shape mismatch for lora: {x:?}, {a:?} and {b:?}")),
            },
            #[cfg(feature = "custom-metal")]
            (Self::LoRA { .. }, [x]) => Ok((*x).clone()),
            #[cfg(feature = "custom-metal")]
            (Self::Softmax { dim }, [x]) if *dim >= x.rank() => {
                Err(format!("Softmax dimension {dim} is out of range for shape {x:?}"))
            }
            #[cfg(feature = "custom-metal")]
            (Self::RMSNorm { .. }, [x]) if x.rank() == 0 => Err("RMSNorm requires a tensor of at least 1 dim".into()),
            #[cfg(feature = "custom-metal")]
            (Self::Softmax { .. } | Self::RMSNorm { .. }, [x]) => Ok((*x).clone()),
            _ => Err(self.wanted_inputs(inputs.len())),
        }
    }

    /// The dtype of the result: that of the first input, f32 without one.
    #[must_use]
    pub fn output_dtype(&self, inputs: &[DType]) -> DType {
        inputs.first().copied().unwrap_or(DType::F32)
    }

    fn wanted_inputs(&self, found: usize) -> String {
        let wanted = match self {
            Self::Input => return "Cannot execute Input operation".to_string(),
            Self::Matmul => "Matmul requires 2 inputs",
            Self::Add => "Add requires 2 inputs",
            Self::Mul => "Mul requires 2 inputs",
            Self::MulScalar { .. } => "MulScalar requires 1 input",
            #[cfg(feature = "custom-metal")]
            Self::LoRA { .. } => "LoRA requires 3 inputs",
            #[cfg(feature = "custom-metal")]
            Self::Softmax { .. } => "Softmax requires 1 input",
            #[cfg(feature = "custom-metal")]
            Self::RMSNorm { .. } => "RMSNorm requires 1 input",
        };
        format!("{wanted}, got {found}")
    }

    /// The operation in the engine's words. Elementwise ops broadcast here.
    #[track_caller]
    pub(crate) fn record(&self, inputs: &[impl AsRef<Recorded>]) -> CandleResult<Recorded> {
        let inputs: Vec<&Recorded> = inputs.iter().map(AsRef::as_ref).collect();
        let recorded = match (self, inputs.as_slice()) {
            (Self::Matmul, [a, b])
                if a.rank() == b.rank()
                    && a.dims().split_last_chunk::<2>().map(|s| s.0)
                        == b.dims().split_last_chunk::<2>().map(|s| s.0) =>
            {
                a.matmul(b)?
            }
            (Self::Matmul, [a, b]) => a.broadcast_matmul(b)?,
            (Self::Add, [a, b]) => a.broadcast_add(b)?,
            (Self::Mul, [a, b]) => a.broadcast_mul(b)?,
            (Self::MulScalar { value }, [x]) => x.affine(f64::from(*value), 0.0)?,
            #[cfg(feature = "custom-metal")]
            (Self::LoRA { scale, .. }, [x, a, b]) => x.lora(a, b, f64::from(*scale))?,
            #[cfg(feature = "custom-metal")]
            (Self::Softmax { dim }, [x]) => x.softmax(*dim)?,
            #[cfg(feature = "custom-metal")]
            (Self::RMSNorm { eps }, [x]) => x.rms_norm(None, f64::from(*eps))?,
            _ => return Err(candle_core::Error::Msg(self.wanted_inputs(inputs.len()))),
        };
        Ok(recorded)
    }
}
