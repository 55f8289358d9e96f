//! Tests of lowering: what fuses, what does not, and that slots are reused and never too early.
use super::*;
use crate::plan::Boundary;
use crate::run::{explain, peak_bytes};
use crate::tensor::LazyTensor;
use candle_core::{DType, Device, Tensor};
use candle_lazy_graph::{capture, CaptureOptions};

fn leaf(dims: &[usize]) -> LazyTensor {
    LazyTensor::from(Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap())
}

fn plan_of(roots: &[&LazyTensor]) -> Plan {
    let nodes: Vec<_> = roots.iter().map(|t| t.node().clone()).collect();
    let captured = capture(&nodes, &CaptureOptions { expand: &|_, _, _| false }).unwrap();
    make_plan(captured.graph.clone(), &captured.bindings, &EvalOptions::default()).unwrap()
}

fn row_steps(plan: &Plan) -> Vec<Vec<&'static str>> {
    let rows = plan.steps.iter().filter(|s| matches!(s.kind, StepKind::Row { .. }));
    rows.map(|s| s.ops.to_vec()).collect()
}

#[test]
fn a_transformer_block_fuses_around_its_products() {
    let x = leaf(&[2, 5, 8]);
    let h = x.rms_norm(Some(&leaf(&[8])), 1e-5).unwrap();
    let gate = h.linear(&leaf(&[16, 8]), None).unwrap();
    let up = h.linear(&leaf(&[16, 8]), Some(&leaf(&[16]))).unwrap();
    let down = gate.silu_mul(&up).unwrap().linear(&leaf(&[8, 16]), None).unwrap();
    let y = (down + &x).unwrap().layer_norm(None, None, 1e-5).unwrap();
    drop((h, gate, up));
    let plan = plan_of(&[&y]);
    assert_eq!(row_steps(&plan), [vec!["rms_norm"], vec!["add", "layer_norm"]], "{plan}");
    assert_eq!(products(&plan), [(vec!["linear", "linear", "add", "glu"], 1)], "{plan}");
    let biased = x.linear(&leaf(&[16, 8]), Some(&leaf(&[16]))).unwrap().gelu_erf().unwrap();
    let plan = plan_of(&[&(biased * 0.5).unwrap()]);
    assert_eq!(products(&plan), [(vec!["linear", "add", "gelu_erf", "affine"], 1)], "{plan}");
}

/// The ops and the number of heads of each step of products.
fn products(plan: &Plan) -> Vec<(Vec<&'static str>, usize)> {
    let of = |step: &Step| match &step.kind {
        StepKind::Products { heads } => Some((step.ops.to_vec(), heads.len())),
        _ => None,
    };
    plan.steps.iter().filter_map(of).collect()
}

#[test]
fn products_of_one_left_side_are_one_step() {
    let x = leaf(&[2, 5, 8]);
    let bias = leaf(&[8]);
    let of = |n: usize, bias: Option<&LazyTensor>| x.linear(&leaf(&[n, 8]), bias).unwrap();
    let (q, k, v) = (of(8, Some(&bias)), of(4, None), of(4, None));
    let q = q.reshape((2, 5, 2, 4)).unwrap().transpose(1, 2).unwrap();
    let plan = plan_of(&[&q, &k, &v]);
    assert_eq!(products(&plan), [(vec!["linear", "add", "linear", "linear"], 3)], "{plan}");
    // what needs another's result is no part of its step, nor is what comes much later
    let h = x.linear(&leaf(&[8, 8]), None).unwrap();
    let gate = h.exp().unwrap().t().unwrap().contiguous().unwrap();
    let gated = x.linear(&leaf(&[8, 8]), None).unwrap().broadcast_mul(&gate.sum_all().unwrap()).unwrap();
    let plan = plan_of(&[&gated]);
    assert_eq!(products(&plan), [(vec!["linear", "mul"], 1)], "{plan}");
    let far = (0..20).fold(h, |far, _| far.softmax(1).unwrap().softmax(2).unwrap());
    let late = x.linear(&leaf(&[8, 8]), None).unwrap();
    let plan = plan_of(&[&far, &late]);
    assert_eq!(products(&plan), [], "{plan}");
}

#[test]
fn different_reduced_dims_do_not_share_a_program() {
    let x = leaf(&[4, 5]);
    let y = x.softmax(0).unwrap().softmax(1).unwrap();
    assert_eq!(row_steps(&plan_of(&[&y])).len(), 2);
}

#[test]
fn a_reduction_without_its_dim_ends_a_program() {
    let x = leaf(&[4, 4]);
    // (4) broadcast against (4, 4) lies along the wrong dim, so it cannot be read per row
    let y = x.exp().unwrap().broadcast_sub(&x.exp().unwrap().sum(1).unwrap()).unwrap();
    let plan = plan_of(&[&y]);
    assert_eq!(row_steps(&plan).len(), 2, "{plan}");
}

