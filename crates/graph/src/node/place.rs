//! Where a leaf's data lies, and how, beside the data: to look there costs a miss of the caches.

use super::Value;
use candle_core::Tensor;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Of a value that never changes.
#[derive(Debug)]
pub(super) struct Place {
    /// The address of a tensor's storage, from when it is asked for, since to ask Candle takes a lock; who reads several storages locks them
    /// in the order of their addresses. 0 is none.
    address: AtomicUsize,
    contiguous: bool,
}

impl Place {
    #[inline]
    pub(super) fn of(value: &Value) -> Self {
        let contiguous = match value {
            Value::Tensor(tensor) => tensor.is_contiguous(),
            Value::Engine(engine) => engine.is_contiguous(),
            Value::Quantized(_) => true,
        };
        Self { address: AtomicUsize::new(0), contiguous }
    }

    /// Of always the same tensor.
    #[inline]
    pub(super) fn address(&self, tensor: &Tensor) -> usize {
        match self.address.load(Ordering::Relaxed) {
            0 => {
                let address = std::ptr::from_ref(&*tensor.storage_and_layout().0) as usize;
                self.address.store(address, Ordering::Relaxed);
                address
            }
            address => address,
        }
    }

    #[inline]
    pub(super) fn is_contiguous(&self) -> bool {
        self.contiguous
    }
}

impl Clone for Place {
    fn clone(&self) -> Self {
        let address = AtomicUsize::new(self.address.load(Ordering::Relaxed));
        Self { address, contiguous: self.contiguous }
    }
}
