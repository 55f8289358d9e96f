//! Random graphs: ops of the enum with shared nodes and several roots, evaluated with no passes, with all, warm, and replayed
//! by Candle; minimised when they disagree.
//!
//! Ours among themselves must agree bit for bit. Against f64 our error may be 4 × that of eager Candle in the same dtype, or
//! 16 units in the last place at one and the root's largest number (8 in f16 and bf16): errors grow along a graph, and no closed
//! rule says how far. Ops that
//! jump (comparisons, floor, a cast to f16) are only put on nodes whose bits every mode agrees on, so that a rounding before
//! them cannot become a different branch.

mod check;
mod generate;
mod gradients;
mod minimise;

pub use check::{check, check_numbers, check_options, check_together};
pub use generate::{generate, generate_from, SHAPES};
pub use gradients::check_gradients;
pub use minimise::minimise;

use crate::case::InputSpec;
use crate::rng::Rng;
use crate::value::to_tensor;
use crate::{lazy, reference::Arr, Result};
use candle_core::{DType, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_graph::Op;
use std::fmt;

/// The sizes of random graphs, in nodes.
pub const SIZES: [usize; 3] = [12, 60, 200];

/// A node of a program.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// An input.
    Leaf(InputSpec),
    /// An op on earlier steps.
    Op {
        /// The op.
        op: Op,
        /// Its scalars.
        scalars: Vec<f64>,
        /// The steps it reads.
        inputs: Vec<usize>,
    },
}

/// What is known of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// The dims.
    pub dims: Vec<usize>,
    /// The dtype.
    pub dtype: DType,
    /// No element is below.
    pub low: f64,
    /// No element is above.
    pub high: f64,
    /// Whether every mode, Candle's included, gives the same bits.
    pub exact: bool,
}

/// A random graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// The seed of its shape and of its inputs.
    pub seed: u64,
    /// The float dtype.
    pub dtype: DType,
    /// Steps in topological order.
    pub steps: Vec<Step>,
    /// What is known of each.
    pub known: Vec<Known>,
    /// The steps whose values are asked for.
    pub roots: Vec<usize>,
}

impl Program {
    /// The input tensors, `None` for steps that are ops.
    ///
    /// # Errors
    /// When Candle cannot make them.
    pub fn leaves(&self) -> Result<Vec<Option<Tensor>>> {
        let make = |(i, step): (usize, &Step)| -> Result<Option<Tensor>> {
            let Step::Leaf(spec) = step else {
                return Ok(None);
            };
            let (low, high) = (self.known[i].low, self.known[i].high);
            let mut rng = Rng::named(self.seed, &format!("leaf {i}"));
            let dims = spec.storage_dims();
            let count: usize = dims.iter().product();
            let integer = !spec.dtype.is_float();
            let number = |rng: &mut Rng| {
                let x = rng.range(low, high);
                if integer {
                    x.floor()
                } else {
                    x
                }
            };
            let data = (0..count).map(|_| number(&mut rng)).collect();
            Ok(Some(spec.view(&to_tensor(&Arr { dims, data }, spec.dtype)?)?))
        };
        self.steps.iter().enumerate().map(make).collect()
    }

    /// Whether two ways to sum its gradients round alike: nothing is rounded to a dtype of few digits, where merging two equal
    /// casts makes one rounding of two.
    #[must_use]
    pub fn differentiates(&self) -> bool {
        let half = |d: DType| matches!(d, DType::F16 | DType::BF16);
        let narrows = |s: &Step| matches!(s, Step::Op { op: Op::Cast(to), .. } if half(*to));
        !half(self.dtype) && !self.steps.iter().any(narrows)
    }

    /// The program recorded: its roots.
    ///
    /// # Errors
    /// When recording refuses.
    pub fn record(&self, leaves: &[Option<Tensor>]) -> Result<Vec<LazyTensor>> {
        let mut values: Vec<LazyTensor> = Vec::with_capacity(self.steps.len());
        for (step, leaf) in self.steps.iter().zip(leaves) {
            let value = match (step, leaf) {
                (Step::Op { op, scalars, inputs }, _) => {
                    let inputs: Vec<LazyTensor> = inputs.iter().map(|&i| values[i].clone()).collect();
                    lazy::record(op, scalars, &inputs)?
                }
                (Step::Leaf(_), Some(tensor)) => LazyTensor::from(tensor),
                (Step::Leaf(_), None) => return Err(crate::Error::NoTwin("a leaf without a tensor".into())),
            };
            values.push(value);
        }
        Ok(self.roots.iter().map(|&r| values[r].clone()).collect())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (step, known)) in self.steps.iter().zip(&self.known).enumerate() {
            let shape = format!("{} {:?}", known.dtype.as_str(), known.dims);
            match step {
                Step::Leaf(spec) => writeln!(f, "  %{i} = leaf {} : {shape}", spec.layout.name())?,
                Step::Op { op, scalars, inputs } => writeln!(f, "  %{i} = {op} {scalars:?} {inputs:?} : {shape}")?,
            }
        }
        write!(f, "  roots {:?}, seed {}", self.roots, self.seed)
    }
}