#[test]
fn no_program_needs_its_own_result() {
    let x = leaf(&[6, 6]);
    let a = x.exp().unwrap();
    // through a product and back: `a` and the sum must not be one program
    let y = (a.matmul(&a).unwrap() + &a).unwrap();
    drop(a);
    let plan = plan_of(&[&y]);
    assert_eq!(row_steps(&plan), [vec!["exp"]], "{plan}");
    assert_eq!(products(&plan), [(vec!["matmul", "add"], 1)], "{plan}");
}

#[test]
fn two_branches_of_one_shape_merge() {
    let (x, y) = (leaf(&[3, 4]), leaf(&[3, 4]));
    let z = (x.exp().unwrap() * y.tanh().unwrap()).unwrap();
    assert_eq!(row_steps(&plan_of(&[&z])), [vec!["exp", "tanh", "mul"]]);
}

#[test]
fn slots_are_reused_and_outputs_are_kept() {
    let mut x = leaf(&[4, 4]);
    for _ in 0..10 {
        x = x.matmul(&x).unwrap();
    }
    let plan = plan_of(&[&x]);
    assert!(plan.slots <= 3, "{} slots\n{plan}", plan.slots);
    let mut live: Vec<bool> = vec![false; plan.slots as usize];
    for slot in plan.leaves.iter().flatten() {
        live[*slot as usize] = true;
    }
    for step in &plan.steps {
        assert!(step.inputs.iter().all(|&s| live[s as usize]), "{plan}");
        for output in &step.outputs {
            assert!(!live[output.slot as usize], "a live value is overwritten\n{plan}");
            live[output.slot as usize] = true;
        }
        for &slot in &step.free_after {
            assert!(std::mem::replace(&mut live[slot as usize], false), "freed twice\n{plan}");
        }
    }
    assert!(plan.outputs.iter().all(|&s| live[s as usize]));
}

#[test]
fn the_peak_is_known_before_running() {
    let x = leaf(&[100, 100]);
    let y = x.matmul(&x).unwrap().matmul(&x).unwrap().matmul(&x).unwrap();
    let captured = capture(&[y.node().clone()], &CaptureOptions { expand: &|_, _, _| false }).unwrap();
    let plan = make_plan(captured.graph.clone(), &captured.bindings, &EvalOptions::default()).unwrap();
    // the input and the result of a product live at once; the leaf is not ours
    let threads = candle_lazy_ops::kernels::threads() as u64;
    let peak = crate::plan::needs(&plan, &captured.bindings).peak;
    // and each thread packs a block of both sides, of 112 numbers instead of 100
    assert!((2 * 40_000..2 * 40_000 + (1 << 19) * (1 + threads)).contains(&peak), "{peak}");
}

#[test]
fn a_plan_explains_itself() {
    let x = leaf(&[3, 4]);
    let y = (x.exp().unwrap() + 1.0).unwrap();
    let text = explain(&[&y], &EvalOptions::default()).unwrap();
    for needle in ["leaf(tensor)", "exp", "affine", "row [exp, affine]", "return"] {
        assert!(text.contains(needle), "{needle} is missing:\n{text}");
    }
    let peak = peak_bytes(&[&y], &EvalOptions::default()).unwrap();
    assert!(peak >= 48 && text.contains(&format!("peak {peak} bytes")), "{text}");
    assert!(!y.is_ready());
}

#[test]
fn groups_that_grew_late_never_wait_for_each_other() {
    let (x, y) = (leaf(&[8, 8]), leaf(&[8, 1]));
    let a = x.sqr().unwrap();
    let part = a.narrow(1, 0, 1).unwrap();
    let first = part.softmax(1).unwrap();
    let b = y.tanh().unwrap();
    // joins the group of `a`, which depends on that of `b` from now on
    let late = a.broadcast_sub(&b.narrow(0, 0, 1).unwrap()).unwrap();
    // reads `part`, which was recorded before `b`, but whose group is that of `a`
    let choice = part.ge(0.25).unwrap().where_cond(&b, &first).unwrap();
    let plan = plan_of(&[&first, &late, &choice]);
    // units that wait for each other would be in no plan
    assert_eq!(plan.steps.iter().map(|s| s.ops.len()).sum::<usize>(), 8, "{plan}");
}

