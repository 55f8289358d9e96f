//! The mutants: a fault's name, what it is, and the cells that should catch it.
//!
//! The faults of the functions of row programs follow from the op tables, those of the decompositions from theirs. All others stand
//! here, one per hook in the code: a test compares the two.

use crate::modes::DECOMPOSE_FAULTS;
use candle_lazy_graph::{BinaryOp, CmpOp, ReduceOp, UnaryOp};

/// A fault and the cells that should catch it.
#[derive(Debug, Clone)]
pub struct Mutant {
    /// The fault's name: the place in the code.
    pub name: String,
    /// What it is.
    pub what: String,
    /// The ops of the cells, separated by spaces; `program` for the named graphs.
    pub ops: String,
    /// The modes of the cells, separated by spaces.
    pub modes: String,
}

/// Name, what it is, ops, modes.
type Row = (&'static str, &'static str, &'static str, &'static str);

const ROW: &[Row] = &[
    ("row.round.F16", "a fused op does not round to f16", "recip powf affine exp sqr", "chain"),
    ("row.round.BF16", "a fused op does not round to bf16", "recip powf affine exp sqr", "chain"),
    ("row.select.arms", "a choice takes the other side", "where_cond", "all-passes"),
    ("row.max.start", "a largest element starts at 0", "max", "all-passes"),
    ("row.min.start", "a smallest element starts at 0", "min", "all-passes"),
    ("row.sum.f16", "a sum accumulates in f16", "sum mean", "all-passes"),
    ("row.sum.segment", "a sum ends after one segment", "sum mean", "all-passes"),
    ("row.sum.remainder", "a sum leaves out what fills no whole chunk", "sum", "all-passes"),
    ("row.fold.lane", "a fold of lanes drops a term", "sum", "all-passes"),
    ("row.extreme.nan", "a leading NaN is not kept", "max min", "all-passes"),
    ("row.extreme.zero", "an extreme that is zero has any zero's sign", "max min", "all-passes"),
    ("row.split.rest", "the tail behind whole tiles is not computed", "exp neg", "all-passes"),
    ("row.row_len", "a row is one longer than it is", "mean", "all-passes"),
    ("row.shared_output", "one row shared by all is stored once", "to_dtype", "all-passes"),
    ("row.last_row", "the last row is not computed", "softmax", "all-passes"),
    ("row.last_task", "the last task of several threads is lost", "sum max", "all-passes"),
    ("row.gather.stride", "a strided row is read without its stride", "softmax sum exp", "all-passes"),
    ("row.gather.tail", "the last of a strided block is not read", "softmax sum exp", "all-passes"),
    ("row.gather.repeat", "a repeated element is its neighbour", "add mul softmax sum", "all-passes"),
    ("row.scatter.stride", "a strided row is stored without its stride", "softmax log_softmax", "all-passes"),
    ("row.scatter.tail", "the last of a row is not stored", "exp to_dtype softmax", "all-passes"),
    ("row.columns.stride", "a column is read without its stride", "softmax sum", "all-passes"),
    ("row.columns.tail", "the last column is not stored", "softmax log_softmax", "all-passes"),
    ("row.columns.rows", "the last of sixteen rows is off", "sum max softmax", "all-passes"),
    ("row.columns.nan", "a leading NaN is not kept in columns", "max min", "all-passes"),
    ("row.quotient.tail", "the last quotient of a row is off", "softmax rms_norm", "all-passes"),
    ("row.normal.tail", "the last normalised element of a row is off", "rms_norm layer_norm", "all-passes"),
    ("row.shifted_exp.tail", "the last exponential of a softmax is off", "softmax", "all-passes"),
    ("row.squares.last", "the last square of a row does not count", "rms_norm layer_norm", "all-passes"),
    ("row.columns.zero", "an extreme that is zero has any zero's sign in columns", "max min", "all-passes"),
    ("direct.operand", "one op without a plan takes an operand twice", "add sub mul", "eval"),
    ("direct.unary", "the last element of one op without a plan is off", "exp neg", "eval"),
    ("direct.lora", "the last element of a lora without a plan is off", "lora", "eval"),
    ("direct.affine", "one affine without a plan adds its factor", "affine", "eval"),
    (
        "direct.row",
        "the last element of one row program without a plan is off",
        "softmax rms_norm layer_norm glu",
        "eval",
    ),
    ("row.merge", "dims merge that one operand keeps apart", "add mul", "all-passes"),
    ("row.outer_offset", "an outer dim does not count in an offset", "exp sum softmax", "all-passes"),
    ("row.pitch", "rows count as evenly spaced that are not", "exp softmax add mul", "all-passes"),
    ("row.stale_sums", "a tile's sums begin where the last tile's ended", "sum softmax", "all-passes"),
    ("row.load_row", "every row reads the first row's value", "program", "all-passes only-fuse"),
    ("row.buffer_freed_early", "a tile buffer is freed early", "softmax layer_norm gelu program", "all-passes"),
    ("row.segmented_store", "a value is stored one sweep early", "softmax rms_norm layer_norm", "all-passes"),
    ("emit.mean.count", "a mean multiplies by the count", "mean", "all-passes"),
    ("emit.softmax.max", "softmax does not subtract the largest", "softmax", "all-passes"),
    ("emit.softmax.sum", "softmax divides by another sum", "softmax", "all-passes"),
    ("emit.log_softmax.max", "log-softmax does not subtract the largest", "log_softmax", "all-passes"),
    ("emit.log_softmax.log", "log-softmax subtracts the sum", "log_softmax", "all-passes"),
    ("emit.rms_norm.weight", "rms norm without weight", "rms_norm", "all-passes"),
    ("emit.layer_norm.variance", "layer norm's variance is not centred", "layer_norm", "all-passes"),
    ("row.root_mean.eps", "a norm without eps", "rms_norm layer_norm", "all-passes"),
    ("row.root_mean.count", "a norm's root of a sum instead of a mean", "rms_norm layer_norm", "all-passes"),
    ("emit.layer_norm.weight", "layer norm without weight", "layer_norm", "all-passes"),
    ("emit.layer_norm.bias", "layer norm without bias", "layer_norm", "all-passes"),
    ("emit.glu.gate", "gate and up change places", "glu", "ops"),
];

