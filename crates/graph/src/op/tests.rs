//! Tests of the op table.
use super::*;

/// One op of every variant, so that the tables below can be checked against all of them.
pub(crate) fn one_of_each() -> Vec<Op> {
    let shape: Dims = Dims::from_slice(&[2, 3]);
    vec![
        Op::Full { shape: shape.clone(), dtype: DType::F32 },
        Op::CausalMask { queries: 2, keys: 3, window: Some(2), dtype: DType::F32 },
        Op::Arange { len: 3, dtype: DType::U32 },
        Op::Random { dist: Distribution::Uniform, shape: shape.clone(), dtype: DType::F32 },
        Op::Unary(UnaryOp::Exp),
        Op::Elu,
        Op::Clamp,
        Op::Binary(BinaryOp::Add),
        Op::Compare(CmpOp::Lt),
        Op::CompareScalar(CmpOp::Lt),
        Op::Affine,
        Op::Powf,
        Op::Where,
        Op::Cast(DType::F16),
        Op::Reduce { op: ReduceOp::Sum, axes: 2, keepdim: true },
        Op::ArgReduce { op: ArgOp::Max, dim: 1, keepdim: false },
        Op::Matmul,
        Op::Reshape { shape: shape.clone() },
        Op::Permute { perm: SmallVec::from_slice(&[1, 0]) },
        Op::Narrow { dim: 0, start: 1, len: 1 },
        Op::Stride { dim: 0, start: 1, len: 2, step: 3 },
        Op::Broadcast { shape: shape.clone() },
        Op::Contiguous,
        Op::Detach,
        Op::Barrier,
        Op::Checkpoint { region: 5 },
        Op::ToDevice,
        Op::Gather { dim: 1 },
        Op::Scatter { op: ScatterOp::Add, dim: 1 },
        Op::IndexAdd { dim: 1 },
        Op::Concat { dim: 0 },
        Op::IndexSelect { dim: 0 },
        Op::SliceAssign { dim: 0, start: 4 },
        Op::Softmax { dim: 1 },
        Op::LogSoftmax { dim: 1 },
        Op::RmsNorm { weight: true },
        Op::LayerNorm { weight: true, bias: false },
        Op::Linear { bias: true },
        Op::Lora { base: true },
        Op::LoraSegments { rows: Dims::from_slice(&[0, 2, 1, 3]) },
        Op::Glu { act: UnaryOp::Silu },
        Op::Rope { interleaved: false },
        Op::Attention { mask: true, causal: true, softcap: true, window: Some(7) },
        Op::AttentionBackward { mask: true, causal: true, softcap: true, window: Some(7) },
        Op::Embedding,
        Op::GroupNorm { groups: 2, weight: true, bias: true },
        Op::CrossEntropy,
        Op::QMatmul,
        Op::Custom { name: "mine", arity: 2, shape, dtype: DType::F32 },
    ]
}

#[test]
fn mapping_sizes_back_and_forth_is_the_identity() {
    for op in one_of_each() {
        let there: Op<String> = op.map_sizes(ToString::to_string);
        let back = there.map_sizes(|s| s.parse::<usize>().unwrap());
        assert_eq!(back, op);
        assert_eq!(there.name(), op.name());
        let mut sizes = 0;
        op.map_sizes(|_| sizes += 1);
        assert_eq!(op.has_sizes(), sizes > 0, "{op}");
        assert_eq!(there.to_string(), op.to_string());
    }
}

#[test]
fn attributes_distinguish_ops() {
    let all = one_of_each();
    for (i, a) in all.iter().enumerate() {
        for (j, b) in all.iter().enumerate() {
            assert_eq!(a == b, i == j);
        }
    }
    assert_ne!(Op::<usize>::Softmax { dim: 0 }, Op::Softmax { dim: 1 });
    assert_ne!(Op::Narrow { dim: 0, start: 1usize, len: 1 }, Op::Narrow { dim: 0, start: 2, len: 1 });
}

#[test]
fn commutative_ops_are_binary() {
    for op in one_of_each() {
        if op.is_commutative() {
            assert_eq!(op.arity(), Some(2), "{op}");
        }
    }
    assert!(Op::<usize>::Binary(BinaryOp::Mul).is_commutative());
    assert!(!Op::<usize>::Binary(BinaryOp::Sub).is_commutative());
    // Candle's maximum and minimum take the left operand where one of them is NaN, so the order matters
    assert!(!Op::<usize>::Binary(BinaryOp::Maximum).is_commutative());
}

#[test]
fn composites_are_the_ones_that_decompose() {
    for op in one_of_each() {
        assert_eq!(op.class() == OpClass::Composite, crate::decompose::is_composite(&op), "{op}");
    }
}

#[test]
fn names_of_unary_ops_are_distinct() {
    let mut names: Vec<_> = UnaryOp::ALL.iter().map(|op| op.name()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), UnaryOp::ALL.len());
}
