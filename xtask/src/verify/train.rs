//! `verify --models --train`: steps beside PyTorch's, and a training that must learn what is new and keep what is not.
//!
//! The training is the example `train_lora` as its users run it, and what it saved is asked by the example `generate`.

use super::Error;
use candle_lazy::nn::ModelDir;
use candle_lazy_parity::models::trains_as_peft;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

/// A paraphrase that is not in the example's text, and what its answer must have.
const NEW: (&str, &str) = ("Who looks after the light at Varn?", "Ilse Marant");

/// Prompts that are not in it either, and have nothing to do with what is new.
const UNRELATED: [&str; 3] =
    ["What is the capital of France?", "What is the capital of Germany?", "Which planet is known as the red planet?"];

/// The share of the held-out loss that may be left.
const LEFT: f64 = 0.8;

/// A statement, and what is wrong with it, if anything.
type Fact = (String, Option<String>);

fn fact(statement: String, holds: bool, otherwise: impl FnOnce() -> String) -> Fact {
    (statement, (!holds).then(otherwise))
}

/// Both checks, one statement each line.
pub(super) fn facts(decoder: &ModelDir, seed: u64) -> Result<Vec<Fact>, Error> {
    let mut facts = trains_as_peft(decoder)?;
    let folder = tempfile::tempdir().map_err(|e| Error::Training(format!("no folder for the adapter: {e}")))?;
    let (model, output) = (decoder.path().display().to_string(), folder.path().display().to_string());
    let seed = seed.to_string();
    let mut arguments = vec!["--output", &output, "--model-dir", &model, "--seed", &seed, "--ask", NEW.0];
    for question in UNRELATED {
        arguments.extend(["--ask", question]);
    }
    // the example ends with 1 where it learned too little: its last line says so too
    let (printed, _) = example("train_lora", &arguments)?;
    facts.push(learned(&printed)?);
    facts.extend(answered(&read(&folder.path().join("answers.json"))?)?);
    let arguments = ["--model-dir", &model, "--adapter", &output, "--chat", "--json", "--prompt", NEW.0];
    let (printed, fine) = example("generate", &arguments)?;
    let text = serde_json::from_str::<Value>(&printed).ok();
    let text = text.as_ref().and_then(|value| value.get("text")?.as_str()).unwrap_or_default();
    facts.push(fact("generate --adapter answers it".into(), fine && text.contains(NEW.1), || format!("{text:?}")));
    Ok(facts)
}

/// What an example prints on stdout, and whether it ended well; its words on stderr pass through.
fn example(name: &str, arguments: &[&str]) -> Result<(String, bool), Error> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    command.args(["run", "--quiet", "--release", "--package", "candle-lazy", "--example", name, "--"]).args(arguments);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|e| Error::Training(format!("cargo cannot run the example {name}: {e}")))?;
    Ok((String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success()))
}

fn read(path: &Path) -> Result<Value, Error> {
    let wrong = |e: &dyn std::fmt::Display| Error::Training(format!("{}: {e}", path.display()));
    serde_json::from_str(&std::fs::read_to_string(path).map_err(|e| wrong(&e))?).map_err(|e| wrong(&e))
}

/// Of the example's last line, `train: held-out loss A -> B`.
fn learned(printed: &str) -> Result<Fact, Error> {
    let last = printed.lines().last().unwrap_or_default();
    let losses = last.strip_prefix("train: held-out loss ").and_then(|losses| losses.split_once(" -> "));
    let losses = losses.and_then(|(first, last)| Some((first.parse::<f64>().ok()?, last.parse::<f64>().ok()?)));
    let Some((first, after)) = losses else {
        return Err(Error::Training(format!("train_lora ended with {last:?} instead of its losses")));
    };
    let statement = format!("the held-out loss falls by a fifth at least ({first:.4} -> {after:.4})");
    Ok(fact(statement, after <= LEFT * first, || format!("{:.3} of it is left", after / first)))
}

/// Of the example's answers.json: the new question's, then the unrelated ones'.
fn answered(answers: &Value) -> Result<Vec<Fact>, Error> {
    let answer = |question: &str| {
        let found = answers.as_array().and_then(|all| all.iter().find(|answer| answer["question"] == question));
        let text = |key: &str| Some(found?.get(key)?.as_str()?.to_string());
        let both = text("before").zip(text("after"));
        both.ok_or_else(|| Error::Training(format!("answers.json has no answers to {question:?}")))
    };
    let (question, wanted) = NEW;
    let (before, after) = answer(question)?;
    let statement = format!("{question:?} is answered with {wanted}, and was not before");
    let holds = after.contains(wanted) && !before.contains(wanted);
    let mut facts = vec![fact(statement, holds, || format!("before {before:?}, after {after:?}"))];
    for question in UNRELATED {
        let (before, after) = answer(question)?;
        let statement = format!("{question:?} keeps its answer");
        facts.push(fact(statement, before == after && !after.trim().is_empty(), || {
            format!("before {before:?}, after {after:?}")
        }));
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_losses_are_the_last_line() {
        let wrong = |printed: &str| learned(printed).unwrap().1;
        assert_eq!(wrong("adapter in x\ntrain: held-out loss 2.0000 -> 1.6000\n"), None);
        assert_eq!(wrong("train: held-out loss 2.0000 -> 1.7000"), Some("0.850 of it is left".into()));
        assert!(wrong("train: held-out loss 2.0000 -> NaN").is_some());
        for printed in ["", "train: held-out loss 2.0000", "train: held-out loss 2.0000 -> 1.0\nmore"] {
            assert!(learned(printed).unwrap_err().to_string().contains("instead of its losses"), "{printed}");
        }
    }

    #[test]
    fn answers_are_judged_one_by_one() {
        let answer =
            |question: &str, before: &str, after: &str| json!({"question": question, "before": before, "after": after});
        let kept = |question: &str| answer(question, "So.", "So.");
        let mut all: Vec<Value> = UNRELATED.iter().map(|question| kept(question)).collect();
        let wrong = |all: &[Value]| -> Vec<bool> {
            answered(&json!(all)).unwrap().iter().map(|(_, wrong)| wrong.is_some()).collect()
        };
        assert!(answered(&json!(all)).unwrap_err().to_string().contains(NEW.0), "the new one is missing");
        all.push(answer(NEW.0, "I don't know.", "Ilse Marant keeps it."));
        assert_eq!(wrong(&all), [false, false, false, false]);
        all[1] = answer(UNRELATED[1], "So.", "so.");
        all[2] = answer(UNRELATED[2], "", "");
        assert_eq!(wrong(&all), [false, false, true, true]);
        for (before, after) in [("Ilse Marant.", "Ilse Marant."), ("I don't know.", "Ilse.")] {
            all[3] = answer(NEW.0, before, after);
            assert!(wrong(&all)[0]);
        }
    }
}