const KERNELS: &[Row] = &[
    ("matmul.empty_k", "a product over nothing gives ones", "matmul", "all-passes"),
    ("matmul.last_term", "the last term is dropped", "matmul", "all-passes"),
    ("matmul.last_row", "the last row is not computed", "matmul linear", "all-passes"),
    ("matmul.accumulate", "a product overwrites what it should add to", "lora", "all-passes"),
    ("matmul.f16", "a product in f16", "matmul", "all-passes"),
    ("matmul.tail", "the last element is off by a thousandth", "matmul", "all-passes"),
    ("matmul.col_stride", "columns are read as if they were dense", "matmul", "all-passes"),
    ("matmul.fold", "batches fold although the right side differs", "matmul", "all-passes"),
    ("matmul.batch_stride_a", "every batch reads the first left side", "matmul", "all-passes"),
    ("matmul.batch_stride_b", "every batch reads the first right side", "matmul", "all-passes"),
    ("matmul.stale_widened", "a widened right side is used for the next batch", "matmul", "all-passes"),
    ("lora.scale", "lora without its scale", "lora", "all-passes"),
    ("lora.base", "lora without its base", "lora", "all-passes"),
    ("lora.rank", "the last column of x·A is lost", "lora", "all-passes"),
    ("lora.skinny_rank", "the last number of a hidden row is lost", "lora", "all-passes"),
    ("lora.skinny_tail", "the last number of a small rank's product is off", "lora", "all-passes"),
    ("lora.block_offset", "every block of rows reads the first", "lora", "all-passes"),
    ("lora.piece_offset", "every piece of a block reads the first", "lora", "all-passes"),
    ("lora.rounded_middle", "x·A is rounded to half precision", "lora", "rounds-once"),
    ("dot.tail", "an inner product drops its tail", "linear", "all-passes"),
    ("rope.position", "every position turns by the first angle", "rope", "all-passes"),
    ("rope.table_stride", "every pair turns by the first angle", "rope", "all-passes"),
    ("rope.last_pair", "the last pair is not turned", "rope", "all-passes"),
    ("rope.head", "every head reads the first", "rope", "all-passes"),
    ("rope.batch_cos", "every batch reads the first cosines", "rope", "all-passes"),
    ("rope.batch_sin", "every batch reads the first sines", "rope", "all-passes"),
    ("rope.tables", "cosine and sine change places", "rope", "all-passes"),
    ("rope.pairs", "halves instead of neighbours, and the reverse", "rope", "all-passes"),
    ("rope.step", "a strided row is read as if it were dense", "rope", "all-passes"),
    ("index_select.step", "slices are read at another stride", "index_select", "all-passes"),
    ("index_select.base", "every outer index reads the first", "index_select", "all-passes"),
    ("index_select.last", "the last index chooses its neighbour", "index_select embedding", "all-passes"),
    ("index_select.zeros", "the first index gives zeros", "index_select embedding", "all-passes"),
    (
        "index_select.inner_stride",
        "a strided slice is copied as if it were dense",
        "index_select embedding",
        "all-passes",
    ),
    ("copy.row_offset", "every row copies the first", "contiguous cat", "all-passes"),
    ("copy.last_row", "the last row is not copied", "contiguous cat", "all-passes"),
    ("copy.strided_tail", "the last of a strided block is not copied", "contiguous cat", "all-passes"),
    ("copy.stride", "a strided row is copied as if it were dense", "contiguous cat", "all-passes"),
    ("cast.rounds", "a float becomes the nearest integer", "to_dtype", "all-passes"),
    ("cast.offset", "a cast reads from the start of the storage", "to_dtype", "all-passes"),
    ("cast.stride", "a strided row is cast as if it were dense", "to_dtype", "all-passes"),
    ("cast.tail", "the last element is not cast", "to_dtype", "all-passes"),
    ("full.tail", "the last element is not filled", "full", "all-passes"),
    ("dots.pitch", "every column reads the weight's first row", "linear", "all-passes"),
    ("dots.piece", "what a long row has summed before its last piece is lost", "linear", "all-passes"),
    ("dots.last_row", "the last row of a product is not computed", "matmul linear", "all-passes"),
    ("dots.columns.tail", "the last term of products with columns is dropped", "matmul", "all-passes"),
    ("dots.columns.pitch", "the right side's rows are read as if they were dense", "matmul", "all-passes"),
    ("dots.strip", "packed columns begin one too early", "matmul", "all-passes"),
    ("dots.bf16_truncates", "bf16 is cut instead of rounded", "matmul linear", "rounds-once"),
    ("dots.f16", "inner products of rows are rounded to f16", "linear", "all-passes"),
    ("dots.tail", "the last inner product is off by a thousandth", "linear", "all-passes"),
    ("attention.causal", "a query sees the key behind it", "attention", "all-passes"),
    ("attention.window", "a window is one key wider", "attention", "all-passes"),
    ("attention.mask", "the mask is not added", "attention", "all-passes"),
    ("attention.mask_head", "every head reads the first head's mask", "attention", "all-passes"),
    ("attention.mask_row", "every query reads the first query's mask", "attention", "all-passes"),
    ("attention.group", "query heads are dealt to key heads in turn", "attention", "all-passes"),
    ("attention.last_key", "the last key is not seen", "attention", "all-passes"),
    ("attention.block", "every block weighs the first block's values", "attention", "all-passes"),
    ("attention.tail", "the last element is off by a thousandth", "attention", "all-passes"),
    ("attention.scale", "scores are not scaled", "attention", "all-passes"),
    ("attention.softcap", "scores are not capped", "attention", "all-passes"),
    ("attention.rescale", "what was accumulated is not rescaled", "attention", "all-passes"),
    ("attention.sum_f16", "the sum of weights accumulates in f16", "attention", "all-passes"),
    ("attention.fourth_value", "every fourth value is dropped", "attention", "all-passes"),
    ("attention.join", "what came before a segment is not rescaled", "attention", "all-passes"),
    ("attention.value_tail", "the values that only some of a group see are dropped", "attention", "all-passes"),
    ("causal_mask.window", "the mask has no window", "causal_mask", "all-passes"),
    ("causal_mask.last", "the last query does not see the last key", "causal_mask", "all-passes"),
    ("causal_mask.diagonal", "a hidden key is seen", "causal_mask", "all-passes"),
];

