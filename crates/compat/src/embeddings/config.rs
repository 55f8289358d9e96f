//! Which model, and what becomes of its vectors.

use serde::{Deserialize, Serialize};

/// The published models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum EmbeddingModelType {
    /// `intfloat/e5-small-v2`, 384 numbers per text.
    #[default]
    E5SmallV2,
    /// `sentence-transformers/all-MiniLM-L6-v2`, 384 numbers per text.
    AllMiniLmL6V2,
    /// `sentence-transformers/all-mpnet-base-v2`, 768 numbers per text.
    AllMpnetBaseV2,
}

impl EmbeddingModelType {
    /// The model's name on the Hugging Face hub.
    pub const fn model_id(self) -> &'static str {
        match self {
            Self::E5SmallV2 => "intfloat/e5-small-v2",
            Self::AllMiniLmL6V2 => "sentence-transformers/all-MiniLM-L6-v2",
            Self::AllMpnetBaseV2 => "sentence-transformers/all-mpnet-base-v2",
        }
    }

    /// Numbers per text.
    pub const fn dimension(self) -> usize {
        match self {
            Self::E5SmallV2 | Self::AllMiniLmL6V2 => 384,
            Self::AllMpnetBaseV2 => 768,
        }
    }
}

/// Which model, and what becomes of its vectors.
#[derive(Debug, Clone)]
pub struct EmbeddingConfig {
    /// The model.
    pub model_type: EmbeddingModelType,
    /// Whether vectors are divided by their Euclidean norm.
    pub normalize: bool,
    /// Tokens of the longest text, the model's marks around it included; what is beyond is cut off. At most what the model takes.
    pub max_seq_length: usize,
}

impl Default for EmbeddingConfig {
    /// E5, vectors of length 1, 512 tokens.
    fn default() -> Self {
        Self { model_type: EmbeddingModelType::default(), normalize: true, max_seq_length: 512 }
    }
}
