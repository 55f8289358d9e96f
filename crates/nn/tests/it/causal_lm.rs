//! Decoders against candle-transformers on the same random weights.

use crate::common::{builder, close, decoder_vars, row, tiny_config, Rng, TestResult};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::models::{Cache, CausalLm, CausalLmConfig, GenerateOptions};
use candle_lazy_nn::{Error, LazyTensor, RopeScaling};
use candle_transformers::models::llama as eager;

fn eager_config(config: &CausalLmConfig) -> eager::Config {
    eager::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: match config.rope_scaling {
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                Some(eager::Llama3RopeConfig {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original_context,
                    rope_type: eager::Llama3RopeType::Llama3,
                })
            }
            _ => None,
        },
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
    }
}

fn largest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = index;
        }
    }
    best as u32
}

/// Prefill and `steps` greedy steps, eager and lazy side by side on the eager ids.
fn same_as_eager(config: &CausalLmConfig, seed: u64, prompt: usize, steps: usize) -> TestResult {
    let vars = decoder_vars(config, seed)?;
    let eager_config = eager_config(config);
    let theirs = eager::Llama::load(builder(&vars), &eager_config)?;
    let mut their_cache = eager::Cache::new(true, DType::F32, &eager_config, &Device::Cpu)?;
    let ours = CausalLm::load(builder(&vars), config)?;
    let mut our_cache = ours.new_cache(prompt + steps)?;
    let mut pending = Rng::new(seed + 1).ids(prompt, config.vocab_size);
    let mut position = 0;
    for step in 0..=steps {
        let want = theirs.forward(&row(&pending)?, position, &mut their_cache)?;
        let got = ours.forward(&row(&pending)?.into(), &mut our_cache)?.eval()?;
        close(&got, &want, 1e-4)?;
        position += pending.len();
        assert_eq!(our_cache.position(), position);
        let next = largest(&want.flatten_all()?.to_vec1::<f32>()?);
        assert_eq!(largest(&got.flatten_all()?.to_vec1::<f32>()?), next, "another id at step {step}");
        pending = vec![next];
    }
    Ok(())
}

#[test]
fn a_grouped_decoder_is_candle_transformers() -> TestResult {
    same_as_eager(&tiny_config(), 1, 9, 24)
}

#[test]
fn a_tied_decoder_is_candle_transformers() -> TestResult {
    let config = CausalLmConfig { tie_word_embeddings: true, ..tiny_config() };
    same_as_eager(&config, 2, 5, 24)
}

#[test]
fn ungrouped_and_single_kv_heads_are_candle_transformers() -> TestResult {
    same_as_eager(&CausalLmConfig { num_key_value_heads: 6, ..tiny_config() }, 3, 4, 6)?;
    same_as_eager(&CausalLmConfig { num_key_value_heads: 1, ..tiny_config() }, 4, 4, 6)
}

#[test]
fn a_prompt_of_one_token_is_candle_transformers() -> TestResult {
    same_as_eager(&tiny_config(), 5, 1, 4)
}

#[test]
fn llama3_rope_scaling_is_candle_transformers() -> TestResult {
    let config = CausalLmConfig {
        head_dim: 8,
        num_attention_heads: 3,
        num_key_value_heads: 1,
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.,
            low_freq_factor: 1.,
            high_freq_factor: 4.,
            original_context: 32,
        },
        ..tiny_config()
    };
    same_as_eager(&config, 6, 12, 8)
}

#[test]
fn qwen2_with_biases_is_candle_transformers() -> TestResult {
    use candle_transformers::models::qwen2;
    for tie_word_embeddings in [false, true] {
        let config = CausalLmConfig { qkv_bias: true, tie_word_embeddings, ..tiny_config() };
        let vars = decoder_vars(&config, 7)?;
        let theirs = qwen2::Config {
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            max_position_embeddings: config.max_position_embeddings,
            sliding_window: 1000,
            max_window_layers: 3,
            tie_word_embeddings,
            rope_theta: f64::from(config.rope_theta),
            rms_norm_eps: config.rms_norm_eps,
            use_sliding_window: false,
            hidden_act: candle_nn::Activation::Silu,
        };
        let mut theirs = qwen2::ModelForCausalLM::new(&theirs, builder(&vars))?;
        let ours = CausalLm::load(builder(&vars), &config)?;
        let mut cache = ours.new_cache(20)?;
        let mut position = 0;
        for piece in [6, 1, 1] {
            let ids = Rng::new(8 + position as u64).ids(piece, config.vocab_size);
            let want = theirs.forward(&row(&ids)?, position)?.squeeze(1)?;
            close(&ours.forward(&row(&ids)?.into(), &mut cache)?.eval()?, &want, 1e-4)?;
            position += piece;
        }
    }
    Ok(())
}

