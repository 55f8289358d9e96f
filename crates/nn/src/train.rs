//! The loop of a LoRA training: batches, loss, gradients, steps, checkpoints.

use crate::data::{Batch, Batches, Rows};
use crate::error::{Error, Result};
use crate::loss::{TokenLoss, TokenLossOptions};
use crate::models::CausalLm;
use crate::optim::{scalar, NonFiniteOrigin, NonFinitePart, Optimizer};
use crate::params::Gradients;
use crate::weights::write_whole;
use crate::{LoraAdapter, LoraConfig, Positions};
use candle_core::Device;
use candle_lazy_exec::{EvalReport, LazyTensor, RandomKey};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The files of a checkpoint.
const PARAMS: &str = "params.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PROGRESS: &str = "progress.json";

/// How a [`Trainer`] goes about its steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainerOptions {
    /// Rows that are computed at once.
    pub batch: usize,
    /// Batches whose gradients make one step together: the mean is over the targets of all of them.
    pub accumulate: usize,
    /// The loss that is trained by.
    pub loss: TokenLossOptions,
    /// Of the order of the rows and of dropout.
    pub seed: u64,
}

impl Default for TrainerOptions {
    /// One batch of 4 rows per step, plain cross entropy, seed 0.
    fn default() -> Self {
        Self { batch: 4, accumulate: 1, loss: TokenLossOptions::default(), seed: 0 }
    }
}

/// What a step did.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TrainStep {
    /// Steps taken, with this one if it was.
    pub step: u64,
    /// The mean loss over the step's targets, before the update.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// The norm of the gradients before clipping; `None` where nothing asked for it.
    pub norm: Option<f64>,
    /// What is not finite, where the step was skipped for that.
    pub skipped: Option<NonFinitePart>,
    /// Positions that were computed.
    pub positions: usize,
    /// What the engine did, over all parts.
    pub eval: EvalReport,
}

/// Where a training is, beside its parameters and its optimiser.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    /// Batches that were taken, those of skipped steps too.
    batches: u64,
    rows: usize,
    batch: usize,
    accumulate: usize,
    seed: u64,
    /// What no tensor of the checkpoint shows: the adapter's numbers, the base and its dtype, the rows, what the loss is.
    #[serde(default)]
    of: String,
}

/// Trains the adapter of a model on rows of tokens.
#[derive(Debug)]
pub struct Trainer<'a> {
    model: &'a CausalLm,
    adapter: &'a LoraAdapter,
    rows: &'a Rows,
    optimizer: Optimizer,
    options: TrainerOptions,
    order: Batches,
    at: Positions,
    progress: Progress,
}

impl<'a> Trainer<'a> {
    /// Of an adapter that is on the model, by an optimiser of its parameters.
    ///
    /// # Errors
    /// As [`Rows::check`] and [`Batches::new`], and [`Error::Data`] where no batch makes a step.
    #[track_caller]
    pub fn new(
        model: &'a CausalLm,
        adapter: &'a LoraAdapter,
        rows: &'a Rows,
        optimizer: Optimizer,
        options: TrainerOptions,
    ) -> Result<Self> {
        rows.check(model.config().max_position_embeddings, model.config().vocab_size)?;
        let TrainerOptions { batch, accumulate, seed, .. } = options;
        if accumulate == 0 {
            return Err(Error::data("a step of no batches: at least one must be accumulated"));
        }
        let order = Batches::new(rows.count(), batch, seed)?;
        let at = model.positions(rows.row_len())?;
        let LoraConfig { rank, alpha, dropout, rank_stabilized, .. } = adapter.config();
        let of = format!(
            "rank {rank}, alpha {alpha:?}, rank-stabilised {rank_stabilized}, dropout {dropout:?}, {:?}, base {} {:016x}, rows {:016x}",
            options.loss,
            model.dtype().as_str(),
            model.fingerprint()?,
            rows.fingerprint()
        );
        let progress = Progress { batches: 0, rows: rows.count(), batch, accumulate, seed, of };
        Ok(Self { model, adapter, rows, optimizer, options, order, at, progress })
    }