const BACKWARDS: &[Row] = &[
    ("grad.unary.chain", "the result's gradient is not multiplied in", "gelu gelu_erf silu", "ops-tracked"),
    ("grad.silu.term", "silu's gradient lacks x·(1 − s)", "silu", "ops-tracked"),
    ("grad.gelu.sech", "gelu's gradient lacks 1 − t²", "gelu", "ops-tracked"),
    ("grad.gelu.cubic", "gelu's gradient lacks the cubic term", "gelu", "ops-tracked"),
    ("grad.gelu_erf.density", "gelu_erf's gradient lacks the density", "gelu_erf", "ops-tracked"),
    ("grad.glu.up_factor", "the gate's gradient lacks up", "glu", "ops-tracked"),
    ("grad.glu.no_up", "up gets no gradient", "glu", "ops-tracked"),
    ("grad.glu.up", "up's gradient lacks the gate", "glu", "ops-tracked"),
    ("grad.softmax.sum", "softmax's gradient lacks the sum", "softmax", "ops-tracked"),
    ("grad.log_softmax.weight", "log-softmax's gradient lacks the weight", "log_softmax", "ops-tracked"),
    ("grad.norm.eps", "a norm's gradient lacks eps", "rms_norm layer_norm group_norm", "ops-tracked"),
    ("grad.norm.weight_factor", "x's gradient lacks the weight", "rms_norm layer_norm group_norm", "ops-tracked"),
    ("grad.norm.mean", "layer norm's gradient lacks the mean", "layer_norm group_norm", "ops-tracked"),
    ("grad.norm.along", "a norm's gradient lacks the part along x", "rms_norm layer_norm group_norm", "ops-tracked"),
    ("grad.norm.weight", "the weight's gradient lacks x", "rms_norm layer_norm group_norm", "ops-tracked"),
    ("grad.norm.bias", "the bias's gradient is doubled", "layer_norm group_norm", "ops-tracked"),
    ("grad.norm.no_weight", "the weight gets no gradient", "rms_norm layer_norm group_norm", "ops-tracked"),
    ("grad.norm.no_bias", "the bias gets no gradient", "layer_norm group_norm", "ops-tracked"),
    ("grad.matmul.a", "the left side's gradient is zero", "matmul", "ops-tracked"),
    ("grad.matmul.no_b", "the right side gets no gradient", "matmul", "ops-tracked"),
    ("grad.matmul.unbroadcast", "a broadcast side's gradient is not summed", "matmul", "ops-tracked"),
    ("grad.matmul.last_row", "a shared right side's gradient lacks a row", "matmul linear", "ops-tracked"),
    ("grad.bias.sum", "linear's bias gets zeros", "linear", "ops-tracked"),
    ("grad.lora.scale", "x's and A's gradients lack the scale", "lora", "ops-tracked"),
    ("grad.lora.b", "B's gradient lacks the scale", "lora", "ops-tracked"),
    ("grad.lora.no_a", "A gets no gradient", "lora", "ops-tracked"),
    ("grad.rope.angle", "the gradient turns forwards", "rope", "ops-tracked"),
    ("grad.rope.batch", "a shared table's gradient is the first batch's", "rope", "ops-tracked"),
    ("grad.rope.cos", "the cosine's gradient lacks a half", "rope", "ops-tracked"),
    ("grad.rope.no_sin", "the sine gets no gradient", "rope", "ops-tracked"),
    ("grad.attention.value", "v's gradient is zero", "attention", "ops-tracked"),
    ("grad.attention.softmax", "the scores' gradient lacks the sum", "attention", "ops-tracked"),
    ("grad.attention.softcap", "the scores' gradient lacks the cap's slope", "attention", "ops-tracked"),
    ("grad.attention.scale", "the scores' gradient lacks the scale", "attention", "ops-tracked"),
    ("grad.attention.no_key", "k gets no gradient", "attention", "ops-tracked"),
    ("grad.attention.mask", "the gradient forgets the mask", "attention", "ops-tracked"),
    ("group_norm.groups", "groups and channels of a group change places", "group_norm", "ops"),
    ("cross_entropy.target", "every target is the first class", "cross_entropy", "ops"),
    ("cross_entropy.mean", "a mean is a sum", "cross_entropy", "ops"),
    ("grad.embedding.row", "every row's gradient goes to the first id's row", "embedding", "ops-tracked"),
    ("grad.cross_entropy.target", "the gradient lacks the target", "cross_entropy", "ops-tracked"),
    ("grad.cross_entropy.chain", "the loss's gradient is not multiplied in", "cross_entropy", "ops-tracked"),
];

