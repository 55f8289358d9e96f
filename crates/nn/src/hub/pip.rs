//! Running the user's own `pip download`, so that their configuration (indexes, proxies, certificates) holds.

use super::{disk, Progress};
use crate::error::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

/// Ways to call pip, in the order in which they are tried.
pub(super) const PIPS: &[&[&str]] = &[&["python3", "-m", "pip"], &["pip3"], &["pip"], &["python", "-m", "pip"]];

/// How many of pip's last lines an error shows.
const LAST_LINES: usize = 12;

/// How often the growing file is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// `python -m pip`, ended when standard input does: the pipe that this process holds closes when it ends, however it
/// ends. The signal lets pip clean up, as Ctrl-C does; a pip that does not listen is gone seconds later. It is sent until Python
/// has seen it: one that comes just before pip begins to wait for something wakes nobody. The folder that the user is in comes off
/// the path first: a `signal.py` in it is none of pip's business.
const PIP_UNTIL_INPUT_ENDS: &str = "
import sys
if sys.path[:1] == ['']:
    del sys.path[0]
import os, runpy, signal, threading, time
def watch():
    while os.read(0, 4096):
        pass
    # a signal to the whole group has reached pip already, which is cleaning up
    if seen:
        time.sleep(1)
    ended.append(True)
    del seen[:]
    for _ in range(50):
        if not seen:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    os._exit(1)
ended, seen = [], []
def interrupt(number, frame):
    if not (ended and seen):
        seen.append(True)
        raise KeyboardInterrupt
signal.signal(signal.SIGTERM, interrupt)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module('pip', run_name='__main__', alter_sys=True)
";

/// What is downloaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) package: &'a str,
    pub(super) version: &'a str,
    /// Bytes, about.
    pub(super) size: u64,
}

/// What came of one attempt.
enum Outcome {
    Done,
    /// No such program, or a Python without pip.
    NoPip,
    Failed(Error),
}

/// Downloads the wheel of `wanted` into the folder `wheel` below `dir`, without its dependencies and without building
/// anything. pip's temporary files lie below `dir` too.
///
/// # Errors
/// [`Error::PipNotFound`], [`Error::Download`] with pip's last lines and a guess at the cause, [`Error::DiskFull`] with
/// them where a disk is full.
pub(super) fn download(pips: &[&[&str]], wanted: Wanted<'_>, dir: &Path, progress: &dyn Progress) -> Result<()> {
    let temporary = dir.join("temporary");
    std::fs::create_dir_all(&temporary).map_err(|e| disk::write_error(&temporary, wanted.size, e))?;
    progress.start(&format!("pip download {}=={}", wanted.package, wanted.version), None);
    for pip in pips {
        match run(pip, wanted, dir, &temporary, progress) {
            Outcome::Done => {
                progress.finish();
                return Ok(());
            }
            Outcome::NoPip => {}
            Outcome::Failed(error) => return Err(error),
        }
    }
    let tried: Vec<String> = pips.iter().map(|pip| pip.join(" ")).collect();
    Err(Error::PipNotFound { tried: tried.join(", ") })
}

/// A running pip; it ends when this is dropped.
struct Running {
    child: Child,
    /// See [`PIP_UNTIL_INPUT_ENDS`].
    _input: Option<ChildStdin>,
}

