//! Where a leaf's data lies, and how, beside the data: to look there costs a miss of the caches.

use super::Value;
use candle_core::Tensor;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where a tensor's storage lies: the same for all tensors on it. It takes the storage's lock for a moment.
#[must_use]
pub fn storage_address(tensor: &Tensor) -> usize {
    std::ptr::from_ref(&*tensor.storage_and_layout().0) as usize
}

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
        Self { address: AtomicUsize::new(0), contiguous: value.is_contiguous() }
    }

    /// Of always the same tensor.
    #[inline]
    pub(super) fn address(&self, tensor: &Tensor) -> usize {
        match self.address.load(Ordering::Relaxed) {
            0 => {
                let address = storage_address(tensor);
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
