//! Decoder configs as Hugging Face writes them.

use crate::common::{tiny_config, TestResult};
use candle_lazy_nn::models::CausalLmConfig;
use candle_lazy_nn::{Error, RopeScaling};

fn json(extra: &str) -> String {
    format!(
        r#"{{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05{extra}}}"#
    )
}

#[test]
fn a_llama_config() -> TestResult {
    let config = CausalLmConfig::from_json(&json(
        r#", "model_type": "llama", "rope_theta": 100000, "tie_word_embeddings": true, "hidden_act": "silu",
           "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": null, "torch_dtype": "bfloat16""#,
    ))?;
    assert_eq!((config.head_dim, config.num_key_value_heads, config.rope_theta), (64, 3, 100_000.));
    assert!(config.tie_word_embeddings && !config.qkv_bias && !config.out_bias);
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    assert_eq!(config.rope_scaling, RopeScaling::None);
    Ok(())
}

#[test]
fn a_qwen2_config_has_biases_and_ignores_an_unused_window() -> TestResult {
    let text = json(
        r#", "model_type": "qwen2", "use_sliding_window": false, "sliding_window": 32768, "eos_token_id": [5, 6]"#,
    );
    let config = CausalLmConfig::from_json(&text)?;
    assert!(config.qkv_bias && !config.out_bias);
    assert_eq!((config.sliding_window, config.eos_token_ids.as_slice()), (None, &[5, 6][..]));
    Ok(())
}

