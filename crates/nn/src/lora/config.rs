//! What of a model gets an adapter, and of what kind.

use crate::error::{Error, Result};
use regex::Regex;

/// Which linear maps get an adapter, by PEFT's rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoraTargets {
    /// All but the output head: PEFT's `all-linear`.
    AllLinear,
    /// Those whose path is one of these names or ends with a dot and one of them.
    Names(Vec<String>),
    /// Those whose whole path a regular expression matches. Looking ahead or back and references back are not supported.
    Pattern(String),
}

/// The numbers of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// r: the width of what is between the factors.
    pub rank: usize,
    /// α: what the product is scaled by, before the rank divides it.
    pub alpha: f64,
    /// The probability with which an element of a map's input is dropped while training, in 0 ≤ p < 1.
    pub dropout: f64,
    /// Whether √r divides α, not r (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
    pub rank_stabilized: bool,
    /// Which maps.
    pub targets: LoraTargets,
}

impl Default for LoraConfig {
    /// PEFT's numbers (rank 8, α 8, no dropout) on queries and values.
    fn default() -> Self {
        let targets = LoraTargets::Names(vec!["q_proj".into(), "v_proj".into()]);
        Self { rank: 8, alpha: 8.0, dropout: 0.0, rank_stabilized: false, targets }
    }
}

impl LoraConfig {
    /// What the product of the factors is multiplied by: α/r, or α/√r where rank-stabilised.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Whether the numbers mean something.
    ///
    /// # Errors
    /// [`Error::Config`] for a rank of 0, an α that is not finite, a dropout outside of 0 ≤ p < 1, and targets that name nothing or are no
    /// regular expression.
    pub fn validate(&self) -> Result<()> {
        let refuse = |message: std::fmt::Arguments<'_>| Err(Error::config("the adapter", message));
        if self.rank == 0 {
            return refuse(format_args!("a rank of 0 adapts nothing"));
        }
        if !self.alpha.is_finite() {
            return refuse(format_args!("alpha must be finite, got {}", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse(format_args!("a dropout of {}: needs 0 ≤ p < 1", self.dropout));
        }
        self.targets.matcher().map(|_| ())
    }
}

/// What says of a path whether it is a target.
pub(super) enum Matcher<'a> {
    All,
    Names(&'a [String]),
    Pattern(Regex),
}

impl Matcher<'_> {
    pub(super) fn matches(&self, path: &str) -> bool {
        let ends = |name: &String| path.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
        match self {
            Self::All => true,
            Self::Names(names) => names.iter().any(|name| path == name || (!name.is_empty() && ends(name))),
            Self::Pattern(pattern) => pattern.is_match(path),
        }
    }
}

impl LoraTargets {
    pub(super) fn matcher(&self) -> Result<Matcher<'_>> {
        let refuse = |message: std::fmt::Arguments<'_>| Err(Error::config("the adapter", message));
        match self {
            Self::AllLinear => Ok(Matcher::All),
            Self::Names(names) if names.iter().all(String::is_empty) => {
                refuse(format_args!("no target module is named"))
            }
            Self::Names(names) => Ok(Matcher::Names(names)),
            Self::Pattern(pattern) => match Regex::new(&format!("^(?:{pattern})$")) {
                Ok(regex) => Ok(Matcher::Pattern(regex)),
                Err(error) => refuse(format_args!("the target pattern `{pattern}`: {error}")),
            },
        }
    }
}
