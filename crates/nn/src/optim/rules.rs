//! The rules by which a parameter moves: SGD, Adam, AdamW, Lion.

use super::ParamsAdamW;
use crate::error::{Error, Result};
use candle_lazy_exec::LazyTensor;

/// Stochastic gradient descent with momentum (Sutskever et al. 2013, in PyTorch's form).
///
/// g ← g + λ·θ; with momentum b ← μ·b + g, and g ← g + μ·b (Nesterov's) or g ← b; θ ← θ − lr·g.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// The learning rate.
    pub lr: f64,
    /// μ, 0 ≤ μ < 1; 0 keeps no state.
    pub momentum: f64,
    /// Nesterov's form, which looks ahead; it needs a momentum.
    pub nesterov: bool,
    /// λ, added to the gradient as that of λ/2·θ².
    pub weight_decay: f64,
}

impl Default for Sgd {
    /// A rate of 0.01, nothing else.
    fn default() -> Self {
        Self { lr: 0.01, momentum: 0.0, nesterov: false, weight_decay: 0.0 }
    }
}

/// Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): θ ← θ − lr·(sign(β₁·m + (1 − β₁)·g) + λ·θ), then m ← β₂·m + (1 − β₂)·g.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// The learning rate; 3 to 10 times smaller than AdamW's (§5 there).
    pub lr: f64,
    /// β₁ of the direction, 0 ≤ β < 1.
    pub beta1: f64,
    /// β₂ of the mean that is kept, 0 ≤ β < 1.
    pub beta2: f64,
    /// λ.
    pub weight_decay: f64,
}

impl Default for Lion {
    /// The paper's: a rate of 1e-4, β 0.9 and 0.99, no decay.
    fn default() -> Self {
        Self { lr: 1e-4, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

/// How a parameter moves.
#[derive(Debug, Clone)]
pub enum Rule {
    /// [`Sgd`].
    Sgd(Sgd),
    /// Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1); λ·θ is added to the gradient.
    Adam(ParamsAdamW),
    /// AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2): Adam whose decay is not part of the gradient.
    AdamW(ParamsAdamW),
    /// [`Lion`].
    Lion(Lion),
}

/// The numbers of one update.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbers {
    pub(super) lr: f64,
    pub(super) weight_decay: f64,
    /// Updates with this one.
    pub(super) t: u64,
}

/// What a rule's numbers must be.
fn check(name: &str, lr: f64, decay: f64, betas: &[(&str, f64)]) -> Result<()> {
    let refuse = |what: &str, value: f64, wanted: &str| {
        Err(Error::config(name, format_args!("{what} must be {wanted}, got {value}")))
    };
    if !(lr >= 0.0 && lr.is_finite()) {
        return refuse("the learning rate", lr, "finite and not below 0");
    }
    for (what, beta) in betas {
        if !(0.0..1.0).contains(beta) {
            return refuse(what, *beta, "in [0, 1)");
        }
    }
    if !(decay >= 0.0 && decay.is_finite()) {
        return refuse("the weight decay", decay, "finite and not below 0");
    }
    Ok(())
}

/// Checks the numbers of Adam and AdamW.
///
/// # Errors
/// [`Error::Config`] where one is not finite, the learning rate or the decay is below 0, a beta is not in 0 ≤ β < 1, or `eps` is not
/// above 0.
pub fn validate_adamw(params: &ParamsAdamW) -> Result<()> {
    check_adam("AdamW", params)
}

fn check_adam(name: &str, params: &ParamsAdamW) -> Result<()> {
    let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = *params;
    check(name, lr, 0.0, &[("beta1", beta1), ("beta2", beta2)])?;
    if !(eps > 0.0 && eps.is_finite()) {
        return Err(Error::config(name, format_args!("epsilon must be finite and above 0, got {eps}")));
    }
    check(name, lr, weight_decay, &[])
}

impl Rule {
    /// `sgd`, `adam`, `adamw` or `lion`: so a file of the state names it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sgd(_) => "sgd",
            Self::Adam(_) => "adam",
            Self::AdamW(_) => "adamw",
            Self::Lion(_) => "lion",
        }
    }

    /// The learning rate that it has without a schedule.
    #[must_use]
    pub fn lr(&self) -> f64 {
        match self {
            Self::Sgd(Sgd { lr, .. }) | Self::Lion(Lion { lr, .. }) => *lr,
            Self::Adam(params) | Self::AdamW(params) => params.lr,
        }
    }

    /// λ of parameters whose group says nothing else.
    #[must_use]
    pub fn weight_decay(&self) -> f64 {
        match self {
            Self::Sgd(Sgd { weight_decay, .. }) | Self::Lion(Lion { weight_decay, .. }) => *weight_decay,
            Self::Adam(params) | Self::AdamW(params) => params.weight_decay,
        }
    }

