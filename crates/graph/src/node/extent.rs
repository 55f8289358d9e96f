//! The dims of a node: inline, since most are read as a slice and only few are asked for as Candle's shape, which is memory of its own.

use crate::op::Dims;
use candle_core::Shape;
use std::sync::OnceLock;

/// Dims, and the shape of them from when it is asked for.
#[derive(Debug, Clone)]
pub(super) struct Extent {
    dims: Dims,
    // in a box: few nodes have it
    shape: OnceLock<Box<Shape>>,
}

impl Extent {
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

impl From<Dims> for Extent {
    #[inline]
    fn from(dims: Dims) -> Self {
        Self { dims, shape: OnceLock::new() }
    }
}

impl From<&Shape> for Extent {
    fn from(shape: &Shape) -> Self {
        Self::from(Dims::from_slice(shape.dims()))
    }
}
