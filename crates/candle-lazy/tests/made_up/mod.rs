//! Weights of made-up models with one layer: their names and shapes, and numbers for them.

use candle_core::{Device, Tensor};

/// Numbers between −0.5 and 0.5, no two alike (Weyl's sequence of the golden ratio).
pub(crate) fn numbers(shape: &[usize], seed: usize) -> candle_core::Result<Tensor> {
    let count: usize = shape.iter().product();
    let values = (0..count).map(|i| ((((i + 1) * (seed + 1)) as f64 * 0.618_033_988_749_895).fract() - 0.5) as f32);
    Tensor::from_vec(values.collect(), shape, &Device::Cpu)
}

/// How large a model is.
pub(crate) struct Sizes {
    pub(crate) words: usize,
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
}

type Shapes = Vec<(&'static str, Vec<usize>)>;

/// BERT's, with a table of so many positions.
pub(crate) fn encoder(sizes: &Sizes, positions: usize) -> Shapes {
    let &Sizes { words, hidden, inner } = sizes;
    let (h, square) = (|| vec![hidden], || vec![hidden, hidden]);
    vec![
        ("embeddings.word_embeddings.weight", vec![words, hidden]),
        ("embeddings.position_embeddings.weight", vec![positions, hidden]),
        ("embeddings.token_type_embeddings.weight", vec![2, hidden]),
        ("embeddings.LayerNorm.weight", h()),
        ("embeddings.LayerNorm.bias", h()),
        ("encoder.layer.0.attention.self.query.weight", square()),
        ("encoder.layer.0.attention.self.query.bias", h()),
        ("encoder.layer.0.attention.self.key.weight", square()),
        ("encoder.layer.0.attention.self.key.bias", h()),
        ("encoder.layer.0.attention.self.value.weight", square()),
        ("encoder.layer.0.attention.self.value.bias", h()),
        ("encoder.layer.0.attention.output.dense.weight", square()),
        ("encoder.layer.0.attention.output.dense.bias", h()),
        ("encoder.layer.0.attention.output.LayerNorm.weight", h()),
        ("encoder.layer.0.attention.output.LayerNorm.bias", h()),
        ("encoder.layer.0.intermediate.dense.weight", vec![inner, hidden]),
        ("encoder.layer.0.intermediate.dense.bias", vec![inner]),
        ("encoder.layer.0.output.dense.weight", vec![hidden, inner]),
        ("encoder.layer.0.output.dense.bias", h()),
        ("encoder.layer.0.output.LayerNorm.weight", h()),
        ("encoder.layer.0.output.LayerNorm.bias", h()),
    ]
}

/// Llama's, with half as many heads for keys and values, and a head of its own or none.
pub(crate) fn decoder(sizes: &Sizes, head: bool) -> Shapes {
    let &Sizes { words, hidden, inner } = sizes;
    let (h, square, half) = (|| vec![hidden], || vec![hidden, hidden], || vec![hidden / 2, hidden]);
    let mut shapes = vec![("model.embed_tokens.weight", vec![words, hidden])];
    shapes.extend(head.then(|| ("lm_head.weight", vec![words, hidden])));
    shapes.extend([
        ("model.norm.weight", h()),
        ("model.layers.0.input_layernorm.weight", h()),
        ("model.layers.0.post_attention_layernorm.weight", h()),
        ("model.layers.0.self_attn.q_proj.weight", square()),
        ("model.layers.0.self_attn.k_proj.weight", half()),
        ("model.layers.0.self_attn.v_proj.weight", half()),
        ("model.layers.0.self_attn.o_proj.weight", square()),
        ("model.layers.0.mlp.gate_proj.weight", vec![inner, hidden]),
        ("model.layers.0.mlp.up_proj.weight", vec![inner, hidden]),
        ("model.layers.0.mlp.down_proj.weight", vec![hidden, inner]),
    ]);
    shapes
}