    /// Whether the numbers mean something.
    ///
    /// # Errors
    /// [`Error::Config`] where one is not finite, a rate or a decay is below 0, a momentum or a beta is not in 0 ≤ β < 1, an epsilon is
    /// not above 0, or Nesterov's form has no momentum.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Sgd(Sgd { lr, momentum, nesterov, weight_decay }) => {
                check("SGD", lr, weight_decay, &[("the momentum", momentum)])?;
                if nesterov && momentum == 0.0 {
                    return Err(Error::config("SGD", "Nesterov's form needs a momentum above 0"));
                }
                Ok(())
            }
            Self::Adam(ref params) => check_adam("Adam", params),
            Self::AdamW(ref params) => check_adam("AdamW", params),
            Self::Lion(Lion { lr, beta1, beta2, weight_decay }) => {
                check("Lion", lr, weight_decay, &[("beta1", beta1), ("beta2", beta2)])
            }
        }
    }

    /// The names of the tensors that are kept of each parameter, as PyTorch has them.
    pub(super) fn kept(&self) -> &'static [&'static str] {
        match self {
            Self::Sgd(Sgd { momentum, .. }) if *momentum == 0.0 => &[],
            Self::Sgd(_) => &["momentum_buffer"],
            Self::Adam(_) | Self::AdamW(_) => &["exp_avg", "exp_avg_sq"],
            Self::Lion(_) => &["exp_avg"],
        }
    }

    /// The parameter and what is kept of it after an update; all of one dtype, as many kept ones as [`Rule::kept`] names.
    ///
    /// Handles on what lies between end here: the engine would keep such values.
    #[track_caller]
    pub(super) fn update(
        &self,
        theta: &LazyTensor,
        g: &LazyTensor,
        kept: &[LazyTensor],
        numbers: &Numbers,
    ) -> Result<(LazyTensor, Vec<LazyTensor>)> {
        let Numbers { lr, weight_decay, t } = *numbers;
        let with_decay = |g: &LazyTensor| match weight_decay {
            0.0 => Ok(g.clone()),
            decay => g.add(&theta.affine(decay, 0.0)?),
        };
        match (self, kept) {
            (Self::Sgd(_), []) => Ok((theta.sub(&with_decay(g)?.affine(lr, 0.0)?)?, Vec::new())),
            (Self::Sgd(Sgd { momentum, nesterov, .. }), [buffer]) => {
                let g = with_decay(g)?;
                let buffer = buffer.affine(*momentum, 0.0)?.add(&g)?;
                let step = if *nesterov { g.add(&buffer.affine(*momentum, 0.0)?)? } else { buffer.clone() };
                Ok((theta.sub(&step.affine(lr, 0.0)?)?, vec![buffer]))
            }
            (Self::Adam(params), [first, second]) => {
                let plain = ParamsAdamW { lr, weight_decay: 0.0, ..params.clone() };
                let [theta, first, second] = adamw(theta, &with_decay(g)?, [first, second], &plain, t)?;
                Ok((theta, vec![first, second]))
            }
            (Self::AdamW(params), [first, second]) => {
                let params = ParamsAdamW { lr, weight_decay, ..params.clone() };
                let [theta, first, second] = adamw(theta, g, [first, second], &params, t)?;
                Ok((theta, vec![first, second]))
            }
            (Self::Lion(Lion { beta1, beta2, .. }), [mean]) => {
                // one op that both results read makes them one program
                let g = g.affine(1.0, 0.0)?;
                let blend = |beta: f64| mean.affine(beta, 0.0)?.add(&g.affine(1.0 - beta, 0.0)?);
                let step = with_decay(&blend(*beta1)?.sign()?)?;
                Ok((theta.sub(&step.affine(lr, 0.0)?)?, vec![blend(*beta2)?]))
            }
            (rule, kept) => {
                Err(Error::params(format_args!("{} tensors kept for {}, which keeps others", kept.len(), rule.name())))
            }
        }
    }
}

/// θ, m and v after step `t` of AdamW; without a decay the decay is no part of it.
#[track_caller]
pub(super) fn adamw(
    theta: &LazyTensor,
    g: &LazyTensor,
    [first, second]: [&LazyTensor; 2],
    params: &ParamsAdamW,
    t: u64,
) -> Result<[LazyTensor; 3]> {
    let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = *params;
    let first = first.affine(beta1, 0.0)?.add(&g.affine(1.0 - beta1, 0.0)?)?;
    let second = second.affine(beta2, 0.0)?.add(&g.sqr()?.affine(1.0 - beta2, 0.0)?)?;
    let t = t as f64;
    let root = second.affine(1.0 / (1.0 - beta2.powf(t)), 0.0)?.sqrt()?.affine(1.0, eps)?;
    let step = first.affine(lr / (1.0 - beta1.powf(t)), 0.0)?.div(&root)?;
    let step = if weight_decay == 0.0 { step } else { step.add(&theta.affine(lr * weight_decay, 0.0)?)? };
    Ok([theta.sub(&step)?, first, second])
}