#[test]
fn a_prompt_in_pieces_gives_the_same_logits() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 9)?), &config)?;
    let ids = Rng::new(10).ids(23, config.vocab_size);
    let whole = model.forward(&row(&ids)?.into(), &mut model.new_cache(23)?)?.eval()?;
    for chunk in [1, 2, 7, 22] {
        let mut cache = model.new_cache(23)?;
        let mut last = None;
        for piece in ids.chunks(chunk) {
            last = Some(model.forward(&row(piece)?.into(), &mut cache)?.eval()?);
        }
        close(&last.ok_or("no piece")?, &whole, 2e-6)?;
    }
    Ok(())
}

#[test]
fn logits_of_all_positions_agree_with_those_of_the_last() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 11)?), &config)?;
    let ids = Rng::new(12).ids(6, config.vocab_size);
    let all = model.forward_all(&row(&ids)?.into(), &mut model.new_cache(6)?)?.eval()?;
    assert_eq!(all.dims(), [1, 6, config.vocab_size]);
    for end in 1..=6 {
        let last = model.forward(&row(&ids[..end])?.into(), &mut model.new_cache(6)?)?.eval()?;
        close(&all.narrow(1, end - 1, 1)?.squeeze(1)?, &last, 2e-6)?;
    }
    Ok(())
}

#[test]
fn rows_of_a_batch_do_not_see_each_other() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 13)?), &config)?;
    let (a, b) = (Rng::new(14).ids(5, config.vocab_size), Rng::new(15).ids(5, config.vocab_size));
    let both = Tensor::cat(&[row(&a)?, row(&b)?], 0)?;
    let together = model.forward(&both.into(), &mut model.new_cache(8)?)?.eval()?;
    for (index, ids) in [a, b].iter().enumerate() {
        let alone = model.forward(&row(ids)?.into(), &mut model.new_cache(8)?)?.eval()?;
        close(&together.narrow(0, index, 1)?, &alone, 2e-6)?;
    }
    Ok(())
}

#[test]
fn a_wide_window_changes_nothing_and_a_narrow_one_hides_the_past() -> TestResult {
    let config = tiny_config();
    let vars = decoder_vars(&config, 16)?;
    let run = |window: Option<usize>, ids: &[u32]| -> Result<Tensor, Box<dyn std::error::Error>> {
        let config = CausalLmConfig { sliding_window: window, num_hidden_layers: 1, ..config.clone() };
        let mut vars = vars.clone();
        vars.retain(|name, _| !name.contains("layers.1.") && !name.contains("layers.2."));
        let model = CausalLm::load(builder(&vars), &config)?;
        Ok(model.forward(&row(ids)?.into(), &mut model.new_cache(10)?)?.eval()?)
    };
    let ids = Rng::new(17).ids(8, config.vocab_size);
    let mut other = ids.clone();
    other[3] = (other[3] + 1) % config.vocab_size as u32;
    close(&run(Some(8), &ids)?, &run(None, &ids)?, 2e-6)?;
    // With one block and a window of 4 the last position (7) sees 4..=7 and never position 3.
    close(&run(Some(4), &ids)?, &run(Some(4), &other)?, 0.)?;
    assert!(close_enough(&run(Some(5), &ids)?, &run(Some(5), &other)?)? > 1e-4, "a window of 5 sees position 3");
    Ok(())
}

fn close_enough(a: &Tensor, b: &Tensor) -> candle_core::Result<f64> {
    let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
    Ok(crate::common::relative(&a, &b))
}

