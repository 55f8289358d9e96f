//! `--peers`: the same rows in other frameworks, by the scripts of `benches/peers`.

use super::report::Line;
use super::Error;
use crate::output::say;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// The scripts, in the order of the columns.
const SCRIPTS: [&str; 5] = ["torch_peer.py", "jax_peer.py", "onnx_peer.py", "mlx_peer.py", "llama_peer.py"];

/// What the scripts said.
#[derive(Debug, Default)]
pub(super) struct Peers {
    /// The peers, in the order in which they spoke.
    names: Vec<String>,
    /// Microseconds per call by peer and row.
    times: BTreeMap<(String, String), f64>,
    /// The peers that are not there, and why.
    missing: Vec<(String, String)>,
}

impl Peers {
    /// Takes what a script printed.
    fn take(&mut self, output: &str) -> Result<(), String> {
        for line in output.lines().filter(|line| !line.trim().is_empty()) {
            let value: serde_json::Value = serde_json::from_str(line).map_err(|e| format!("{line:?}: {e}"))?;
            let text = |key: &str| value.get(key).and_then(serde_json::Value::as_str).map(str::to_string);
            let peer = text("peer").ok_or_else(|| format!("{line:?} names no peer"))?;
            if let Some(why) = text("missing") {
                self.missing.push((peer, why));
                continue;
            }
            let us = value.get("us").and_then(serde_json::Value::as_f64).filter(|us| us.is_finite());
            let (Some(name), Some(us)) = (text("name"), us) else {
                return Err(format!("{line:?} has no name or no time"));
            };
            if !self.names.contains(&peer) {
                self.names.push(peer.clone());
            }
            self.times.insert((peer, name), us);
        }
        Ok(())
    }

    fn us(&self, peer: &str, row: &str) -> Option<f64> {
        self.times.get(&(peer.to_string(), row.to_string())).copied()
    }

    /// The times side by side, and which peers are missing.
    pub(super) fn table(&self, lines: &[Line]) -> String {
        // writing to a string does not fail
        let mut out = String::new();
        let _ = write!(out, "{:<30}{:>13}{:>13}", "us per call", "eager", "lazy");
        for name in &self.names {
            let _ = write!(out, "{name:>15}");
        }
        let cell = |us: Option<f64>| us.map_or("-".to_string(), |us| format!("{us:.1}"));
        for line in lines {
            if !self.names.iter().any(|peer| self.us(peer, line.name()).is_some()) {
                continue;
            }
            let (eager, lazy) = line.times();
            let _ = write!(out, "\n{:<30}{:>13}{:>13}", line.name(), cell(eager), cell(lazy));
            for peer in &self.names {
                let _ = write!(out, "{:>15}", cell(self.us(peer, line.name())));
            }
        }
        for (peer, why) in &self.missing {
            let _ = write!(out, "\n{peer} is not here: {why}");
        }
        out
    }

    /// The times as JSON: an object per row, a number per peer.
    pub(super) fn json(&self) -> serde_json::Value {
        let mut rows = serde_json::Map::new();
        for ((peer, row), us) in &self.times {
            let of_row = rows.entry(row.clone()).or_insert_with(|| serde_json::json!({}));
            of_row[peer.as_str()] = serde_json::json!(us);
        }
        rows.into()
    }
}

/// Runs every script; what it cannot do it says on the standard error, which passes through.
pub(super) fn run(filter: Option<&str>, quick: bool) -> Result<Peers, Error> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/peers");
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_string());
    let mut peers = Peers::default();
    for script in SCRIPTS {
        let mut command = Command::new(&python);
        command.arg(folder.join(script)).stderr(Stdio::inherit());
        if let Some(filter) = filter {
            command.args(["--filter", filter]);
        }
        if quick {
            command.arg("--quick");
        }
        say!("running {script}")?;
        let output = command.output().map_err(|e| Error::Wrong(format!("{python} cannot be run: {e}")))?;
        peers
            .take(&String::from_utf8_lossy(&output.stdout))
            .map_err(|why| Error::Wrong(format!("{script} printed {why}")))?;
        if !output.status.success() {
            peers.missing.push((script.to_string(), format!("it ended with {}", output.status)));
        }
    }
    Ok(peers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_scripts_print_becomes_a_table() {
        let mut peers = Peers::default();
        let printed = "{\"peer\": \"torch\", \"name\": \"exp/4x16x1024\", \"us\": 12.5}\n\n{\"peer\": \"jax\", \"missing\": \"no module\"}\n";
        peers.take(printed).unwrap();
        let row = super::super::rows::all().into_iter().find(|row| row.name == "exp/4x16x1024").unwrap();
        let table = peers.table(&[Line::new(&row)]);
        assert!(table.contains("exp/4x16x1024") && table.contains("12.5"), "{table}");
        assert!(table.contains("jax is not here: no module"), "{table}");
        assert_eq!(peers.json()["exp/4x16x1024"]["torch"], 12.5);
    }

    #[test]
    fn what_is_no_line_of_a_script_is_an_error() {
        for line in ["hello", "{}", "{\"peer\": \"torch\"}", "{\"peer\": \"torch\", \"name\": \"exp\", \"us\": \"1\"}"]
        {
            assert!(Peers::default().take(line).is_err(), "{line}");
        }
    }

    #[test]
    fn scripts_time_rows_that_there_are() {
        let common = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/peers/common.py"));
        let common = common.unwrap();
        let rows: Vec<String> = super::super::rows::all().into_iter().map(|row| row.name).collect();
        let mut named = 0;
        for line in common.lines().filter(|line| line.starts_with("    \"") && line.contains("\": (\"")) {
            let name = line.trim().split('"').nth(1).unwrap();
            assert!(rows.iter().any(|row| row == name), "{name}");
            named += 1;
        }
        assert!(named > 15, "{named}");
    }
}
