//! Which rows a step takes, and which documents are held out.

use crate::error::{Error, Result};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;

/// Splits items at random into those to train on and those to measure with: the second are `fraction` of all, rounded, at least one. Both
/// keep the order that the items had. The same seed gives the same split with the same version of this crate.
///
/// # Errors
/// [`Error::Data`] for a fraction that is not in 0 < f < 1, and where there are fewer than two items, or nothing would be left to train on.
#[track_caller]
pub fn split<T>(items: Vec<T>, fraction: f64, seed: u64) -> Result<(Vec<T>, Vec<T>)> {
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(Error::data(format_args!("a held-out fraction of {fraction}: needs 0 < f < 1")));
    }
    let held_out = ((items.len() as f64 * fraction).round() as usize).max(1);
    if held_out >= items.len() {
        let message = format_args!("of {} items {held_out} would be held out: nothing to train on", items.len());
        return Err(Error::data(message));
    }
    let mut is_held_out = vec![false; items.len()];
    for at in order(items.len(), seed, u64::MAX).into_iter().take(held_out) {
        if let Some(place) = is_held_out.get_mut(at) {
            *place = true;
        }
    }
    let (mut train, mut held) = (Vec::new(), Vec::new());
    for (item, held_out) in items.into_iter().zip(is_held_out) {
        if held_out { &mut held } else { &mut train }.push(item);
    }
    Ok((train, held))
}

/// The numbers below `count` in the order of a seed and an epoch.
fn order(count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut bytes = [0u8; 32];
    let words = seed.to_le_bytes().into_iter().chain(epoch.to_le_bytes());
    for (byte, word) in bytes.iter_mut().zip(words) {
        *byte = word;
    }
    let mut numbers: Vec<usize> = (0..count).collect();
    numbers.shuffle(&mut StdRng::from_seed(bytes));
    numbers
}

/// The batches of a training without end: epoch after epoch, each in an order of its own, each row once per epoch. Which rows a step takes
/// depends on the seed and the step alone, so that a training goes on from any step.
#[derive(Debug, Clone)]
pub struct Batches {
    rows: usize,
    batch: usize,
    seed: u64,
    /// The order of an epoch.
    last: Option<(u64, Vec<usize>)>,
}

impl Batches {
    /// Of `rows` rows, `batch` at a time; the last batch of an epoch may be smaller. The same seed gives the same batches with the same
    /// version of this crate.
    ///
    /// # Errors
    /// [`Error::Data`] where there are no rows or a batch has none.
    #[track_caller]
    pub fn new(rows: usize, batch: usize, seed: u64) -> Result<Self> {
        if rows == 0 || batch == 0 {
            return Err(Error::data(format_args!("batches of {batch} of {rows} rows: both must be above 0")));
        }
        Ok(Self { rows, batch, seed, last: None })
    }

    /// Batches per epoch.
    #[must_use]
    pub fn per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.batch) as u64
    }

    /// The rows of the batch of a step, counted from 0.
    pub fn of_step(&mut self, step: u64) -> Vec<usize> {
        let (epoch, at) = (step / self.per_epoch(), step % self.per_epoch());
        let (_, order) = match self.last.take() {
            Some(last) if last.0 == epoch => self.last.insert(last),
            _ => self.last.insert((epoch, order(self.rows, self.seed, epoch))),
        };
        let begin = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(self.batch);
        order.iter().skip(begin).take(self.batch).copied().collect()
    }
}