#[test]
fn bf16_weights_give_nearly_the_same_logits() -> TestResult {
    let config = tiny_config();
    let vars = decoder_vars(&config, 18)?;
    let ids = Rng::new(19).ids(7, config.vocab_size);
    let run = |dtype| -> Result<Tensor, Box<dyn std::error::Error>> {
        let vb = candle_nn::VarBuilder::from_tensors(vars.clone(), dtype, &Device::Cpu);
        let model = CausalLm::load(vb, &config)?;
        assert_eq!(model.dtype(), dtype);
        Ok(model.forward(&row(&ids)?.into(), &mut model.new_cache(8)?)?.eval()?.to_dtype(DType::F32)?)
    };
    close(&run(DType::BF16)?, &run(DType::F32)?, 0.08)
}

#[test]
fn truncating_continues_from_the_earlier_position() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 20)?), &config)?;
    let ids = Rng::new(21).ids(8, config.vocab_size);
    let mut cache = model.new_cache(8)?;
    let want = model.forward(&row(&ids)?.into(), &mut cache)?.eval()?;
    cache.truncate(3);
    let got = model.forward(&row(&ids[3..])?.into(), &mut cache)?.eval()?;
    close(&got, &want, 2e-6)?;
    cache.reset();
    assert_eq!(cache.position(), 0);
    close(&model.forward(&row(&ids)?.into(), &mut cache)?.eval()?, &want, 2e-6)
}

#[test]
fn what_a_cache_has_no_room_for_is_refused_before_anything_changes() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 22)?), &config)?;
    let mut cache = model.new_cache(5)?;
    model.forward(&row(&[1, 2, 3])?.into(), &mut cache)?.eval()?;
    let error = model.forward(&row(&[4, 5, 6])?.into(), &mut cache).map(|_| ());
    assert!(matches!(error, Err(Error::CacheFull { position: 3, added: 3, capacity: 5, .. })), "{error:?}");
    assert_eq!(cache.position(), 3);
    let want = model.forward(&row(&[1, 2, 3, 4, 5])?.into(), &mut model.new_cache(5)?)?.eval()?;
    close(&model.forward(&row(&[4, 5])?.into(), &mut cache)?.eval()?, &want, 2e-6)
}

#[test]
fn an_error_in_the_middle_leaves_the_position() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 23)?), &config)?;
    let mut cache = model.new_cache(6)?;
    model.forward(&row(&[1, 2])?.into(), &mut cache)?.eval()?;
    // A batch of two does not fit a cache of one: the first block finds out.
    let two: LazyTensor = Tensor::new(&[[3u32], [4]], &Device::Cpu)?.into();
    assert!(matches!(model.forward(&two, &mut cache), Err(Error::Cache { .. })));
    assert_eq!(cache.position(), 2);
    let want = model.forward(&row(&[1, 2, 3])?.into(), &mut model.new_cache(6)?)?.eval()?;
    close(&model.forward(&row(&[3])?.into(), &mut cache)?.eval()?, &want, 2e-6)
}

#[test]
fn ids_of_the_wrong_shape_and_foreign_caches_are_refused() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 24)?), &config)?;
    let mut cache = model.new_cache(6)?;
    let empty = LazyTensor::zeros((1, 0), DType::U32, &Device::Cpu)?;
    assert!(matches!(model.forward(&empty, &mut cache), Err(Error::EmptyPrompt { .. })));
    let flat = LazyTensor::zeros(3, DType::U32, &Device::Cpu)?;
    assert!(matches!(model.forward(&flat, &mut cache), Err(Error::Module { .. })));
    let other = CausalLmConfig { num_hidden_layers: 2, ..config.clone() };
    let mut foreign = Cache::new(&other, 6, DType::F32, &Device::Cpu)?;
    assert!(matches!(model.forward(&row(&[1])?.into(), &mut foreign), Err(Error::Cache { .. })));
    assert!(matches!(model.new_cache(65), Err(Error::PromptTooLong { len: 65, context: 64, .. })));
    assert!(matches!(model.new_cache(0), Err(Error::Config { .. })));
    Ok(())
}