    /// The optimiser.
    #[must_use]
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Steps that every row once makes, rounded up.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.order.per_epoch().div_ceil(self.options.accumulate as u64)
    }

    /// The loss of some rows, recorded.
    #[track_caller]
    fn loss(&self, batch: &Batch, at: &Positions, options: &TokenLossOptions) -> Result<TokenLoss> {
        self.model.token_loss(&batch.inputs, at, &batch.targets, Some(&batch.weights), options)
    }

    /// One step: the next batches' gradients, and the optimiser's step by them. Dropout acts by a key of each batch's own.
    ///
    /// # Errors
    /// [`Error::NonFiniteStep`] where the loss or a gradient is not finite and the optimiser is to stop there, naming the first op or leaf of the loss
    /// with a NaN, or else an infinity, and its line; as [`Optimizer::step`]; [`Error::Data`] where the step's rows have nothing to learn. Adapter and
    /// optimiser are as before the step then, and the step's batches count as taken.
    #[track_caller]
    pub fn step(&mut self) -> Result<TrainStep> {
        let first = self.progress.batches;
        self.progress.batches += self.options.accumulate as u64;
        let mut parts = Vec::with_capacity(self.options.accumulate);
        for number in first..self.progress.batches {
            let batch = self.rows.batch(&self.order.of_step(number), self.model.device())?;
            if batch.learned > 0 {
                parts.push((number, batch));
            }
        }
        let stepped = self.step_by(&parts);
        let outcome = match stepped {
            Err(Error::NonFiniteStep { what, norm, .. }) => {
                Err(self.explained(&parts, what, norm).unwrap_or_else(|error| error))
            }
            other => other,
        };
        self.adapter.eval();
        outcome
    }

    #[track_caller]
    fn step_by(&mut self, parts: &[(u64, Batch)]) -> Result<TrainStep> {
        let key = RandomKey::new(self.options.seed);
        let (mut eval, mut total, mut weight) = (EvalReport::default(), 0.0, 0.0);
        let positions = parts.iter().map(|(_, batch)| batch.inputs.elem_count()).sum();
        let params = self.adapter.params();
        let report = match parts {
            [] => return Err(Error::data("the step's rows have nothing to learn")),
            // loss, gradients and update are one plan
            [(number, batch)] => {
                self.adapter.train(key.fold_in(*number));
                let (mean, gradients) = {
                    let mean = self.loss(batch, &self.at, &self.options.loss)?.mean()?;
                    // a traced loss would keep its history, and the parameters could not be written over
                    (mean.detach(), params.grad(&mean)?)
                };
                let report = self.optimizer.step(gradients, &[&mean])?;
                (total, weight) = (scalar(&mean)?, 1.0);
                report
            }
            several => {
                let mut sums = Gradients::new();
                for (number, batch) in several {
                    self.adapter.train(key.fold_in(*number));
                    let part = self.loss(batch, &self.at, &self.options.loss)?;
                    eval.merge(&sums.accumulate(params.grad(&part.sum)?, &[&part.sum])?);
                    total += scalar(&part.sum)?;
                    weight += part.weight;
                }
                let mean = LazyTensor::new(total / weight, &Device::Cpu)?;
                self.optimizer.step(sums.scaled(1.0 / weight)?, &[&mean])?
            }
        };
        eval.merge(&report.eval);
        let (step, lr, norm, skipped) = (report.step, report.lr, report.norm, report.skipped);
        Ok(TrainStep { step, loss: total / weight, lr, norm, skipped, positions, eval })
    }

    /// The error of a step whose gradients are no numbers: where the first one arises.
    #[track_caller]
    fn explained(&self, parts: &[(u64, Batch)], what: NonFinitePart, norm: f64) -> Result<Error> {
        for (number, batch) in parts {
            self.adapter.train(RandomKey::new(self.options.seed).fold_in(*number));
            let loss = self.loss(batch, &self.at, &self.options.loss)?;
            if let found @ NonFiniteOrigin::InLoss(_) = NonFiniteOrigin::of(Some(&loss.sum)) {
                return Ok(Error::non_finite_step(self.optimizer.steps(), what, norm, found));
            }
        }
        Ok(Error::non_finite_step(self.optimizer.steps(), what, norm, NonFiniteOrigin::InBackward))
    }

    /// The mean cross entropy over all targets of other rows (held-out ones), without dropout and smoothing.
    ///
    /// # Errors
    /// As [`Rows::check`], and where an evaluation fails.
    #[track_caller]
    pub fn evaluate(&self, rows: &Rows) -> Result<f64> {
        rows.check(self.model.config().max_position_embeddings, self.model.config().vocab_size)?;
        self.adapter.eval();
        let at = self.model.positions(rows.row_len())?;
        let options = TokenLossOptions { label_smoothing: 0.0, ..self.options.loss };
        let (mut total, mut weight) = (0.0, 0.0);
        let all: Vec<usize> = (0..rows.count()).collect();
        for numbers in all.chunks(self.options.batch) {
            let batch = rows.batch(numbers, self.model.device())?;
            if batch.learned > 0 {
                let loss = self.loss(&batch, &at, &options)?;
                // nobody takes gradients of it
                total += scalar(&loss.sum.detach())?;
                weight += loss.weight;
            }
        }
        Ok(total / weight)
    }

    /// Writes a checkpoint into a directory that is not there yet, whole or not at all: the adapter's parameters, the optimiser's state
    /// and how far the training is.
    ///
    /// # Errors
    /// [`Error::Io`], and where a value cannot be computed.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let io = |e: std::io::Error| Error::io(dir, e);
        if dir.exists() {
            return Err(io(std::io::ErrorKind::AlreadyExists.into()));
        }
        let unfinished = tempfile::Builder::new().prefix(".unfinished-").tempdir_in(parent).map_err(io)?;
        self.adapter.params().save(unfinished.path().join(PARAMS))?;
        self.optimizer.save(unfinished.path().join(OPTIMIZER))?;
        let progress = serde_json::to_string(&self.progress).map_err(|e| Error::format(dir, "JSON", e))?;
        write_whole(unfinished.path().join(PROGRESS), progress.as_bytes())?;
        std::fs::rename(unfinished.path(), dir).map_err(io)
    }

    /// Goes on from a checkpoint of the same training: the steps that follow have the bits that they would have had without the
    /// interruption.
    ///
    /// # Errors
    /// [`Error::Io`] where a file is not there; [`Error::Config`] where it is of other rows, another size of batches, another seed, other
    /// numbers of the adapter, another base or one of another dtype, or another loss; as
    /// [`Params::load`](crate::params::Params::load) and [`Optimizer::load`] where it is of another model, adapter or rule. Everything is as
    /// it was then.
    pub fn resume(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let path = dir.join(PROGRESS);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let progress: Progress = serde_json::from_str(&text).map_err(|e| Error::format(&path, "JSON", e))?;
        let here = Progress { batches: progress.batches, ..self.progress.clone() };
        if progress != here {
            let message = format_args!("it is of another training: {progress:?}, here {here:?}");
            return Err(Error::config(dir.display(), message));
        }
        let params = self.adapter.params();
        let before: Vec<_> = params.iter().map(|param| (param, param.value())).collect();
        params.load(dir.join(PARAMS))?;
        if let Err(error) = self.optimizer.load(dir.join(OPTIMIZER)) {
            for (param, value) in before {
                param.put_back(value);
            }
            return Err(error);
        }
        self.progress = progress;
        Ok(())
    }
}
