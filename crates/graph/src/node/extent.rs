//! The dims of a node: inline, since most are read as a slice and only few are asked for as Candle's shape, which is memory of its own.

use crate::op::Dims;
use candle_core::Shape;
use std::sync::OnceLock;

/// Dims, and the shape of them from when it is asked for.
#[derive(Debug, Default)]
pub(super) struct Extent {
    dims: Dims,
    // in a box: few nodes have it
    shape: OnceLock<Box<Shape>>,
}

impl Extent {
    /// Fills in the dims of a blank: `dims`, and another last one. They are written one by one, since a copy of what was just written in
    /// smaller pieces waits for it.
    #[inline]
    pub(super) fn set(&mut self, dims: &[usize], last: Option<usize>) {
        self.dims.extend(dims.iter().copied().chain(last));
    }

    #[inline]
    pub(super) fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub(super) fn shape(&self) -> &Shape {
        self.shape.get_or_init(|| Box::new(Shape::from(self.dims())))
    }

    #[inline]
    pub(super) fn elem_count(&self) -> usize {
        self.dims.iter().product()
    }
}