const PLANS: &[Row] = &[
    ("group.neighbour", "a request reads what its neighbour was given", "program", "batched"),
    ("group.rows", "a request gets its neighbour's rows of a product", "program", "batched"),
    ("tape.reversed", "the leaves get one another's gradients", "matmul lora linear", "tracked"),
    ("choose.falls_back", "row programs are not chosen", "exp add sum", "all-passes"),
    ("choose.replays_matmul", "matmul is replayed", "matmul", "all-passes"),
    ("units.gone", "a value without its dim is read inside", "program", "only-fuse all-passes"),
    ("units.axes", "one program with two sets of reduced dims", "program", "only-fuse all-passes"),
    ("units.domain", "two shapes in one program", "program", "only-fuse all-passes"),
    ("units.reduces_rows", "a value per row is reduced again", "program", "only-fuse all-passes"),
    ("units.merged_axes", "groups with different reduced dims merge", "program", "only-fuse all-passes"),
    ("units.merged_gone", "groups merge around a value without its dim", "program", "only-fuse all-passes"),
    ("units.cycle", "a group waits for itself", "program", "only-fuse all-passes"),
    ("units.reach", "a group that grew late counts as done", "program", "only-fuse all-passes"),
    ("heads.shared", "a product is taken in although another step reads it", "program", "only-fuse all-passes"),
    ("heads.reduces", "what reduces rows follows a product in parts", "program", "only-fuse all-passes"),
    ("heads.left", "products of two left sides count as of one", "program", "only-fuse all-passes"),
    ("heads.depends", "a product runs together with what it waits for", "program", "only-fuse all-passes"),
    ("heads.order", "the results of heads change places", "program", "only-fuse all-passes"),
    ("products.second", "the second product of a head is the first", "program", "only-fuse all-passes"),
    ("products.operand_row", "every block of rows reads an operand's first rows", "program", "only-fuse all-passes"),
    ("products.operand_col", "every part reads an operand's first columns", "program", "only-fuse all-passes"),
    ("units.needed", "a wanted value is not an output", "program exp", "only-fuse all-passes"),
    ("emit.load_row", "a value per element is read once per row", "softmax program", "all-passes"),
    ("emit.input_number", "an input read twice is another one", "program", "all-passes"),
    ("emit.first_param", "every scalar is the first", "affine program", "all-passes"),
    ("emit.unrounded", "no op rounds inside of a program", "exp recip affine", "chain"),
    ("emit.unrounded_scalar", "a compared number is not rounded", "eq lt le gt ge ne", "all-passes"),
    ("emit.affine_order", "the sum comes before the product", "affine", "all-passes"),
    ("emit.powf", "a power is a product", "powf", "all-passes"),
    ("emit.elu.alpha", "elu loses its factor", "elu", "all-passes"),
    ("emit.clamp.low", "clamp has no lower bound", "clamp", "all-passes"),
    ("emit.var.biased", "the variance divides by n", "var", "all-passes"),
    ("emit.log_sum_exp.pivot", "the largest element is not added again", "log_sum_exp", "all-passes"),
    ("gather.index", "every index is one too small", "gather", "all-passes"),
    ("gather.step", "the index moves along the wrong stride", "gather", "all-passes"),
    ("scatter.add_is_set", "adding writes", "scatter_add", "all-passes"),
    ("scatter.last_source", "the last source is left out", "scatter scatter_add", "all-passes"),
    ("index_add.last_slice", "the last slice is left out", "index_add", "all-passes"),
    ("arg_reduce.last", "the last of equal ones", "argmax argmin", "all-passes"),
    ("arg_reduce.other", "the other extreme", "argmax argmin", "all-passes"),
    ("arange.step", "the step is forgotten", "arange", "all-passes"),
    ("random.key", "the key is forgotten", "rand randn", "all-passes"),
    ("random.block", "every block has the same numbers", "rand randn", "all-passes"),
    ("random.scale", "the second scalar is forgotten", "rand randn", "all-passes"),
    ("view.stride", "neighbours instead of steps", "stride", "chain"),
    ("emit.where_arms", "a choice's sides change places", "where_cond", "all-passes"),
    ("emit.glu_act", "another activation", "glu", "all-passes"),
    ("emit.mean_is_sum", "a mean is a sum", "mean", "all-passes"),
    ("emit.layer_norm_operands", "weight and bias change places", "layer_norm", "all-passes"),
    ("lower.order", "steps run in reverse", "program", "all-passes"),
    ("lower.concat_dim", "parts stand along the first dim", "cat", "all-passes"),
    ("lower.attention_causal", "attention forgets that it is causal", "attention", "all-passes"),
    ("slots.output_freed", "a wanted value's slot is freed", "program", "no-passes all-passes"),
    ("slots.freed_early", "a slot is freed before its last use", "program", "no-passes all-passes"),
    ("slots.outputs_swapped", "outputs change places", "program", "replay"),
    ("slots.leaves_swapped", "leaves change places", "sub div matmul program", "all-passes"),
    ("slots.one_for_all", "every value has the same slot", "program", "all-passes"),
    ("run.freed_before", "what a step reads is freed before it", "exp program", "all-passes"),
    ("run.published_swapped", "results change places", "program", "replay"),
    ("run.view_taken_whole", "a view is handed over as if it were dense", "program", "replay"),
    ("bind.leaf_offset", "a leaf is read from the start of its storage", "exp", "all-passes"),
    ("bind.leaf_strides", "a leaf is read as if it were dense", "exp", "all-passes"),
    ("bind.last_scalar", "every scalar is the last", "affine attention", "all-passes"),
    ("bind.broadcast_stride", "one broadcast stride is one", "add mul", "all-passes"),
    ("cache.stale_sizes", "a cached plan keeps its first sizes", "exp matmul narrow", "other-sizes"),
    ("cache.stale_scalars", "a cached plan keeps its first scalars", "affine powf lora", "other-scalars"),
    ("cache.any_graph", "a plan of another graph is taken", "neg abs sqr", "all-passes"),
    ("linear.bias", "linear without its bias", "linear", "no-passes"),
    ("concat.start", "a part overlaps the one before", "cat", "all-passes"),
    ("view.permute", "an intermediate is permuted otherwise", "program", "all-passes"),
    ("view.permute_of_leaf", "a leaf is permuted otherwise", "permute program", "all-passes"),
    ("view.narrow", "a range of an intermediate begins early", "program", "replay"),
    ("view.narrow_of_leaf", "a range of a leaf begins early", "narrow", "all-passes"),
    ("view.reshape", "strides are ignored by a reshape", "program", "replay"),
    ("slice_assign.start", "a range is written early", "slice_assign", "all-passes"),
    ("slice_assign.no_copy", "what is not written over is lost", "slice_assign", "all-passes"),
    ("slice_assign.not_last_use", "a value is written in place that is read later", "program", "all-passes"),
    ("replay.affine", "Candle's affine without its addend", "affine", "replay"),
    ("custom.operands", "the last two inputs change places", "custom_op3", "all-passes"),
    ("replay.sub", "a difference the other way", "sub", "replay"),
    ("replay.extreme", "a reduced dim is forgotten", "max min", "replay"),
    ("replay.window", "a mask has no window", "causal_mask", "replay all-passes"),
];

