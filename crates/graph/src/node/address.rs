//! Where a leaf's data lies: who reads several storages locks them in the order of their addresses.

use candle_core::Tensor;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The address of a tensor's storage, from when it is asked for: to ask Candle takes a lock. 0 is none.
#[derive(Debug, Default)]
pub(super) struct Address(AtomicUsize);

impl Address {
    /// Of always the same tensor.
    #[inline]
    pub(super) fn of(&self, tensor: &Tensor) -> usize {
        match self.0.load(Ordering::Relaxed) {
            0 => {
                let address = std::ptr::from_ref(&*tensor.storage_and_layout().0) as usize;
                self.0.store(address, Ordering::Relaxed);
                address
            }
            address => address,
        }
    }
}

impl Clone for Address {
    fn clone(&self) -> Self {
        Self(AtomicUsize::new(self.0.load(Ordering::Relaxed)))
    }
}
