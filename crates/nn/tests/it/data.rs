//! Documents in rows, batches, what is held out.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::text;
use candle_core::Device;
use candle_lazy_nn::data::{split, Batches, Document, Packing, Rows, IGNORE_INDEX};
use candle_lazy_nn::Error;

const X: i64 = IGNORE_INDEX;

/// Tokens and targets of all rows.
fn content(rows: &Rows) -> (Vec<Vec<u32>>, Vec<Vec<i64>>) {
    let batch = rows.batch(&(0..rows.count()).collect::<Vec<_>>(), &Device::Cpu).unwrap();
    let targets = batch.targets.to_vec2::<i64>().unwrap();
    let weights = batch.weights.to_vec2::<f32>().unwrap();
    for (target, weight) in targets.iter().flatten().zip(weights.iter().flatten()) {
        assert_eq!(*weight, if *target == X { 0. } else { 1. });
    }
    let learned = targets.iter().flatten().filter(|target| **target != X).count();
    assert_eq!((batch.learned, rows.learned()), (learned, learned));
    (batch.inputs.to_vec2().unwrap(), targets)
}

/// A prompt of two tokens with an answer of two, a text of three, one of two.
fn documents() -> Vec<Document> {
    vec![
        Document::with_prompt(vec![10, 11, 12, 13], 2).unwrap(),
        Document::new(vec![20, 21, 22]).unwrap(),
        Document::new(vec![30, 31]).unwrap(),
    ]
}

#[test]
fn one_document_per_row() {
    let rows = Rows::pack(&documents(), 5, &Packing::Documents { end: Some(1), pad: 0 }).unwrap();
    let (inputs, targets) = content(&rows);
    assert_eq!((rows.count(), rows.row_len()), (3, 5));
    assert_eq!(inputs, [[10, 11, 12, 13, 0], [20, 21, 22, 0, 0], [30, 31, 0, 0, 0]]);
    assert_eq!(targets, [[X, 12, 13, 1, X], [21, 22, 1, X, X], [31, 1, X, X, X]]);
    // without an end token the last token is a target only
    let rows = Rows::pack(&documents(), 3, &Packing::Documents { end: None, pad: 0 }).unwrap();
    let (inputs, targets) = content(&rows);
    assert_eq!(inputs, [[10, 11, 12], [20, 21, 0], [30, 0, 0]]);
    assert_eq!(targets, [[X, 12, 13], [21, 22, X], [31, X, X]]);
}

#[test]
fn whole_documents_share_rows_in_order() {
    let rows = Rows::pack(&documents(), 8, &Packing::Whole { end: Some(1), pad: 0 }).unwrap();
    let (inputs, targets) = content(&rows);
    // 4, an end token between, 3: full
    assert_eq!(inputs, [[10, 11, 12, 13, 1, 20, 21, 22], [30, 31, 0, 0, 0, 0, 0, 0]]);
    assert_eq!(targets, [[X, 12, 13, 1, X, 21, 22, 1], [31, 1, X, X, X, X, X, X]]);
    let rows = Rows::pack(&documents(), 7, &Packing::Whole { end: Some(1), pad: 0 }).unwrap();
    assert_eq!(content(&rows).0, [[10, 11, 12, 13, 0, 0, 0], [20, 21, 22, 1, 30, 31, 0]]);
    let rows = Rows::pack(&documents(), 5, &Packing::Whole { end: None, pad: 0 }).unwrap();
    let (inputs, targets) = content(&rows);
    // no token of a document is the target of another's
    assert_eq!(inputs, [[10, 11, 12, 20, 21], [30, 0, 0, 0, 0]]);
    assert_eq!(targets, [[X, 12, 13, 21, 22], [31, X, X, X, X]]);
}

#[test]
fn a_stream_is_cut_where_rows_are_full() {
    let rows = Rows::pack(&documents(), 4, &Packing::Stream { end: Some(1), pad: 0 }).unwrap();
    let (inputs, targets) = content(&rows);
    assert_eq!(inputs, [[10, 11, 12, 13], [20, 21, 22, 1], [30, 31, 0, 0]]);
    assert_eq!(targets, [[X, 12, 13, 1], [21, 22, 1, X], [31, 1, X, X]]);
    let rows = Rows::pack(&documents(), 3, &Packing::Stream { end: Some(1), pad: 0 }).unwrap();
    let (inputs, targets) = content(&rows);
    assert_eq!(inputs, [[10, 11, 12], [13, 1, 20], [21, 22, 1], [30, 31, 0]]);
    assert_eq!(targets, [[X, 12, 13], [1, X, 21], [22, 1, X], [31, 1, X]]);
}