#[test]
fn a_config_that_does_not_fit_its_weights_is_refused() -> TestResult {
    let config = tiny_config();
    let vars = decoder_vars(&config, 25)?;
    let load = |change: &dyn Fn(&mut CausalLmConfig)| {
        let mut config = config.clone();
        change(&mut config);
        CausalLm::load(builder(&vars), &config).map(|_| ())
    };
    assert!(load(&|_| {}).is_ok());
    let more = load(&|c| c.num_hidden_layers = 4);
    assert!(matches!(&more, Err(Error::MissingTensor { name, .. }) if name.starts_with("model.layers.3.")), "{more:?}");
    let fewer = load(&|c| c.num_hidden_layers = 2);
    assert!(matches!(&fewer, Err(Error::Config { message, .. }) if message.contains("model.layers.2")), "{fewer:?}");
    let heads = load(&|c| c.num_key_value_heads = 3);
    assert!(matches!(&heads, Err(Error::TensorShape { name, .. }) if name.ends_with("k_proj.weight")), "{heads:?}");
    let vocab = load(&|c| c.vocab_size = 60);
    assert!(matches!(&vocab, Err(Error::TensorShape { name, .. }) if name.contains("embed_tokens")), "{vocab:?}");
    let bias = load(&|c| c.qkv_bias = true);
    assert!(matches!(&bias, Err(Error::MissingTensor { name, .. }) if name.ends_with("q_proj.bias")), "{bias:?}");
    let zeros = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    assert!(CausalLm::load(zeros, &config).is_ok(), "a builder that has every name");
    Ok(())
}

#[test]
fn a_context_beyond_all_memory_is_an_error_and_not_the_end_of_the_process() -> TestResult {
    let config = CausalLmConfig { max_position_embeddings: 1 << 40, ..tiny_config() };
    let model = CausalLm::load(builder(&decoder_vars(&config, 9)?), &config)?;
    for positions in [1 << 40, 1 << 36] {
        let options = GenerateOptions { max_new_tokens: positions, ..GenerateOptions::default() };
        let error = model.generate(&[1, 2], options).map(drop).unwrap_err().to_string();
        assert!(error.contains("memory") && error.contains("positions"), "{error}");
    }
    // A long context that is asked for and not used costs nothing but the buffers of keys and values.
    let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
    assert_eq!(model.generate(&[1, 2], options)?.collect::<Result<Vec<u32>, _>>()?.len(), 3);
    Ok(())
}

#[test]
fn weights_that_the_config_denies_are_an_error() -> TestResult {
    let config = tiny_config();
    let with_biases = CausalLmConfig { qkv_bias: true, ..config.clone() };
    let error = CausalLm::load(builder(&decoder_vars(&with_biases, 3)?), &config).map(drop).unwrap_err().to_string();
    assert!(error.contains("model.layers.0.self_attn.q_proj.bias") && error.contains("attention_bias"), "{error}");
    for name in ["self_attn.o_proj.bias", "self_attn.q_norm.weight", "mlp.down_proj.bias", "input_layernorm.bias"] {
        let mut vars = decoder_vars(&config, 3)?;
        vars.insert(format!("model.layers.2.{name}"), Tensor::zeros(24, DType::F32, &Device::Cpu)?);
        let error = CausalLm::load(builder(&vars), &config).map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("model.layers.2.{name}")), "{error}");
    }
    for name in ["model.norm.bias", "lm_head.bias"] {
        let mut vars = decoder_vars(&config, 3)?;
        vars.insert(name.to_string(), Tensor::zeros(24, DType::F32, &Device::Cpu)?);
        let error = CausalLm::load(builder(&vars), &config).map(drop).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    Ok(())
}

#[test]
fn a_text_may_pass_the_rows_of_the_rotary_table_that_are_made_at_first() -> TestResult {
    let config = CausalLmConfig { max_position_embeddings: 1 << 14, num_hidden_layers: 1, ..tiny_config() };
    let model = CausalLm::load(builder(&decoder_vars(&config, 5)?), &config)?;
    let ids: Vec<u32> = (0..4300).map(|i| i % 61).collect();
    // in one piece, and step by step over the end of the first rows
    let mut whole = model.new_cache(5000)?;
    let want = model.forward(&LazyTensor::from(row(&ids)?), &mut whole)?.eval()?;
    let mut pieces = model.new_cache(5000)?;
    let mut got = None;
    for piece in [&ids[..4090], &ids[4090..4095], &ids[4095..4097], &ids[4097..]] {
        let logits = model.forward(&LazyTensor::from(row(piece)?), &mut pieces)?;
        let mut roots = pieces.handles();
        roots.push(&logits);
        candle_lazy_exec::materialize(&roots)?;
        got = Some(logits.eval()?);
    }
    close(&got.ok_or("no piece")?, &want, 1e-5)
}
