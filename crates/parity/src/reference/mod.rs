//! References: plain loops over `Vec<f64>` that call neither Candle nor any crate of this workspace.
//!
//! What they say is what an op means. Sums are carried in twice the precision of f64, so that a reference is better than
//! any f64 result it judges.

mod attention;
mod contraction;
mod double;
mod elementwise;
mod gradients;
mod movement;
mod placed;
mod reduce;
mod rows;

pub use attention::{attention, attention_backward, causal_mask, AttentionSpec};
pub use contraction::{linear, lora, lora_segments, matmul};
pub use elementwise::{binary, compare, select, unary, Binary, Compare, Unary};
pub use gradients::{
    cross_entropy_gradient, gather_gradient, log_softmax_gradient, log_sum_exp_gradient, norm_gradient, power_gradient,
    scatter_gradient, softmax_gradient, variance_gradient, NormShape,
};
pub use movement::{broadcast, concat, embedding, index_select, narrow, permute, reshape, slice_assign};
pub use placed::{arg_reduce, gather, index_add, random, scatter, scatter_add, stride};
pub use reduce::{reduce, variance_of_roundings, Reduction};
pub use rows::{cross_entropy, glu, group_norm, layer_norm, log_softmax, rms_norm, rope, softmax};

/// A row-major array of f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Arr {
    /// The dimensions.
    pub dims: Vec<usize>,
    /// The elements, row-major.
    pub data: Vec<f64>,
}

impl Arr {
    /// An array; the number of elements is the product of the dims.
    ///
    /// # Errors
    /// When it is not.
    pub fn new(dims: &[usize], data: Vec<f64>) -> Result<Self> {
        if dims.iter().product::<usize>() != data.len() {
            return Err(BadShape(format!("{} elements for {dims:?}", data.len())));
        }
        Ok(Self { dims: dims.to_vec(), data })
    }

    /// An array of one repeated number.
    #[must_use]
    pub fn full(dims: &[usize], value: f64) -> Self {
        Self { dims: dims.to_vec(), data: vec![value; dims.iter().product()] }
    }

    /// The same array with every element mapped.
    #[must_use]
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { dims: self.dims.clone(), data: self.data.iter().map(|&x| f(x)).collect() }
    }

    /// The largest |x| that is finite; 0 for none.
    #[must_use]
    pub fn max_abs(&self) -> f64 {
        self.data.iter().filter(|x| x.is_finite()).fold(0.0, |m, x| m.max(x.abs()))
    }
}

/// A result and, where it is a sum of products, Σ|aᵢ·bᵢ| of each element.
#[derive(Debug, Clone)]
pub struct Summed {
    /// The result.
    pub value: Arr,
    /// The sum of the magnitudes of what was added, per element.
    pub magnitude: Arr,
    /// Where an inner sum's rounding reaches the result enlarged: the result's magnitude as that rounding sees it. It counts
    /// with the precision of the arithmetic, `magnitude` with that of the result.
    pub inner: Option<Arr>,
}

/// Operands that a reference cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("reference: {0}")]
pub struct BadShape(pub String);

/// The result of a reference.
pub type Result<T> = std::result::Result<T, BadShape>;

pub(crate) fn bad<T>(text: impl Into<String>) -> Result<T> {
    Err(BadShape(text.into()))
}

/// Row-major strides.
#[must_use]
pub fn strides(dims: &[usize]) -> Vec<usize> {
    let mut out = vec![1; dims.len()];
    for d in (1..dims.len()).rev() {
        out[d - 1] = out[d] * dims[d];
    }
    out
}

/// Every index of a shape in row-major order.
pub fn indices(dims: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    let count: usize = dims.iter().product();
    (0..count).map(move |mut flat| {
        let mut index = vec![0; dims.len()];
        for d in (0..dims.len()).rev() {
            index[d] = flat % dims[d];
            flat /= dims[d];
        }
        index
    })
}

/// The position of `index` in an array that broadcasts (numpy's rule) to the shape that `index` walks over.
#[must_use]
pub fn broadcast_offset(dims: &[usize], index: &[usize]) -> usize {
    let skip = index.len() - dims.len();
    strides(dims).iter().zip(dims).zip(&index[skip..]).map(|((s, &n), &i)| if n == 1 { 0 } else { s * i }).sum()
}

/// The shape that two shapes broadcast to.
///
/// # Errors
/// When they do not.
pub fn broadcast_dims(a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |j| dims[j]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => bad(format!("{a:?} and {b:?} do not broadcast")),
        })
        .collect()
}

/// A sum in twice the precision: every rounding error is kept (Knuth's two-sum) and added at the end.
#[derive(Debug, Clone, Copy, Default)]
pub struct Acc {
    sum: f64,
    rest: f64,
    magnitude: f64,
}

impl Acc {
    /// Adds a number.
    pub fn add(&mut self, x: f64) {
        self.add_exact(x);
        self.magnitude += x.abs();
    }

    /// Adds a product, its own rounding error included (an exact product by fused multiply-add).
    pub fn add_product(&mut self, a: f64, b: f64) {
        let p = a * b;
        let error = a.mul_add(b, -p);
        self.add_exact(p);
        if error.is_finite() {
            self.rest += error;
        }
        self.magnitude += p.abs();
    }

    fn add_exact(&mut self, x: f64) {
        let s = self.sum + x;
        let b = s - self.sum;
        let error = (self.sum - (s - b)) + (x - b);
        self.sum = s;
        if error.is_finite() {
            self.rest += error;
        }
    }

    /// The sum.
    #[must_use]
    pub fn value(&self) -> f64 {
        if self.sum.is_finite() {
            self.sum + self.rest
        } else {
            self.sum
        }
    }

    /// The sum of the magnitudes.
    #[must_use]
    pub fn magnitude(&self) -> f64 {
        self.magnitude
    }
}