const PASSES: &[Row] = &[
    ("pass.split_bias.lost", "the split loses the bias", "linear program", "only-split-bias"),
    ("pass.split_bias.subtracts", "the split subtracts the bias", "linear", "only-split-bias"),
    ("pass.split_bias.multiplies", "the split multiplies the bias in", "linear", "only-split-bias"),
    ("pass.noop_views.permute", "a permute that changes something is dropped", "program", "only-noop-views"),
    ("pass.noop_views.narrow", "a narrow that changes something is dropped", "narrow", "only-noop-views"),
    ("pass.noop_views.cast", "a cast down and up is dropped", "program", "only-noop-views"),
    ("pass.noop_views.permutes", "the first of two permutes is lost", "program", "only-noop-views"),
    ("pass.cse.scalars", "two scalars merge", "program", "only-cse"),
    ("pass.cse.attributes", "two ranges merge", "program", "only-cse"),
    ("pass.cse.order", "a − b and b − a merge", "program", "only-cse"),
    ("pass.cse.leaves", "two leaves merge", "program", "only-cse"),
    ("pass.dce.root", "a root is its own input", "program", "only-dce"),
    ("pass.dce.outputs", "outputs change places", "program", "only-dce"),
    ("pass.dce.one_output", "outputs of one shape merge", "program", "only-dce"),
];

