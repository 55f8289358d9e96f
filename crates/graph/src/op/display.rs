//! Ops as text, for dumps and errors.

use super::Op;
use std::fmt;

impl<S: fmt::Display> fmt::Display for Op<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |dims: &[S]| dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::Full { shape, dtype } => write!(f, "full([{}], {})", list(shape), dtype.as_str()),
            Self::CausalMask { queries, keys, window, dtype } => match window {
                Some(w) => write!(f, "causal_mask({queries}, {keys}, window {w}, {})", dtype.as_str()),
                None => write!(f, "causal_mask({queries}, {keys}, {})", dtype.as_str()),
            },
            Self::Arange { len, dtype } => write!(f, "arange({len}, {})", dtype.as_str()),
            Self::Random { dist, shape, dtype } => {
                write!(f, "{}([{}], {})", dist.name(), list(shape), dtype.as_str())
            }
            Self::ArgReduce { op, dim, keepdim } => {
                write!(f, "{}({dim}{})", op.name(), if *keepdim { ", keepdim" } else { "" })
            }
            Self::Stride { dim, start, len, step } => write!(f, "stride({dim}, {start}, {len}, step {step})"),
            Self::Gather { dim } | Self::IndexAdd { dim } | Self::Scatter { dim, .. } => {
                write!(f, "{}({dim})", self.name())
            }
            Self::GroupNorm { groups, .. } => write!(f, "group_norm({groups})"),
            Self::Custom { name, shape, dtype, .. } => {
                write!(f, "custom {name}([{}], {})", list(shape), dtype.as_str())
            }
            Self::Cast(dtype) => write!(f, "to_dtype({})", dtype.as_str()),
            Self::CompareScalar(op) => write!(f, "{}_scalar", op.name()),
            Self::Reduce { op, axes, keepdim } => {
                let dims: Vec<u32> = (0..32).filter(|d| axes & (1 << d) != 0).collect();
                write!(f, "{}({dims:?}{})", op.name(), if *keepdim { ", keepdim" } else { "" })
            }
            Self::Reshape { shape } => write!(f, "reshape([{}])", list(shape)),
            Self::Permute { perm } => write!(f, "permute({:?})", perm.as_slice()),
            Self::Narrow { dim, start, len } => write!(f, "narrow({dim}, {start}, {len})"),
            Self::Broadcast { shape } => write!(f, "broadcast_as([{}])", list(shape)),
            Self::Concat { dim } => write!(f, "cat({dim})"),
            Self::IndexSelect { dim } => write!(f, "index_select({dim})"),
            Self::SliceAssign { dim, start } => write!(f, "slice_assign({dim}, {start})"),
            Self::Softmax { dim } => write!(f, "softmax({dim})"),
            Self::LogSoftmax { dim } => write!(f, "log_softmax({dim})"),
            Self::LoraSegments { rows } => write!(f, "lora_segments([{}])", list(rows)),
            Self::Glu { act } => write!(f, "glu({})", act.name()),
            Self::Rope { interleaved } => {
                write!(f, "rope({})", if *interleaved { "interleaved" } else { "half-split" })
            }
            Self::Attention { mask, causal, softcap, window }
            | Self::AttentionBackward { mask, causal, softcap, window } => {
                let mut parts = Vec::new();
                if *causal {
                    parts.push("causal".to_string());
                }
                if *mask {
                    parts.push("mask".to_string());
                }
                if *softcap {
                    parts.push("softcap".to_string());
                }
                if let Some(window) = window {
                    parts.push(format!("window {window}"));
                }
                write!(f, "{}({})", self.name(), parts.join(", "))
            }
            other => f.write_str(other.name()),
        }
    }
}
