//! Tests of inference: one `check` per row, so that a change of the API touches one place.
use super::*;
use crate::op::{BinaryOp, CmpOp};
use DType::{F16, F32, I64, U32, U8};

fn run(op: &Op, inputs: &[(&[usize], DType)]) -> Result<OutMeta> {
    let metas: Vec<_> = inputs.iter().map(|(dims, dtype)| Meta { dims, dtype: *dtype }).collect();
    infer(op, &metas)
}

fn ok(op: Op, inputs: &[(&[usize], DType)], dims: &[usize], dtype: DType) {
    let result = run(&op, inputs).unwrap_or_else(|e| panic!("{op}: {e}"));
    assert_eq!((result.dims.as_slice(), result.dtype), (dims, dtype), "{op}");
}

fn fails(op: Op, inputs: &[(&[usize], DType)], needles: &[&str]) {
    let text = run(&op, inputs).expect_err(&format!("{op} must refuse")).to_string();
    assert!(text.contains(op.name()), "{text} does not name {}", op.name());
    for needle in needles {
        assert!(text.contains(needle), "{text:?} lacks {needle:?}");
    }
}

#[test]
fn known_are_the_dtypes_of_the_list() {
    use DType::{F8E4M3, I16, I32};
    assert!(DTYPES.into_iter().all(is_known));
    assert!(![I16, I32, F8E4M3].into_iter().any(is_known));
}

#[test]
fn elementwise_broadcasts() {
    let add = Op::Binary(BinaryOp::Add);
    ok(add.clone(), &[(&[2, 3], F32), (&[3], F32)], &[2, 3], F32);
    ok(add.clone(), &[(&[2, 1], F32), (&[1, 3], F32)], &[2, 3], F32);
    ok(add.clone(), &[(&[], F32), (&[0, 3], F32)], &[0, 3], F32);
    ok(Op::Compare(CmpOp::Ge), &[(&[2], I64), (&[2], I64)], &[2], U8);
    fails(add.clone(), &[(&[2, 3], F32), (&[2], F32)], &["[2, 3]", "[2]", "broadcast"]);
    fails(add.clone(), &[(&[2], F32), (&[2], F16)], &["f32 [2] and f16 [2]", "to_dtype(DType::F32)"]);
    fails(add, &[(&[2], F32)], &["takes 2 inputs, got 1"]);
}

#[test]
fn what_is_inferred_at_a_glance_is_what_is_inferred() {
    let ops = [
        Op::Unary(UnaryOp::Exp),
        Op::Affine,
        Op::Binary(BinaryOp::Mul),
        Op::Binary(BinaryOp::Pow),
        Op::Softmax { dim: 1 },
        Op::LogSoftmax { dim: 0 },
        Op::RmsNorm { weight: true },
        Op::RmsNorm { weight: false },
        Op::Lora { base: false },
        Op::Lora { base: true },
        Op::Matmul,
    ];
    let huge = [usize::MAX / 2, 3];
    let wide = [3, usize::MAX / 2];
    let all: [&[usize]; 10] = [&[], &[0], &[4], &[2, 0, 3], &[2, 3, 4], &[4, 3], &[3, 4], &[1; 9], &huge, &wide];
    let dtypes: Vec<_> = DTYPES.iter().chain(&[DType::I32]).flat_map(|&d| [[d; 4], [d, d, F16, d]]).collect();
    let mut quick = std::collections::BTreeMap::new();
    let mut each = |op: &Op, dims: &[&[usize]]| {
        for types in &dtypes {
            let inputs: Vec<_> = dims.iter().zip(types).map(|(dims, &dtype)| Meta { dims, dtype }).collect();
            if let Some(glance) = at_a_glance(op, &inputs) {
                let result = infer_checked(op, &inputs).unwrap();
                let dims: Dims = glance.dims.iter().copied().chain(glance.last).collect();
                assert_eq!((&result.dims, result.dtype), (&dims, glance.dtype), "{op} {inputs:?}");
                *quick.entry(op.to_string()).or_insert(0) += 1;
            }
        }
    };
    for op in &ops {
        for (a, b) in all.iter().flat_map(|a| all.iter().map(move |b| (*a, *b))) {
            match op.arity().unwrap() {
                1 => each(op, &[a]),
                2 => each(op, &[a, b]),
                more => all.iter().for_each(|c| each(op, &[a, b, c, a][..more])),
            }
        }
    }
    assert_eq!(quick.len(), 8, "{quick:?}");
    assert!(quick.values().all(|&n| n >= 4), "{quick:?}");
}

