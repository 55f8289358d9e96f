//! Encodings of indices.

use crate::candle::{Result, Tensor, WithDType};

/// `on_value` where the new last dim's index equals the id, `off_value` elsewhere: ids (…; u8, u32 or i64) give (…, depth) of the
/// values' dtype; −1 gives `off_value` everywhere. As in Candle the ids are read, so that this evaluates them;
/// [`Tensor::one_hot`] records.
///
/// # Errors
/// When an id is out of range, or the ids are no integers.
#[track_caller]
pub fn one_hot<D: WithDType>(indices: Tensor, depth: usize, on_value: D, off_value: D) -> Result<Tensor> {
    let made = candle_nn::encoding::one_hot(indices.eval()?, depth, on_value, off_value);
    match made {
        Ok(hot) => Ok(hot.into()),
        Err(error) => Err(crate::candle::Error::from(error).at_caller()),
    }
}
