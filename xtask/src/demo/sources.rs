//! Where the demo's two models come from.

use super::Error;
use crate::progress::Bars;
use candle_lazy::nn::hub::{cache_dir, ModelSource, WheelModel, ALL_MINILM_L6_V2, SMOLLM2_135M_INSTRUCT};
use candle_lazy::nn::models::{BertConfig, CausalLmConfig};
use candle_lazy::nn::{ModelDir, WeightFiles};
use std::path::{Path, PathBuf};

/// A model and whether it is the published one, whose answers are known.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) dir: ModelDir,
    pub(crate) published: bool,
}

/// The two models of the demo.
#[derive(Debug)]
pub(crate) struct Models {
    pub(crate) encoder: Source,
    pub(crate) decoder: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Encoder,
    Decoder,
}

/// Opens the user's models, and fetches what they do not have.
pub(crate) fn open(dirs: &[PathBuf]) -> Result<Models, Error> {
    Ok(Models { encoder: encoder(dirs)?, decoder: decoder(dirs)? })
}

/// The sentence encoder of [`open`].
pub(crate) fn encoder(dirs: &[PathBuf]) -> Result<Source, Error> {
    source(dirs, Role::Encoder, &ALL_MINILM_L6_V2)
}

/// The language model of [`open`].
pub(crate) fn decoder(dirs: &[PathBuf]) -> Result<Source, Error> {
    source(dirs, Role::Decoder, &SMOLLM2_135M_INSTRUCT)
}

fn source(dirs: &[PathBuf], role: Role, published: &WheelModel) -> Result<Source, Error> {
    if let Some(dir) = find(dirs, role)? {
        let published = is_published(&dir, published);
        return Ok(Source { dir, published });
    }
    let dir = published.fetch(&cache_dir()?, &Bars::default())?;
    Ok(Source { dir, published: true })
}

/// The first model of this role in the user's directories, or in directories inside of them.
fn find(dirs: &[PathBuf], role: Role) -> Result<Option<ModelDir>, Error> {
    for dir in dirs {
        let mut candidates = vec![dir.clone()];
        let opened = ModelDir::open(dir);
        if opened.is_err() {
            let inside = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
            candidates = inside.filter(|path| path.is_dir()).collect();
            candidates.sort();
        }
        let mut any = false;
        for candidate in candidates {
            let model = match ModelDir::open(&candidate) {
                Ok(model) => model,
                // something else may lie beside the models, but a model that is not whole is no reason to take another one
                Err(error) if has_model_files(&candidate) => return Err(error.into()),
                Err(_) => continue,
            };
            any = true;
            if role_of(&model)? == role {
                return Ok(Some(model));
            }
        }
        // a directory that the user names and that holds no model is a mistake, said at once
        if !any {
            opened?;
        }
    }
    Ok(None)
}

fn has_model_files(dir: &Path) -> bool {
    ["config.json", "model.safetensors.index.json"].iter().any(|name| dir.join(name).is_file())
        || std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| entry.path().extension().is_some_and(|extension| extension == "gguf"))
}

/// What a model is, by its config: a language model or an encoder, if it can be read as one. Anything else is an error now and
/// not after the other model has run.
fn role_of(model: &ModelDir) -> Result<Role, Error> {
    if !matches!(model.weights(), WeightFiles::Safetensors(_)) {
        return Ok(Role::Decoder);
    }
    let path = model.file("config.json")?;
    let wrong = |message: String| Error::Model { path: path.clone(), message };
    let text = std::fs::read_to_string(&path).map_err(|e| wrong(e.to_string()))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| wrong(format!("no valid JSON: {e}")))?;
    if !json.is_object() {
        return Err(wrong("no JSON object".to_string()));
    }
    let name = json.get("model_type").and_then(serde_json::Value::as_str);
    match (CausalLmConfig::from_json(&text), BertConfig::from_json(&text)) {
        (Ok(_), _) => Ok(Role::Decoder),
        (_, Ok(_)) => Ok(Role::Encoder),
        (_, Err(error)) if name == Some("bert") => Err(wrong(error.to_string())),
        (Err(error), _) => Err(wrong(error.to_string())),
    }
}