fn mutant(name: &str, what: &str, ops: &str, modes: &str) -> Mutant {
    Mutant { name: name.into(), what: what.into(), ops: ops.into(), modes: modes.into() }
}

/// Every mutant.
#[must_use]
pub fn mutants() -> Vec<Mutant> {
    let mut all = Vec::new();
    let tail =
        |f: &dyn std::fmt::Debug, op: &str, what: &str| mutant(&format!("row.{f:?}.tail"), what, op, "all-passes");
    for f in UnaryOp::ALL {
        all.push(tail(f, f.name(), "the last element is off by a thousandth"));
    }
    for f in BinaryOp::ALL {
        let mut m = tail(f, f.name(), "the last element is off by a thousandth");
        // the kernels' names are shorter
        m.name = m.name.replace("Maximum", "Max").replace("Minimum", "Min");
        all.push(m);
    }
    for f in CmpOp::ALL {
        all.push(tail(f, f.name(), "the last truth is wrong"));
    }
    for f in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
        all.push(mutant(&format!("row.{f:?}.last"), "the last element is not reduced", f.name(), "all-passes"));
    }
    for (name, what, ops, modes) in [ROW, KERNELS, BACKWARDS, PLANS, PASSES].into_iter().flatten() {
        all.push(mutant(name, what, ops, modes));
    }
    for (name, composite, op, at, wrong) in DECOMPOSE_FAULTS {
        let what = format!("{op} number {at} of the decomposition: {wrong:?}");
        all.push(mutant(name, &what, composite, "recorded"));
    }
    all
}
