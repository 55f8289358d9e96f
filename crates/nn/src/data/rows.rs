//! Documents in rows of one length.

use super::{Document, IGNORE_INDEX};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use candle_core::Device;
use candle_lazy_exec::LazyTensor;

/// How documents become rows.
///
/// Each document may be followed by an end token, which is learned as the target of its last one; where another document follows in the
/// row, it is a position of its own too, from which nothing is learned. No token of a document is ever the target of a token of another.
/// Attention does not know where a document ends: in a row of several, a token sees those of the documents before it too, and positions
/// count on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packing {
    /// One row per document, filled up with `pad`, which is not learned.
    Documents {
        /// The token that ends a document.
        end: Option<u32>,
        /// What a row is filled up with.
        pad: u32,
    },
    /// As many whole documents per row as fit, in their order; the rest of a row is filled up with `pad`.
    Whole {
        /// The token that ends a document.
        end: Option<u32>,
        /// What a row is filled up with.
        pad: u32,
    },
    /// All documents in a line, cut into rows wherever a row is full: long documents are cut, and the first token of a row has no
    /// predecessor to be learned from. Only the last row is filled up.
    Stream {
        /// The token that ends a document.
        end: Option<u32>,
        /// What the last row is filled up with.
        pad: u32,
    },
}

/// A position: its token, and what it is to be followed by; [`IGNORE_INDEX`] where nothing is learned from it.
#[derive(Debug, Clone, Copy)]
struct Position {
    token: u32,
    target: i64,
}

/// Rows of one length.
#[derive(Debug, Clone)]
pub struct Rows {
    len: usize,
    /// Row by row.
    positions: Vec<Position>,
    /// The largest id among tokens and targets.
    largest: u32,
}

impl Rows {
    /// A number that other rows do not have, but by chance.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut print = Fingerprint::default();
        print.add(self.len as u64);
        for &Position { token, target } in &self.positions {
            print.add(u64::from(token));
            print.add(target as u64);
        }
        print.value()
    }
}

/// Some rows as tensors.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Tokens (batch, length), u32.
    pub inputs: LazyTensor,
    /// What is to follow each (batch, length), i64; [`IGNORE_INDEX`] where nothing is learned.
    pub targets: LazyTensor,
    /// 1 where something is learned, else 0 (batch, length), f32.
    pub weights: LazyTensor,
    /// How many targets are learned.
    pub learned: usize,
}

/// The positions of a document: each token before the next one, the last before the end token, where there is one.
fn positions<'a>(document: &'a Document, end: Option<u32>) -> impl Iterator<Item = Position> + 'a {
    let (ids, prompt) = (document.ids(), document.prompt_len());
    let followers = ids.iter().skip(1).copied().chain(end);
    ids.iter().zip(followers).enumerate().map(move |(at, (token, follower))| {
        let learned = at + 1 >= prompt;
        Position { token: *token, target: if learned { i64::from(follower) } else { IGNORE_INDEX } }
    })
}

impl Rows {
    /// Rows of `len` positions. A document of n tokens takes n of them where there is an end token, else n − 1: its last token is a target
    /// only.
    ///
    /// # Errors
    /// [`Error::Data`] for no documents and rows of 0 positions; for a document of more positions than a row has, but where documents are
    /// cut ([`Packing::Stream`]); and where no row has a target to learn.
    #[track_caller]
    pub fn pack(documents: &[Document], len: usize, packing: &Packing) -> Result<Self> {
        if documents.is_empty() {
            return Err(Error::data("there are no documents"));
        }
        if len == 0 {
            return Err(Error::data("rows of 0 positions hold nothing"));
        }
        let (Packing::Documents { end, pad } | Packing::Whole { end, pad } | Packing::Stream { end, pad }) = packing;
        let filling = Position { token: *pad, target: IGNORE_INDEX };
        let mut rows: Vec<Position> = Vec::new();
        for (number, document) in documents.iter().enumerate() {
            let takes = document.ids().len() - usize::from(end.is_none());
            if takes > len && !matches!(packing, Packing::Stream { .. }) {
                let message = format_args!("document {number} needs {takes} positions, a row has {len}");
                return Err(Error::data(message));
            }
            let free = (len - rows.len() % len) % len;
            let new_row = match packing {
                Packing::Documents { .. } => true,
                Packing::Whole { .. } => takes + usize::from(end.is_some()) > free,
                Packing::Stream { .. } => false,
            };
            let free = if new_row { free } else { 0 };
            rows.resize(rows.len() + free, filling);
            if let Some(end) = end.filter(|_| !rows.len().is_multiple_of(len)) {
                rows.push(Position { token: end, target: IGNORE_INDEX });
            }
            rows.extend(positions(document, *end));
        }
        let free = (len - rows.len() % len) % len;
        rows.resize(rows.len() + free, filling);
        if rows.iter().all(|position| position.target == IGNORE_INDEX) {
            return Err(Error::data("no document has anything to learn: a text of one token needs an end token"));
        }
        let ids = rows.iter().flat_map(|p| [Some(p.token), u32::try_from(p.target).ok()]);
        let largest = ids.flatten().max().unwrap_or(0);
        Ok(Self { len, positions: rows, largest })
    }

    /// How many rows there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.positions.len() / self.len
    }

    /// The positions of a row.
    #[must_use]
    pub fn row_len(&self) -> usize {
        self.len
    }

    /// How many targets are learned, over all rows.
    #[must_use]
    pub fn learned(&self) -> usize {
        self.positions.iter().filter(|position| position.target != IGNORE_INDEX).count()
    }

    /// Refuses rows that a model of this context and vocabulary cannot take.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] for rows longer than the context, [`Error::TokenOutOfRange`] for a token that the vocabulary does not have.
    #[track_caller]
    pub fn check(&self, context: usize, vocab: usize) -> Result<()> {
        if self.len > context {
            return Err(Error::prompt_too_long(self.len, context));
        }
        match usize::try_from(self.largest) {
            Ok(largest) if largest < vocab => Ok(()),
            _ => Err(Error::token_out_of_range(self.largest, vocab)),
        }
    }

    /// Some rows, in this order, as leaves.
    ///
    /// # Errors
    /// [`Error::Data`] for no rows and for one that is not there.
    #[track_caller]
    pub fn batch(&self, rows: &[usize], device: &Device) -> Result<Batch> {
        if rows.is_empty() {
            return Err(Error::data("a batch of no rows"));
        }
        let (mut inputs, mut targets, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for &row in rows {
            let Some(row) = self.positions.chunks(self.len).nth(row) else {
                return Err(Error::data(format_args!("there is no row {row}: there are {}", self.count())));
            };
            for position in row {
                inputs.push(position.token);
                targets.push(position.target);
                weights.push(if position.target == IGNORE_INDEX { 0f32 } else { 1. });
            }
        }
        let (shape, learned) = ((rows.len(), self.len), weights.iter().filter(|weight| **weight > 0.).count());
        Ok(Batch {
            inputs: LazyTensor::from_vec(inputs, shape, device)?,
            targets: LazyTensor::from_vec(targets, shape, device)?,
            weights: LazyTensor::from_vec(weights, shape, device)?,
            learned,
        })
    }
}
