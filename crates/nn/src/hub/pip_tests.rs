//! How pip is called, what is made of its words, and that it ends when it should.

use super::*;
use crate::hub::NoProgress;
use std::error::Error as StdError;
#[cfg(unix)]
use std::time::Instant;

type TestResult = std::result::Result<(), Box<dyn StdError>>;

const WANTED: Wanted<'static> = Wanted { package: "candle-lazy-has-no-such-package", version: "1.0", size: 1000 };

#[test]
fn causes_are_told_apart() {
    let words = |output: &str| match reason(output) {
        Reason::Words(words) => words,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason("OSError: [Errno 28] ..."), Reason::DiskFull);
    assert_eq!(reason("OSError: [Errno 122] Disk quota exceeded"), Reason::DiskFull);
    assert!(words("NewConnectionError\nNo matching distribution found").contains("no network"));
    assert!(words("Max retries exceeded ... SSLError(CERTIFICATE_VERIFY_FAILED)").contains("certificate"));
    assert!(words("IncompleteRead(10 bytes read, 20 more expected)").contains("broke off"));
    assert!(words("ERROR: Wheel 'x' located at y.whl is invalid.").contains("broke off"));
    assert!(words("No matching distribution found").contains("no such version"));
    assert!(words("x==1 (from versions: none)").contains("no network"));
    assert_eq!(reason("what"), Reason::Unknown);
}

#[test]
fn a_missing_pip_is_named() -> TestResult {
    let pips: &[&[&str]] = &[&["candle-lazy-has-no-such-program", "-m", "pip"], &["candle-lazy-nor-this-one"]];
    let dir = tempfile::tempdir()?;
    let error = download(pips, WANTED, dir.path(), &NoProgress);
    assert!(
        matches!(&error, Err(Error::PipNotFound { tried }) if tried == "candle-lazy-has-no-such-program -m pip, candle-lazy-nor-this-one"),
        "{error:?}"
    );
    Ok(())
}

/// A stand-in for pip in a folder of its own: a Python module, found before the real one. `None` without Python.
#[cfg(unix)]
fn module(dir: &Path, body: &str) -> std::result::Result<Option<String>, Box<dyn StdError>> {
    if Command::new("python3").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        return Ok(None);
    }
    let package = dir.join("modules").join("pip");
    std::fs::create_dir_all(&package)?;
    std::fs::write(package.join("__init__.py"), "")?;
    std::fs::write(package.join("__main__.py"), body)?;
    Ok(Some(format!("PYTHONPATH={}", dir.join("modules").display())))
}