#[test]
fn a_prompt_that_ends_at_the_last_token_but_one_is_masked_up_to_it() {
    let prompts = |prompt: usize| {
        let document = [Document::with_prompt(vec![5, 6, 7, 8], prompt).unwrap()];
        content(&Rows::pack(&document, 4, &Packing::Documents { end: Some(1), pad: 0 }).unwrap()).1.concat()
    };
    assert_eq!(prompts(0), [6, 7, 8, 1]);
    // the first token is never a target: a prompt of one masks nothing more
    assert_eq!(prompts(1), [6, 7, 8, 1]);
    assert_eq!(prompts(2), [X, 7, 8, 1]);
    assert_eq!(prompts(3), [X, X, 8, 1]);
    let document = Document::with_prompt(vec![5, 6], 1).unwrap();
    assert_eq!((document.ids(), document.prompt_len()), (&[5, 6][..], 1));
}

#[test]
fn what_cannot_be_trained_with_is_refused() {
    let pad = Packing::Documents { end: None, pad: 0 };
    assert!(text(Document::new(Vec::new())).starts_with("training data: a document without tokens, at "));
    assert!(text(Document::with_prompt(vec![1, 2], 2))
        .contains("a document of 2 tokens, 2 of them its prompt: nothing to learn"));
    assert!(text(Rows::pack(&[], 4, &pad)).contains("there are no documents"));
    assert!(text(Rows::pack(&documents(), 0, &pad)).contains("rows of 0 positions hold nothing"));
    let whole = Packing::Whole { end: Some(1), pad: 0 };
    assert!(text(Rows::pack(&documents(), 3, &whole)).contains("document 0 needs 4 positions, a row has 3"));
    let single = [Document::new(vec![7]).unwrap()];
    assert!(text(Rows::pack(&single, 4, &pad)).contains("no document has anything to learn"));
    assert!(Rows::pack(&single, 4, &whole).is_ok());
    let rows = Rows::pack(&documents(), 8, &whole).unwrap();
    assert!(rows.check(8, 32).is_ok());
    assert!(matches!(rows.check(7, 32), Err(Error::PromptTooLong { len: 8, context: 7, .. })));
    assert!(matches!(rows.check(8, 31), Err(Error::TokenOutOfRange { id: 31, vocab: 31, .. })));
    assert!(text(rows.batch(&[], &Device::Cpu)).contains("a batch of no rows"));
    assert!(text(rows.batch(&[0, 2], &Device::Cpu)).contains("there is no row 2: there are 2"));
}

#[test]
fn a_split_holds_out_a_share_at_random() {
    let items: Vec<u32> = (0..100).collect();
    let (train, held) = split(items.clone(), 0.2, 7).unwrap();
    assert_eq!((train.len(), held.len()), (80, 20));
    assert!(train.is_sorted() && held.is_sorted());
    let mut all = [train.clone(), held.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, items);
    assert_ne!(held, items[80..]);
    assert_eq!(split(items.clone(), 0.2, 7).unwrap(), (train, held.clone()));
    assert_ne!(split(items.clone(), 0.2, 8).unwrap().1, held);
    assert_eq!(split(vec![1, 2, 3], 0.01, 0).unwrap().1.len(), 1);
    for fraction in [0., 1., -0.5, f64::NAN] {
        assert!(text(split(items.clone(), fraction, 0)).contains("a held-out fraction of"));
    }
    assert!(text(split(vec![1], 0.5, 0)).contains("of 1 items 1 would be held out: nothing to train on"));
}

#[test]
fn every_epoch_has_each_row_once_in_its_own_order() {
    let mut batches = Batches::new(7, 3, 5).unwrap();
    assert_eq!(batches.per_epoch(), 3);
    let all: Vec<Vec<usize>> = (0..6).map(|step| batches.of_step(step)).collect();
    assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1, 3, 3, 1]);
    let (first, second) = (all[..3].concat(), all[3..].concat());
    for epoch in [&first, &second] {
        let mut sorted = epoch.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..7).collect::<Vec<_>>());
    }
    assert_ne!(first, second);
    // a step's rows are the same from wherever one begins
    let mut later = Batches::new(7, 3, 5).unwrap();
    assert_eq!(later.of_step(4), all[4]);
    assert_eq!(later.of_step(1), all[1]);
    let mut other = Batches::new(7, 3, 6).unwrap();
    assert_ne!((0..3).flat_map(|step| other.of_step(step)).collect::<Vec<_>>(), first);
    for (rows, batch) in [(0, 3), (3, 0)] {
        assert!(text(Batches::new(rows, batch, 0)).contains("both must be above 0"));
    }
}