#[test]
fn a_mistral_config_has_its_window() -> TestResult {
    let config =
        CausalLmConfig::from_json(&json(r#", "model_type": "mistral", "sliding_window": 4096, "head_dim": 32"#))?;
    assert_eq!((config.sliding_window, config.head_dim), (Some(4096), 32));
    Ok(())
}

#[test]
fn rope_scalings() -> TestResult {
    let scaling = |text: &str| CausalLmConfig::from_json(&json(text)).map(|c| (c.rope_scaling, c.rope_theta));
    let llama3 = r#", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#;
    let want = RopeScaling::Llama3 { factor: 8., low_freq_factor: 1., high_freq_factor: 4., original_context: 8192 };
    assert_eq!(scaling(llama3)?, (want, 500_000.));
    let linear = r#", "rope_scaling": {"type": "linear", "factor": 2}"#;
    assert_eq!(scaling(linear)?, (RopeScaling::Linear { factor: 2. }, 10_000.));
    let parameters = r#", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}"#;
    assert_eq!(scaling(parameters)?, (RopeScaling::None, 1_000_000.));
    let yarn = scaling(r#", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#);
    assert!(matches!(&yarn, Err(Error::Unsupported { found, .. }) if found == "yarn"), "{yarn:?}");
    let lacking = scaling(r#", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}"#);
    assert!(
        matches!(&lacking, Err(Error::Config { message, .. }) if message.contains("low_freq_factor")),
        "{lacking:?}"
    );
    assert!(scaling(r#", "rope_scaling": {"type": "linear", "factor": -2}"#).is_err());
    Ok(())
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let load = |text: &str| CausalLmConfig::from_json(&json(text)).map(|_| ());
    let error = load(r#", "model_type": "mamba""#);
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "mamba"), "{error:?}");
    let error = load(r#", "hidden_act": "gelu""#);
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "gelu"), "{error:?}");
}

#[test]
fn broken_configs_are_refused() {
    for text in ["", "[]", "{", r#"{"vocab_size": 3}"#, r#"{"vocab_size": -1}"#] {
        assert!(matches!(CausalLmConfig::from_json(text), Err(Error::Config { .. })), "{text}");
    }
    assert!(matches!(CausalLmConfig::from_file("/nowhere/config.json"), Err(Error::Io { .. })));
}

#[test]
fn sizes_that_contradict_each_other_are_refused() {
    let check = |change: &dyn Fn(&mut CausalLmConfig)| {
        let mut config = tiny_config();
        change(&mut config);
        config.validate("test")
    };
    assert!(check(&|_| {}).is_ok());
    let wrong: [&dyn Fn(&mut CausalLmConfig); 9] = [
        &|c| c.hidden_size = 0,
        &|c| c.num_attention_heads = 0,
        &|c| c.num_key_value_heads = 4,
        &|c| c.head_dim = 5,
        &|c| c.vocab_size = usize::MAX,
        &|c| c.rms_norm_eps = -1.,
        &|c| c.rope_theta = 0.,
        &|c| c.rope_theta = f32::NAN,
        &|c| c.sliding_window = Some(0),
    ];
    for (index, change) in wrong.into_iter().enumerate() {
        assert!(matches!(check(change), Err(Error::Config { .. })), "case {index}");
    }
}

#[test]
fn what_would_be_computed_otherwise_is_refused() {
    let refused = |text: &str, says: &str| {
        let error = CausalLmConfig::from_json(&json(text)).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    };
    refused(r#", "rope_scaling": {"factor": 4.0}"#, "no rope_type");
    refused(r#", "rope_parameters": {"rope_theta": 1e4, "original_max_position_embeddings": 8192}"#, "no rope_type");
    refused(r#", "partial_rotary_factor": 0.5"#, "partial_rotary_factor");
    refused(r#", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}"#, "partial_rotary_factor");
    refused(r#", "eos_token_id": 49152"#, "eos_token_id is 49152");
    refused(r#", "eos_token_id": [2, 60000]"#, "eos_token_id is 60000");
    refused(r#", "bos_token_id": 4294967295"#, "bos_token_id");
    refused(r#", "rope_scaling": {"short_factor": [1.0], "long_factor": [2.0]}"#, "rope_scaling.long_factor");
    refused(r#", "rope_scaling": {"rope_type": "default", "attention_factor": 2.0}"#, "attention_factor");
    refused(r#", "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}}"#, "full_attention");
    refused(r#", "rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2}"#, "type dynamic");
    let linear = r#""rope_scaling": {"type": "linear", "factor": 2}"#;
    refused(&format!(r#", {linear}, "rope_parameters": {{"rope_type": "linear", "factor": 4}}"#), "different ways");
    refused(&format!(r#", {linear}, "rope_parameters": {{"rope_type": "yarn"}}"#), "yarn");
    let llama3 = r#", "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1"#;
    refused(&format!("{llama3}, \"high_freq_factor\": 1, \"original_max_position_embeddings\": 64}}"), "not below");
    refused(&format!("{llama3}, \"high_freq_factor\": 4, \"original_max_position_embeddings\": 0}}"), "above 0");
    refused(r#", "eos_token_id": -1"#, "whole number");
    refused(
        r#", "model_type": "qwen2", "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 7"#,
        "23 of 30",
    );
    refused(r#", "sliding_window": 8, "layer_types": ["full_attention"]"#, "layer_types names 1 layers");
    refused(r#", "model_type": "gemma", "hidden_size": null"#, "gemma");
    let same = format!(r#", {linear}, "rope_parameters": {{"rope_type": "linear", "factor": 2, "rope_theta": 5e5}}"#);
    for text in [r#", "partial_rotary_factor": 1.0, "rope_scaling": {}"#, same.as_str()] {
        assert!(CausalLmConfig::from_json(&json(text)).is_ok(), "{text}");
    }
}

#[test]
fn an_object_without_a_word_on_scaling_hides_no_other() -> TestResult {
    let text =
        r#", "rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 20000.0}"#;
    let config = CausalLmConfig::from_json(&json(text))?;
    assert_eq!((config.rope_scaling, config.rope_theta), (RopeScaling::Linear { factor: 4. }, 20_000.));
    let text = r#", "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4, "rope_theta": 30000.0}"#;
    let config = CausalLmConfig::from_json(&json(text))?;
    assert_eq!((config.rope_scaling, config.rope_theta), (RopeScaling::Linear { factor: 4. }, 30_000.));
    Ok(())
}

#[test]
fn windows_of_qwen2_begin_where_the_config_says() -> TestResult {
    let window = |more: &str| {
        let qwen2 = r#", "model_type": "qwen2", "use_sliding_window": true, "sliding_window": 8"#;
        CausalLmConfig::from_json(&json(&format!("{qwen2}{more}"))).map(|c| c.sliding_window)
    };
    assert_eq!(window(r#", "max_window_layers": 0"#)?, Some(8));
    assert_eq!(window(r#", "max_window_layers": 30"#)?, None);
    assert_eq!(window(r#", "max_window_layers": 99"#)?, None);
    let types = |name: &str| format!(r#", "layer_types": [{}]"#, vec![format!("\"{name}\""); 30].join(", "));
    assert_eq!(window(&types("full_attention"))?, None);
    assert_eq!(window(&types("sliding_attention"))?, Some(8));
    // 28 where it is not said: two of thirty layers have a window
    assert!(window("").is_err());
    assert!(window(&types("chunked_attention")).is_err());
    Ok(())
}