#[cfg(unix)]
#[test]
fn pip_gets_its_arguments_and_works_in_the_folder_it_is_given() -> TestResult {
    let dir = tempfile::tempdir()?;
    let body = "import os, sys, tempfile\nprint(sys.argv[1:], tempfile.gettempdir(), os.environ['PIP_RESUME_RETRIES'], flush=True)\nsys.exit(3)\n";
    let Some(path) = module(dir.path(), body)? else { return Ok(()) };
    let error =
        download(&[&["env", &path, "PIP_RESUME_RETRIES=7", "python3", "-m", "pip"]], WANTED, dir.path(), &NoProgress);
    let Err(Error::Download { command, reason, output }) = &error else { panic!("{error:?}") };
    assert!(command.ends_with("python3 -m pip download --no-deps candle-lazy-has-no-such-package==1.0"), "{command}");
    assert!(reason.contains("exit status: 3"), "{reason}");
    let wheel = dir.path().join("wheel");
    assert!(output.starts_with(&format!("['download', '-d', '{}', '--no-deps'", wheel.display())), "{output}");
    assert!(output.contains("'candle-lazy-has-no-such-package==1.0']"), "{output}");
    assert!(output.ends_with(&format!("{} 7", dir.path().join("temporary").display())), "{output}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn pip_ends_with_the_process_that_started_it() -> TestResult {
    ends_with_its_parent("")?;
    // a first signal that wakes nobody, as one does that comes just before the sleep
    ends_with_its_parent(
        "import signal\nheard = signal.getsignal(signal.SIGTERM)\ncalls = []\ndef deaf(*args):\n    calls.append(1)\n    if len(calls) > 1:\n        heard(*args)\nsignal.signal(signal.SIGTERM, deaf)\n",
    )
}

#[cfg(unix)]
fn ends_with_its_parent(before: &str) -> TestResult {
    let dir = tempfile::tempdir()?;
    // one that cleans up when it is interrupted, as pip does
    let body = "import sys, time\ntry:\n    print('runs', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('cleaned up', flush=True)\n    sys.exit(1)\n";
    let Some(path) = module(dir.path(), &format!("{before}{body}"))? else { return Ok(()) };
    let mut running = Running::start(&["env", &path, "python3", "-m", "pip"], &[], dir.path(), dir.path())?;
    let mut stdout = BufReader::new(running.child.stdout.take().ok_or("no output")?);
    let mut said = String::new();
    stdout.read_line(&mut said)?;
    assert_eq!(said, "runs\n");
    let began = Instant::now();
    // what the system does to the pipe of a process that is gone
    running._input = None;
    stdout.read_to_string(&mut said)?;
    assert_eq!(said, "runs\ncleaned up\n");
    assert!(!running.wait()?.success());
    assert!(began.elapsed() < Duration::from_secs(30));
    Ok(())
}

#[cfg(unix)]
#[test]
fn pip_ends_when_it_is_dropped() -> TestResult {
    let dir = tempfile::tempdir()?;
    let script = dir.path().join("pip.sh");
    std::fs::write(&script, "echo runs; exec sleep 60\n")?;
    let mut running = Running::start(&["sh", script.to_str().ok_or("path")?], &[], dir.path(), dir.path())?;
    let mut stdout = running.child.stdout.take().ok_or("no output")?;
    let began = Instant::now();
    drop(running);
    // the end of the output is the end of all who could write it
    stdout.read_to_end(&mut Vec::new())?;
    assert!(began.elapsed() < Duration::from_secs(30));
    Ok(())
}

#[cfg(unix)]
#[test]
fn modules_in_the_folder_that_the_user_is_in_are_not_pips() -> TestResult {
    let dir = tempfile::tempdir()?;
    let Some(path) = module(dir.path(), "print('ran', flush=True)\n")? else { return Ok(()) };
    for name in ["signal.py", "threading.py", "runpy.py"] {
        std::fs::write(dir.path().join(name), "raise SystemExit('the wrong module')\n")?;
    }
    // the shell changes the folder, since this process must not
    let script = format!("cd '{}' && exec env '{path}' python3 \"$@\"", dir.path().display());
    let pip = ["sh", "-c", &script, "sh", "-m", "pip"];
    let mut running = Running::start(&pip, &[], dir.path(), dir.path())?;
    let (mut said, mut errors) = (String::new(), String::new());
    running.child.stdout.take().ok_or("no output")?.read_to_string(&mut said)?;
    running.child.stderr.take().ok_or("no errors")?.read_to_string(&mut errors)?;
    assert_eq!((said.as_str(), errors.as_str()), ("ran\n", ""));
    assert!(running.wait()?.success());
    Ok(())
}

/// The pip that is installed, with an index at a port of this machine that nobody listens on.
#[cfg(unix)]
#[test]
fn without_a_network_the_error_is_clear_and_quick() -> TestResult {
    let dir = tempfile::tempdir()?;
    let index = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    let index = format!("PIP_INDEX_URL=http://{index}/simple");
    let began = Instant::now();
    for retries in ["PIP_RETRIES=0", "PIP_RETRIES=1"] {
        let pip: &[&str] =
            &["env", "-u", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE=/dev/null", retries, &index, "python3", "-m", "pip"];
        match download(&[pip], WANTED, dir.path(), &NoProgress) {
            Err(Error::Download { reason, output, .. }) => {
                assert!(reason.starts_with("no network") && reason.contains("--model-dir"), "{reason}");
                assert!(output.contains("No matching distribution found"), "{output}");
            }
            // a machine without Python or pip
            Err(Error::PipNotFound { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    Ok(())
}