#[test]
fn where_takes_an_integer_condition() {
    ok(Op::Where, &[(&[2, 1], U8), (&[3], F32), (&[], F32)], &[2, 3], F32);
    fails(Op::Where, &[(&[2], F32), (&[2], F32), (&[2], F32)], &["u8, u32 or i64", "f32"]);
}

#[test]
fn segments_of_rows_fit_their_adapters() {
    let op = |rows: &[usize]| Op::LoraSegments { rows: Dims::from_slice(rows) };
    type Input = (&'static [usize], DType);
    let [x, base]: [Input; 2] = [(&[1, 6, 3], F32), (&[1, 6, 5], F32)];
    let [a, b, other_a, other_b]: [Input; 4] = [(&[3, 8], F32), (&[8, 5], F32), (&[3, 2], F32), (&[2, 5], F32)];
    ok(op(&[0, 2, 1, 3]), &[x, base, a, b, other_a, other_b], &[1, 6, 5], F32);
    ok(op(&[6, 0]), &[x, base, a, b], &[1, 6, 5], F32);
    fails(op(&[0, 2, 1, 3]), &[x, base, a, b], &["takes 6 inputs, got 4"]);
    fails(op(&[2, 5]), &[x, base, a, b], &["7 rows", "has 6"]);
    fails(op(&[]), &[x, base], &["at least one segment"]);
    fails(op(&[0, 2, 0, 1]), &[x, base, a, b, b, a], &["adapter 1", "[8, 5]"]);
    fails(op(&[0, 2]), &[x, (&[1, 5, 5], F32), a, b], &["differ in their rows"]);
    fails(op(&[0, 2]), &[x, base, (&[3, 8], F16), b], &["f16"]);
}

#[test]
fn unary_wants_floats_and_says_which_cast() {
    ok(Op::Unary(UnaryOp::Exp), &[(&[4], F16)], &[4], F16);
    fails(Op::Unary(UnaryOp::Exp), &[(&[4], U32)], &["u32", ".to_dtype(DType::F32)"]);
}

#[test]
fn reductions() {
    let r = |op, axes, keepdim| Op::Reduce { op, axes, keepdim };
    ok(r(ReduceOp::Sum, 0b101, true), &[(&[2, 3, 4], F32)], &[1, 3, 1], F32);
    ok(r(ReduceOp::Sum, 0b101, false), &[(&[2, 3, 4], I64)], &[3], I64);
    ok(r(ReduceOp::Sum, 0, false), &[(&[], F32)], &[], F32);
    ok(r(ReduceOp::Sum, 1, false), &[(&[0], F32)], &[], F32);
    fails(r(ReduceOp::Max, 1, false), &[(&[0], F32)], &["empty"]);
    fails(r(ReduceOp::Mean, 1, false), &[(&[2], U32)], &["u32"]);
    fails(r(ReduceOp::Sum, 0b1000, false), &[(&[2, 3], F32)], &["[2, 3]"]);
}

#[test]
fn matmul_broadcasts_batches() {
    ok(Op::Matmul, &[(&[2, 3], F32), (&[3, 4], F32)], &[2, 4], F32);
    ok(Op::Matmul, &[(&[5, 1, 2, 3], F32), (&[7, 3, 4], F32)], &[5, 7, 2, 4], F32);
    fails(Op::Matmul, &[(&[2, 3], F32), (&[4, 5], F32)], &["[2, 3] x [4, 5]", "3 and 4"]);
    fails(Op::Matmul, &[(&[2, 2, 3], F32), (&[3, 3, 5], F32)], &["batch"]);
    fails(Op::Matmul, &[(&[3], F32), (&[3, 4], F32)], &["two dims"]);
    fails(Op::Matmul, &[(&[2, 2], U32), (&[2, 2], U32)], &["u32"]);
}

#[test]
fn views() {
    ok(Op::Reshape { shape: Dims::from_slice(&[3, 2]) }, &[(&[2, 3], F32)], &[3, 2], F32);
    fails(Op::Reshape { shape: Dims::from_slice(&[3, 3]) }, &[(&[2, 3], F32)], &["[2, 3]", "[3, 3]"]);
    ok(Op::Permute { perm: SmallVec::from_slice(&[2, 0, 1]) }, &[(&[2, 3, 4], F32)], &[4, 2, 3], F32);
    fails(Op::Permute { perm: SmallVec::from_slice(&[0, 0]) }, &[(&[2, 3], F32)], &["permutation"]);
    ok(Op::Narrow { dim: 1, start: 1, len: 2 }, &[(&[2, 3], F32)], &[2, 2], F32);
    fails(Op::Narrow { dim: 1, start: 2, len: 2 }, &[(&[2, 3], F32)], &["start 2", "[2, 3]"]);
    fails(Op::Narrow { dim: 1, start: usize::MAX, len: 2 }, &[(&[2, 3], F32)], &["exceed"]);
    fails(Op::Narrow { dim: 2, start: 0, len: 1 }, &[(&[2, 3], F32)], &["dim 2"]);
    ok(Op::Broadcast { shape: Dims::from_slice(&[4, 2, 3]) }, &[(&[1, 3], F32)], &[4, 2, 3], F32);
    fails(Op::Broadcast { shape: Dims::from_slice(&[3]) }, &[(&[2, 3], F32)], &["[2, 3]", "[3]"]);
    let huge = Dims::from_slice(&[usize::MAX, 2]);
    fails(Op::Broadcast { shape: huge }, &[(&[1], F32)], &["memory"]);
}

#[test]
fn movement() {
    let cat = |dim| Op::Concat { dim };
    ok(cat(1), &[(&[2, 3], F32), (&[2, 0], F32), (&[2, 4], F32)], &[2, 7], F32);
    fails(cat(1), &[(&[2, 3], F32), (&[3, 3], F32)], &["[2, 3]", "[3, 3]"]);
    fails(cat(2), &[(&[2, 3], F32)], &["dim 2"]);
    fails(cat(0), &[], &["at least one"]);
    ok(Op::IndexSelect { dim: 0 }, &[(&[5, 3], F32), (&[2], U32)], &[2, 3], F32);
    fails(Op::IndexSelect { dim: 0 }, &[(&[5, 3], F32), (&[2], F32)], &["f32", "U32"]);
    ok(Op::SliceAssign { dim: 1, start: 3 }, &[(&[2, 5], F32), (&[2, 2], F32)], &[2, 5], F32);
    fails(Op::SliceAssign { dim: 1, start: 4 }, &[(&[2, 5], F32), (&[2, 2], F32)], &["[2, 2]", "[2, 5]"]);
    ok(Op::Embedding, &[(&[9, 4], F16), (&[2, 3], U32)], &[2, 3, 4], F16);
}

#[test]
fn composites() {
    ok(Op::Softmax { dim: 0 }, &[(&[2, 3], F32)], &[2, 3], F32);
    fails(Op::Softmax { dim: 2 }, &[(&[2, 3], F32)], &["dim 2", "[2, 3]"]);
    fails(Op::Softmax { dim: 0 }, &[(&[], F32)], &["rank 0"]);
    ok(Op::RmsNorm { weight: true }, &[(&[2, 3], F32), (&[3], F32)], &[2, 3], F32);
    fails(Op::RmsNorm { weight: true }, &[(&[2, 3], F32), (&[2], F32)], &["weight", "[3]"]);
    fails(Op::RmsNorm { weight: false }, &[(&[], F32)], &["one dim"]);
    fails(Op::LayerNorm { weight: false, bias: true }, &[(&[3], F32), (&[2], F32)], &["the bias"]);
    ok(Op::Linear { bias: true }, &[(&[2, 5, 3], F32), (&[4, 3], F32), (&[4], F32)], &[2, 5, 4], F32);
    fails(Op::Linear { bias: false }, &[(&[2, 5], F32), (&[4, 3], F32)], &["5 features", "takes 3"]);
    ok(Op::Lora { base: false }, &[(&[2, 3], F32), (&[3, 8], F32), (&[8, 5], F32)], &[2, 5], F32);
    fails(Op::Lora { base: false }, &[(&[2, 3], F32), (&[3, 8], F32), (&[7, 5], F32)], &["[7, 5]"]);
    fails(
        Op::Lora { base: true },
        &[(&[2, 3], F32), (&[3, 8], F32), (&[8, 5], F32), (&[2, 3], F32)],
        &["base", "[2, 5]"],
    );
    ok(Op::Rope { interleaved: true }, &[(&[2, 3, 4, 6], F32), (&[4, 3], F32), (&[4, 3], F32)], &[2, 3, 4, 6], F32);
    fails(Op::Rope { interleaved: true }, &[(&[2, 3, 4, 5], F32), (&[4, 2], F32), (&[4, 2], F32)], &["even"]);
    let attention = |mask, causal| Op::Attention { mask, causal, softcap: false, window: None };
    let (q, k): (&[usize], &[usize]) = (&[2, 6, 4, 8], &[2, 3, 7, 8]);
    ok(attention(false, true), &[(q, F32), (k, F32), (k, F32)], q, F32);
    ok(attention(true, false), &[(q, F32), (k, F32), (k, F32), (&[4, 7], F32)], q, F32);
    fails(attention(true, false), &[(q, F32), (k, F32), (k, F32), (&[4, 6], F32)], &["mask"]);
    fails(attention(false, false), &[(q, F32), (&[2, 4, 7, 8], F32), (&[2, 4, 7, 8], F32)], &["heads"]);
    fails(attention(false, true), &[(&[2, 6, 9, 8], F32), (k, F32), (k, F32)], &["causal"]);
    let backward = |mask| Op::AttentionBackward { mask, causal: true, softcap: false, window: None };
    let all = 2 * 6 * 4 * 8 + 2 * (2 * 3 * 7 * 8);
    ok(backward(false), &[(q, F32), (k, F32), (k, F32), (q, F32)], &[all], F32);
    ok(backward(true), &[(q, F32), (k, F32), (k, F32), (q, F32), (&[4, 7], F32)], &[all], F32);
    fails(backward(true), &[(q, F32), (k, F32), (k, F32), (q, F32), (&[4, 6], F32)], &["mask"]);
    fails(backward(false), &[(q, F32), (k, F32), (k, F32), (&[2, 6, 4, 7], F32)], &["gradient", "[2, 6, 4, 8]"]);
    fails(backward(false), &[(q, F32), (k, F32), (k, F32), (q, DType::F16)], &["f16"]);
}

#[test]
fn unknown_dtypes_are_refused() {
    fails(Op::Binary(BinaryOp::Add), &[(&[2], DType::I32), (&[2], DType::I32)], &["i32"]);
    fails(Op::Cast(DType::F8E4M3), &[(&[2], F32)], &["unsupported"]);
}

#[test]
fn sizes_that_overflow_beside_a_zero_overflow_in_any_order() {
    assert_eq!((elem_count(&[]), elem_count(&[0, 3]), elem_count(&[2, 3])), (Some(1), Some(0), Some(6)));
    let big = 1usize << 40;
    for dims in [[0, big, big], [big, 0, big], [big, big, 0]] {
        assert_eq!(elem_count(&dims), None, "{dims:?}");
    }
}
