//! Texts for the training of decoders: documents of tokens, packed into rows of one length, in shuffled batches.
//!
//! ```
//! use candle_lazy_nn::data::{Document, Packing, Rows};
//! use candle_core::Device;
//!
//! # fn main() -> candle_lazy_nn::Result<()> {
//! // a prompt of two tokens and an answer of two; a text of three
//! let documents = [Document::with_prompt(vec![5, 6, 7, 8], 2)?, Document::new(vec![1, 2, 3])?];
//! let rows = Rows::pack(&documents, 4, &Packing::Documents { end: Some(0), pad: 9 })?;
//! let batch = rows.batch(&[0, 1], &Device::Cpu)?;
//! assert_eq!(batch.inputs.to_vec2::<u32>()?, [[5, 6, 7, 8], [1, 2, 3, 9]]);
//! assert_eq!(batch.targets.to_vec2::<i64>()?, [[-100, 7, 8, 0], [2, 3, 0, -100]]);
//! # Ok(())
//! # }
//! ```

mod batches;
mod rows;

pub use batches::{split, Batches};
pub use rows::{Batch, Packing, Rows};

use crate::error::{Error, Result};

/// The target of a position that is not learned from, as PyTorch's `cross_entropy` and Hugging Face's labels have it.
pub const IGNORE_INDEX: i64 = -100;

/// A text as tokens, of which the first may be a prompt that is read and not learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    ids: Vec<u32>,
    prompt: usize,
}

impl Document {
    /// A text that is learned from its second token on: the first has nothing before it.
    ///
    /// # Errors
    /// As [`Document::with_prompt`].
    #[track_caller]
    pub fn new(ids: Vec<u32>) -> Result<Self> {
        Self::with_prompt(ids, 0)
    }

    /// A text whose first `prompt` tokens are not learned.
    ///
    /// # Errors
    /// [`Error::Data`] where there are no tokens, or none after the prompt.
    #[track_caller]
    pub fn with_prompt(ids: Vec<u32>, prompt: usize) -> Result<Self> {
        if ids.is_empty() {
            return Err(Error::data("a document without tokens"));
        }
        if prompt >= ids.len() {
            let message =
                format_args!("a document of {} tokens, {prompt} of them its prompt: nothing to learn", ids.len());
            return Err(Error::data(message));
        }
        Ok(Self { ids, prompt })
    }

    /// The tokens.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many of them are the prompt.
    #[must_use]
    pub fn prompt_len(&self) -> usize {
        self.prompt
    }
}
