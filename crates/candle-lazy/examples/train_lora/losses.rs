//! The losses of a training by step, and the files they are kept in.

use super::curve;
use candle_lazy::nn::weights::write_whole;
use std::error::Error;
use std::io::ErrorKind;
use std::path::Path;

const HEADER: &str = "step,of,loss";
const TRAINED: &str = "train";
const HELD_OUT: &str = "held-out";

/// Losses after steps.
#[derive(Default)]
pub(crate) struct Losses {
    /// Of the rows that a step learned from.
    pub(crate) trained: Vec<(u64, f64)>,
    /// Of the rows that are held out.
    pub(crate) held_out: Vec<(u64, f64)>,
}

impl Losses {
    /// What [`Losses::write`] wrote; nothing where there is no such file.
    pub(crate) fn read(path: &Path) -> Result<Self, Box<dyn Error>> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            other => other.map_err(|e| format!("{}: {e}", path.display()))?,
        };
        let mut losses = Self::default();
        let mut lines = text.lines();
        let known = lines.next().is_some_and(|line| line == HEADER) && lines.all(|line| losses.take(line).is_some());
        if !known {
            let path = path.display();
            return Err(format!("{path} is no table of `{HEADER}`: move it away, it would be written over").into());
        }
        Ok(losses)
    }

    fn take(&mut self, line: &str) -> Option<()> {
        let mut fields = line.split(',');
        let (step, of, loss) = (fields.next()?, fields.next()?, fields.next()?);
        let kept = match of {
            TRAINED => &mut self.trained,
            HELD_OUT => &mut self.held_out,
            _ => return None,
        };
        kept.push((step.parse().ok()?, loss.parse().ok()?));
        fields.next().is_none().then_some(())
    }

    /// Those up to a step.
    pub(crate) fn until(mut self, step: u64) -> Self {
        self.trained.retain(|(at, _)| *at <= step);
        self.held_out.retain(|(at, _)| *at <= step);
        self
    }

    /// Writes `loss.csv` and `loss.svg`.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), Box<dyn Error>> {
        let line = |of: &'static str| move |(step, loss): &(u64, f64)| format!("{step},{of},{loss}\n");
        let lines = self.trained.iter().map(line(TRAINED)).chain(self.held_out.iter().map(line(HELD_OUT)));
        let table: String = lines.collect();
        write_whole(dir.join("loss.csv"), format!("{HEADER}\n{table}").as_bytes())?;
        write_whole(dir.join("loss.svg"), curve::svg(&self.trained, &self.held_out).as_bytes())?;
        Ok(())
    }
}