#[test]
fn a_plan_says_why_steps_are_not_one() {
    let (x, w) = (leaf(&[8, 8]), leaf(&[8, 8]));
    let f64s = LazyTensor::from(Tensor::ones((8, 8), DType::F64, &Device::Cpu).unwrap());
    let chain = |mut t: LazyTensor, n: usize| {
        for _ in 0..n {
            t = (t + 1.5).unwrap();
        }
        t
    };
    let many = |count: usize| {
        let mut t = x.clone();
        for i in 0..count {
            t = (t * (&leaf(&[8, 8]) * i as f64).unwrap()).unwrap();
        }
        t
    };
    let between = {
        let e = x.exp().unwrap();
        let turned = e.sum(0).unwrap();
        (e + turned.exp().unwrap().broadcast_as((8, 8)).unwrap()).unwrap()
    };
    let product = || x.matmul(&w).unwrap();
    let late = {
        let p = product();
        let far = (0..40).fold(x.exp().unwrap(), |far, i| far.softmax(i % 2).unwrap());
        (p + far.matmul(&w).unwrap().t().unwrap()).unwrap()
    };
    let twice = {
        let p = product();
        (p.t().unwrap().matmul(&w).unwrap() + (p + 1.0).unwrap()).unwrap()
    };
    let cases = [
        ((x.exp().unwrap().matmul(&w).unwrap() + 1.0).unwrap(), vec![Boundary::Kernel("matmul")]),
        (x.exp().unwrap().t().unwrap().exp().unwrap(), vec![Boundary::View("permute")]),
        (chain(x.clone(), 100), vec![Boundary::Full]),
        (f64s.ge(0.5).unwrap().where_cond(&x, &w).unwrap(), vec![Boundary::Classes]),
        (x.sum(1).unwrap().exp().unwrap(), vec![Boundary::Gone]),
        (x.softmax(0).unwrap().softmax(1).unwrap(), vec![Boundary::OtherRows]),
        (x.sum_keepdim(1).unwrap().sum_keepdim(0).unwrap(), vec![Boundary::OtherShape]),
        (leaf(&[8, 1]).exp().unwrap().broadcast_add(&leaf(&[8, 4])).unwrap(), vec![Boundary::OtherShape]),
        (leaf(&[8, 1]).sum_keepdim(1).unwrap().sum_keepdim(1).unwrap(), vec![Boundary::Again]),
        (
            {
                let a = leaf(&[8, 1]).sum_keepdim(1).unwrap();
                (&a + a.sum_keepdim(1).unwrap()).unwrap()
            },
            vec![Boundary::Again],
        ),
        (many(30), vec![Boundary::Inputs]),
        (between, vec![Boundary::Between]),
        (product().softmax(1).unwrap(), vec![Boundary::Reduces]),
        (twice, vec![Boundary::Shared]),
        (late, vec![Boundary::Far]),
        ((product() + w.matmul(&x).unwrap()).unwrap(), vec![Boundary::OtherLeft]),
        (f64s.matmul(&f64s).unwrap().exp().unwrap(), vec![Boundary::Kernel("matmul")]),
        (
            (product().broadcast_as((3, 8, 8)).unwrap() + leaf(&[3, 8, 8])).unwrap(),
            vec![Boundary::View("broadcast_as")],
        ),
    ];
    for (t, want) in &cases {
        let plan = plan_of(&[t]);
        let found: Vec<Boundary> = plan.steps.iter().flat_map(|s| s.boundaries.iter().map(|(_, why)| *why)).collect();
        for why in want {
            assert!(found.contains(why), "{why:?} is missing: {found:?}\n{plan}");
            assert!(plan.to_string().contains(&why.to_string()), "{plan}");
        }
        // every value that one step makes and another reads has its reason, and leaves have none
        let made: Vec<u32> = plan.steps.iter().flat_map(|s| s.outputs.iter().map(|o| o.slot)).collect();
        for (i, step) in plan.steps.iter().enumerate().filter(|(_, s)| !matches!(s.kind, StepKind::View(_))) {
            let named: std::collections::BTreeSet<u32> = step.boundaries.iter().map(|(slot, _)| *slot).collect();
            assert_eq!(named.len(), step.boundaries.len(), "a reason is given once:\n{plan}");
            for slot in &step.inputs {
                let writer = plan.steps[..i].iter().rev().any(|s| s.outputs.iter().any(|o| o.slot == *slot));
                let leaf = plan.leaves.contains(&Some(*slot)) && !made.contains(slot);
                assert!(leaf || !writer || step.boundaries.iter().any(|(s, _)| s == slot), "step {i}:\n{plan}");
            }
        }
    }
    let options = EvalOptions { fuse: false, ..EvalOptions::default() };
    assert!(explain(&[&(x.exp().unwrap() + 1.0).unwrap()], &options).unwrap().contains(&Boundary::Off.to_string()));
}