/// Whether a directory holds the published files, judged by names and sizes.
fn is_published(dir: &ModelDir, published: &WheelModel) -> bool {
    published
        .files
        .iter()
        .all(|file| std::fs::metadata(dir.path().join(file.name)).is_ok_and(|metadata| metadata.len() == file.size))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of its own below the build's folder, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("candle-lazy-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    const BERT: &str = r#"{"model_type": "bert", "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "intermediate_size": 4, "max_position_embeddings": 8}"#;

    #[test]
    fn a_config_that_is_neither_is_an_error_that_says_what_it_is() {
        let scratch = Scratch::new("neither");
        scratch.file("e/model.safetensors", "");
        for other in ["roberta", "gemma"] {
            scratch.file("e/config.json", &BERT.replace("bert", other));
            let error = find(&[scratch.0.join("e")], Role::Encoder).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(other), "{error}");
        }
        // without a name it is what it can be read as
        scratch.file("e/config.json", &BERT.replace(r#""model_type": "bert", "#, ""));
        assert!(find(&[scratch.0.join("e")], Role::Encoder).unwrap().is_some());
    }

    #[test]
    fn one_directory_may_hold_both() {
        let scratch = Scratch::new("both");
        scratch.file("e/model.safetensors", "");
        scratch.file("e/config.json", BERT);
        scratch.file("d/x.gguf", "");
        let dirs = [scratch.0.clone()];
        let encoder = find(&dirs, Role::Encoder).unwrap().unwrap();
        assert!(encoder.path().ends_with("e"));
        let decoder = find(&dirs, Role::Decoder).unwrap().unwrap();
        assert!(decoder.path().ends_with("d"));
        assert!(!is_published(&decoder, &SMOLLM2_135M_INSTRUCT));
    }

    #[test]
    fn a_directory_with_one_model_leaves_the_other_to_be_fetched() {
        let scratch = Scratch::new("one");
        scratch.file("x.gguf", "");
        let dirs = [scratch.0.clone()];
        assert!(find(&dirs, Role::Decoder).unwrap().is_some());
        assert!(find(&dirs, Role::Encoder).unwrap().is_none());
    }

    #[test]
    fn a_config_that_is_cut_off_is_named_and_not_taken_for_a_language_model() {
        let scratch = Scratch::new("cut");
        scratch.file("e/model.safetensors", "");
        for broken in [r#"{"model_type": "be"#, "", "[]", "\"bert\""] {
            scratch.file("e/config.json", broken);
            for role in [Role::Encoder, Role::Decoder] {
                for dir in [scratch.0.clone(), scratch.0.join("e")] {
                    let error = find(&[dir], role).unwrap_err().to_string();
                    assert!(error.contains("config.json"), "{error}");
                }
            }
        }
        std::fs::remove_file(scratch.0.join("e/config.json")).unwrap();
        let error = find(&[scratch.0.join("e")], Role::Decoder).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }

    #[test]
    fn a_model_that_is_not_whole_is_an_error_and_not_passed_over() {
        let scratch = Scratch::new("shards");
        scratch.file("notes/readme.txt", "");
        scratch.file("d/x.gguf", "");
        assert!(find(std::slice::from_ref(&scratch.0), Role::Encoder).unwrap().is_none());
        scratch.file("e/config.json", BERT);
        assert!(find(std::slice::from_ref(&scratch.0), Role::Encoder).is_err(), "no weights");
        scratch.file("e/model.safetensors.index.json", r#"{"weight_map": {"a": "1.safetensors"}}"#);
        let error = find(std::slice::from_ref(&scratch.0), Role::Encoder).unwrap_err().to_string();
        assert!(error.contains("1.safetensors"), "{error}");
    }

    #[test]
    fn a_directory_without_a_model_is_an_error() {
        let scratch = Scratch::new("none");
        scratch.file("notes.txt", "");
        assert!(find(std::slice::from_ref(&scratch.0), Role::Encoder).is_err());
        assert!(find(&[scratch.0.join("gone")], Role::Encoder).is_err());
    }
}
