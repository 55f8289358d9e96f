//! The key of a plan: a captured graph in relative form, as a sequence of words.
//!
//! Two graphs have the same words exactly if they are equal ([`Graph`](super::Graph) compares nodes, outputs and devices). Each part
//! says how long it is before it begins, so no two sequences of parts give the same words.

use std::hash::{Hash, Hasher};

/// Collects what a value feeds to its hasher. Derived `Hash` implementations feed the discriminant and every field, lengths before
/// slices: values of one type that differ give different words.
pub(super) struct Words<'a>(pub(super) &'a mut Vec<u64>);

impl Hasher for Words<'_> {
    fn write(&mut self, bytes: &[u8]) {
        self.0.push(bytes.len() as u64);
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0.push(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, i: u8) {
        self.0.push(u64::from(i));
    }
    fn write_u16(&mut self, i: u16) {
        self.0.push(u64::from(i));
    }
    fn write_u32(&mut self, i: u32) {
        self.0.push(u64::from(i));
    }
    fn write_u64(&mut self, i: u64) {
        self.0.push(i);
    }
    fn write_usize(&mut self, i: usize) {
        self.0.push(i as u64);
    }
    fn write_isize(&mut self, i: isize) {
        self.0.push(i as u64);
    }
    fn finish(&self) -> u64 {
        hash(self.0)
    }
}

/// Appends `value`.
#[inline]
pub(super) fn push(words: &mut Vec<u64>, value: &impl Hash) {
    value.hash(&mut Words(words));
}

/// Appends indices, two to a word. Their number must be known from what comes before.
#[inline]
pub(super) fn push_indices(words: &mut Vec<u64>, indices: &[u32]) {
    for pair in indices.chunks(2) {
        let second = pair.get(1).copied().unwrap_or(0);
        words.push(u64::from(second) << 32 | u64::from(pair[0]));
    }
}

/// A hash of some words: four sums side by side, since a product has to wait for the one before.
#[inline]
pub(super) fn hash(words: &[u64]) -> u64 {
    use crate::hash::MULTIPLIER;
    let step = |sum: u64, word: u64| (sum.rotate_left(5) ^ word).wrapping_mul(MULTIPLIER);
    let mut sums = [1u64, 2, 3, words.len() as u64];
    let fours = words.chunks_exact(4);
    for (i, &word) in fours.remainder().iter().enumerate() {
        sums[i] = step(sums[i], word);
    }
    for four in fours {
        for (sum, &word) in sums.iter_mut().zip(four) {
            *sum = step(*sum, word);
        }
    }
    let mixed = sums.iter().fold(0, |all, &sum| step(all, sum ^ sum >> 32));
    (mixed ^ mixed >> 32).wrapping_mul(MULTIPLIER)
}

/// What a plan depends on of the graph it was made for. Equal keys mean equal graphs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphKey {
    pub(super) hash: u64,
    pub(super) words: Vec<u64>,
}

impl GraphKey {
    /// A hash of the key.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_and_its_place_changes_the_hash() {
        let words: Vec<u64> = (0..23).map(|i| i * i).collect();
        let mut seen = std::collections::BTreeSet::new();
        assert!(seen.insert(hash(&words)));
        for i in 0..words.len() {
            let mut other = words.clone();
            other[i] += 1;
            assert!(seen.insert(hash(&other)), "{i}");
            assert!(seen.insert(hash(&words[..i])), "{i}");
        }
        for i in 1..words.len() {
            let mut other = words.clone();
            other.swap(i, i - 1);
            assert!(seen.insert(hash(&other)), "{i}");
        }
    }

    #[test]
    fn slices_say_how_long_they_are() {
        let words = |parts: &[&[u8]]| {
            let mut words = Vec::new();
            parts.iter().for_each(|p| push(&mut words, p));
            words
        };
        assert_ne!(words(&[b"ab", b"c"]), words(&[b"a", b"bc"]));
        assert_ne!(words(&[b"a\0"]), words(&[b"a"]));
    }
}