impl Running {
    /// `pip` with `arguments`, its temporary files in `temporary`.
    fn start(pip: &[&str], arguments: &[&str], wheel: &Path, temporary: &Path) -> std::io::Result<Self> {
        let (program, first) = pip.split_first().ok_or(std::io::ErrorKind::NotFound)?;
        let mut command = Command::new(program);
        match first {
            [before @ .., "-m", "pip"] => command.args(before).args(["-c", PIP_UNTIL_INPUT_ENDS]),
            _ => command.args(first),
        };
        command.args(["download", "-d"]).arg(wheel).args(arguments);
        for name in ["TMPDIR", "TEMP", "TMP"] {
            command.env(name, temporary);
        }
        // As a variable, since a pip before 25.1 would refuse the option.
        if std::env::var_os("PIP_RESUME_RETRIES").is_none() {
            command.env("PIP_RESUME_RETRIES", "5");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let input = child.stdin.take();
        Ok(Self { child, _input: input })
    }

    fn wait(mut self) -> std::io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // Where this fails it has ended by itself.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

fn run(pip: &[&str], wanted: Wanted<'_>, dir: &Path, temporary: &Path, progress: &dyn Progress) -> Outcome {
    let requirement = format!("{}=={}", wanted.package, wanted.version);
    let shown = format!("{} download --no-deps {requirement}", pip.join(" "));
    let failed =
        |reason: String, output: String| Outcome::Failed(Error::Download { command: shown.clone(), reason, output });
    // pip's own bar is for terminals, or for a new pip; the growing file shows the same with any.
    let arguments = ["--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"];
    let arguments = [&arguments[..], &["--disable-pip-version-check", &requirement]].concat();
    let mut running = match Running::start(pip, &arguments, &dir.join("wheel"), temporary) {
        Ok(running) => running,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Outcome::NoPip,
        Err(e) => return failed(format!("it could not be started: {e}"), String::new()),
    };
    // Both pipes are drained at once: a pip that fills the one nobody reads would wait for ever.
    let stderr = running.child.stderr.take();
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            // What could be read before a failure is still worth showing.
            drop(stderr.read_to_end(&mut text));
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let (send, receive) = channel();
    if let Some(stdout) = running.child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(|line| line.ok()) {
                if send.send(String::from_utf8_lossy(&line).trim_end().to_string()).is_err() {
                    break;
                }
            }
        });
    }
    let mut lines = Vec::new();
    loop {
        match receive.recv_timeout(LOOK) {
            Ok(line) => lines.push(line),
            Err(RecvTimeoutError::Timeout) => match largest_file(dir) {
                0 => {}
                size => progress.update(size, Some(wanted.size.max(size))),
            },
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = running.wait();
    let errors = errors.join().unwrap_or_default();
    match status {
        Ok(status) if status.success() => Outcome::Done,
        Ok(_) if errors.contains("No module named pip") => Outcome::NoPip,
        Ok(status) => {
            lines.extend(errors.lines().map(str::to_string));
            let everything = lines.join("\n");
            let output = lines.split_off(lines.len().saturating_sub(LAST_LINES)).join("\n");
            match reason(&everything) {
                Reason::DiskFull => Outcome::Failed(disk::full_for(dir, wanted.size.saturating_mul(2), output)),
                Reason::Words(words) => failed(words.to_string(), output),
                Reason::Unknown => failed(format!("pip gave an error ({status})"), output),
            }
        }
        Err(e) => failed(format!("waiting for it failed: {e}"), errors),
    }
}

/// Bytes of the largest file below `dir`. Files come and go meanwhile: what cannot be seen counts as nothing.
fn largest_file(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => largest_file(&entry.path()),
        Ok(metadata) if metadata.is_file() => metadata.len(),
        _ => 0,
    };
    entries.flatten().map(size).max().unwrap_or(0)
}

#[derive(Debug, PartialEq)]
enum Reason {
    DiskFull,
    Words(&'static str),
    Unknown,
}

/// The likely cause, by the words pip and the libraries below it use.
fn reason(output: &str) -> Reason {
    let has = |words: &[&str]| words.iter().any(|word| output.contains(word));
    if has(&["No space left on device", "[Errno 28]", "Disk quota exceeded"]) {
        return Reason::DiskFull;
    }
    Reason::Words(if has(&["CERTIFICATE_VERIFY_FAILED", "SSLError"]) {
        "the package index's certificate was refused"
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
    } else if has(&["IncompleteRead", "incomplete-download", "is invalid.", "ReadTimeoutError", "Connection broken"]) {
        "the connection broke off; another try may do (with the files at hand, give --model-dir)"
    } else if has(&["(from versions: none)"]) {
        "no network, or the package index does not have the package (with the files at hand, give --model-dir)"
    } else if has(&["No matching distribution found", "Could not find a version"]) {
        "the package index has no such version (or cannot be reached)"
    } else {
        return Reason::Unknown;
    })
}

#[cfg(test)]
#[path = "pip_tests.rs"]
mod tests;
