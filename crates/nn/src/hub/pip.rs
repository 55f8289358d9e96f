//! Running the user's own `pip download`, so that their configuration (indexes, proxies, certificates) holds.

use super::Progress;
use crate::error::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

/// Ways to call pip, in the order in which they are tried.
pub(super) const PIPS: &[&[&str]] = &[&["python3", "-m", "pip"], &["pip3"], &["pip"], &["python", "-m", "pip"]];

/// How many of pip's last lines an error shows.
const LAST_LINES: usize = 12;

/// What came of one attempt.
enum Outcome {
    Done,
    /// No such program, or a Python without pip.
    NoPip,
    /// This pip does not know `--progress-bar raw`.
    OldPip,
    Failed(Error),
}

/// Downloads the wheel `package==version` into `dir`, without its dependencies and without building anything.
///
/// # Errors
/// [`Error::PipNotFound`], [`Error::Download`] with pip's last lines and a guess at the cause.
pub(super) fn download(
    pips: &[&[&str]],
    package: &str,
    version: &str,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let wanted = format!("{package}=={version}");
    progress.start(&format!("pip download {wanted}"), None);
    for pip in pips {
        let mut outcome = run(pip, &wanted, dir, "raw", progress);
        if matches!(outcome, Outcome::OldPip) {
            outcome = run(pip, &wanted, dir, "off", progress);
        }
        match outcome {
            Outcome::Done => {
                progress.finish();
                return Ok(());
            }
            Outcome::NoPip => {}
            Outcome::OldPip => {
                return Err(Error::Download {
                    command: format!("{} download {wanted}", pip.join(" ")),
                    reason: "this pip knows none of the options that are used".to_string(),
                    output: String::new(),
                })
            }
            Outcome::Failed(error) => return Err(error),
        }
    }
    let tried: Vec<String> = pips.iter().map(|pip| pip.join(" ")).collect();
    Err(Error::PipNotFound { tried: tried.join(", ") })
}

fn run(pip: &[&str], wanted: &str, dir: &Path, bar: &str, progress: &dyn Progress) -> Outcome {
    let Some((program, first)) = pip.split_first() else {
        return Outcome::NoPip;
    };
    let mut command = Command::new(program);
    command.args(first).args(["download", "--no-deps", "--only-binary", ":all:", "--no-input"]);
    command.args(["--disable-pip-version-check", "--progress-bar", bar, "-d"]).arg(dir).arg(wanted);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let shown = format!("{} download --no-deps -d {} {wanted}", pip.join(" "), dir.display());
    let failed =
        |reason: String, output: String| Outcome::Failed(Error::Download { command: shown.clone(), reason, output });
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Outcome::NoPip,
        Err(e) => return failed(format!("it could not be started: {e}"), String::new()),
    };
    // Both pipes are drained at once: a pip that fills the one nobody reads would wait for ever.
    let stderr = child.stderr.take();
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            // What could be read before a failure is still worth showing.
            drop(stderr.read_to_end(&mut text));
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut lines = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let Ok(line) = line else { break };
            match parse_progress(&line) {
                Some((done, total)) => progress.update(done, Some(total)),
                None => lines.push(line),
            }
        }
    }
    let status = child.wait();
    let errors = errors.join().unwrap_or_default();
    match status {
        Ok(status) if status.success() => Outcome::Done,
        Ok(_) if errors.contains("No module named pip") => Outcome::NoPip,
        Ok(_) if bar == "raw" && errors.contains("--progress-bar") => Outcome::OldPip,
        Ok(_) => {
            lines.extend(errors.lines().map(str::to_string));
            let output = lines.split_off(lines.len().saturating_sub(LAST_LINES)).join("\n");
            failed(reason(&format!("{output}\n{errors}")).to_string(), output)
        }
        Err(e) => failed(format!("waiting for it failed: {e}"), errors),
    }
}

/// `Progress 1024 of 2048`, as `--progress-bar raw` prints.
fn parse_progress(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.trim().strip_prefix("Progress ")?.split_once(" of ")?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// The likely cause, by the words pip and the libraries below it use.
fn reason(output: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| output.contains(word));
    if has(&["No space left on device", "Errno 28"]) {
        "no space left on the disk"
    } else if has(&[
        "NewConnectionError",
        "Name or service not known",
        "Temporary failure in name resolution",
        "Network is unreachable",
        "Connection refused",
        "Max retries exceeded",
        "ConnectTimeoutError",
        "Failed to establish a new connection",
        "ProxyError",
        "nodename nor servname",
    ]) {
        "no network: the package index cannot be reached (with the files at hand, give --model-dir)"
    } else if has(&["(from versions: none)"]) {
        "no network, or the package index does not have the package (with the files at hand, give --model-dir)"
    } else if has(&["No matching distribution found", "Could not find a version"]) {
        "the package index has no such version (or cannot be reached)"
    } else if has(&["CERTIFICATE_VERIFY_FAILED", "SSLError"]) {
        "the package index's certificate was refused"
    } else {
        "pip gave an error"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::NoProgress;

    #[test]
    fn raw_progress_is_parsed() {
        assert_eq!(parse_progress("Progress 10 of 20"), Some((10, 20)));
        assert_eq!(parse_progress("Progress ten of 20"), None);
        assert_eq!(parse_progress("Saved ./x.whl"), None);
    }

    #[test]
    fn causes_are_told_apart() {
        assert!(reason("... Errno 28 ...").contains("disk"));
        assert!(reason("NewConnectionError\nNo matching distribution found").contains("no network"));
        assert!(reason("No matching distribution found").contains("no such version"));
        assert!(reason("x==1 (from versions: none)").contains("no network"));
        assert_eq!(reason("what"), "pip gave an error");
    }

    #[test]
    fn a_missing_pip_is_named() {
        let pips: &[&[&str]] = &[&["candle-lazy-has-no-such-program", "-m", "pip"], &["candle-lazy-nor-this-one"]];
        let error = download(pips, "p", "1", Path::new("."), &NoProgress);
        assert!(
            matches!(&error, Err(Error::PipNotFound { tried }) if tried == "candle-lazy-has-no-such-program -m pip, candle-lazy-nor-this-one"),
            "{error:?}"
        );
    }
}
