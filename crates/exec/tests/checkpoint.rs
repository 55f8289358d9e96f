//! Checkpointed functions: the same bits, from less memory.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_exec::run::peak_bytes;
use candle_lazy_exec::{
    checkpoint, compile, eval_all, eval_all_checked, eval_all_with, eval_all_with_report, grad, vjp, EvalOptions,
    LazyTensor, RandomKey, Result,
};
use std::cell::{Cell, RefCell};

const CPU: Device = Device::Cpu;

fn randn(dims: &[usize]) -> Tensor {
    (Tensor::randn(0f32, 1.0, dims, &CPU).unwrap() * 0.3).unwrap()
}

fn bits(t: &Tensor) -> Vec<u64> {
    let flat = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
}

fn all_bits(tensors: &[LazyTensor]) -> Vec<Vec<u64>> {
    eval_all(&tensors.iter().collect::<Vec<_>>()).unwrap().iter().map(bits).collect()
}

/// How a function is called: as it is, or checkpointed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    Plain,
    Checkpointed,
}

use How::{Checkpointed, Plain};

fn call<F>(how: How, f: F, args: &[&LazyTensor]) -> LazyTensor
where
    F: Fn(&[LazyTensor]) -> Result<LazyTensor>,
{
    match how {
        Plain => f(&args.iter().map(|x| (*x).clone()).collect::<Vec<_>>()).unwrap(),
        Checkpointed => checkpoint(f).call(args).unwrap(),
    }
}

/// A residual block with a norm, a branch that meets itself, dropout, a cut, and a weight that comes from outside.
fn block(x: &LazyTensor, w: &LazyTensor, scale: &LazyTensor, layer: u64) -> Result<LazyTensor> {
    let n = x.rms_norm(Some(scale), 1e-5)?;
    let h = n.matmul(w)?;
    let gate = h.silu()?.mul(&h)?;
    let mixed = gate.matmul(&w.t()?)?.dropout(0.25, RandomKey::new(7).fold_in(layer))?;
    let level = mixed.abs()?.max_keepdim(1)?.detach();
    x.add(&mixed.broadcast_div(&(level + 1.0)?)?)
}

struct Net {
    x: LazyTensor,
    ws: Vec<LazyTensor>,
    scale: LazyTensor,
}

impl Net {
    fn new(layers: usize, dims: [usize; 3]) -> Self {
        let [rows, width, inner] = dims;
        let variable = |t: Tensor| LazyTensor::from(t).variable().unwrap();
        Self {
            x: variable(randn(&[rows, width])),
            ws: (0..layers).map(|_| variable(randn(&[width, inner]))).collect(),
            scale: variable(randn(&[width])),
        }
    }

    fn wrt(&self) -> Vec<&LazyTensor> {
        self.ws.iter().chain([&self.x, &self.scale]).collect()
    }

    /// Blocks of two layers, each a checkpoint of `outer`, its layers of `inner`.
    fn loss(&self, outer: How, inner: How) -> LazyTensor {
        let mut x = self.x.clone();
        for (i, ws) in self.ws.chunks(2).enumerate() {
            let pair = |args: &[LazyTensor]| -> Result<LazyTensor> {
                let mut y = args[0].clone();
                for (j, w) in ws.iter().enumerate() {
                    let one = |args: &[LazyTensor]| block(&args[0], w, &self.scale, (2 * i + j) as u64);
                    y = call(inner, one, &[&y]);
                }
                Ok(y)
            };
            x = call(outer, pair, &[&x]);
        }
        x.sqr().unwrap().mean_all().unwrap()
    }
}

#[test]
fn results_and_gradients_have_the_same_bits() {
    let net = Net::new(5, [6, 8, 12]);
    let run = |outer, inner| {
        let loss = net.loss(outer, inner);
        let mut all = vec![loss.clone()];
        all.extend(grad(&loss, &net.wrt()).unwrap());
        drop(loss);
        all_bits(&all)
    };
    let want = run(Plain, Plain);
    assert!(want.iter().flatten().any(|&b| b != 0));
    for (outer, inner) in [(Checkpointed, Plain), (Plain, Checkpointed), (Checkpointed, Checkpointed)] {
        assert!(run(outer, inner) == want, "{outer:?} {inner:?}");
    }
}

#[test]
fn so_they_do_without_passes_in_parts_and_op_by_op() {
    let net = Net::new(3, [4, 6, 5]);
    let run = |how, options: &EvalOptions| {
        let loss = net.loss(how, how);
        let gradients = grad(&loss, &net.wrt()).unwrap();
        let roots: Vec<&LazyTensor> = std::iter::once(&loss).chain(&gradients).collect();
        eval_all_with(&roots, options).unwrap().0.iter().map(bits).collect::<Vec<_>>()
    };
    let options = [
        EvalOptions::no_passes(),
        EvalOptions { decompose: true, ..EvalOptions::default() },
        EvalOptions { replay: true, ..EvalOptions::default() },
        EvalOptions { validate: true, cache: false, ..EvalOptions::default() },
    ];
    for options in &options {
        assert!(run(Checkpointed, options) == run(Plain, options), "{options:?}");
    }
}

#[test]
fn gradients_of_gradients_have_the_same_bits_too() {
    let net = Net::new(3, [4, 6, 5]);
    let run = |outer, inner| {
        let loss = net.loss(outer, inner);
        let first = grad(&loss, &net.wrt()).unwrap();
        let mut size = first[0].sqr().unwrap().sum_all().unwrap();
        for g in &first[1..] {
            size = size.add(&g.sqr().unwrap().sum_all().unwrap()).unwrap();
        }
        let second = grad(&size, &net.wrt()).unwrap();
        drop((loss, first));
        all_bits(&second)
    };
    let want = run(Plain, Plain);
    assert!(run(Checkpointed, Plain) == want);
    assert!(run(Plain, Checkpointed) == want);
    assert!(run(Checkpointed, Checkpointed) == want);
}

#[test]
fn it_does_not_matter_what_was_evaluated_before() {
    let net = Net::new(4, [5, 6, 7]);
    let together = {
        let loss = net.loss(Plain, Plain);
        all_bits(&grad(&loss, &net.wrt()).unwrap())
    };
    let kept = RefCell::new(Vec::new());
    let mut x = net.x.clone();
    for (i, w) in net.ws.iter().enumerate() {
        let f = |args: &[LazyTensor]| -> Result<LazyTensor> {
            let y = block(&args[0], w, &net.scale, i as u64)?;
            // looked at while it is recorded
            y.eval()?;
            kept.borrow_mut().push(y.clone());
            Ok(y)
        };
        x = checkpoint(f).call(&[&x]).unwrap();
    }
    let loss = x.sqr().unwrap().mean_all().unwrap();
    loss.eval().unwrap();
    assert!(all_bits(&grad(&loss, &net.wrt()).unwrap()) == together);
}

#[test]
fn several_arguments_and_results_and_what_is_used_outside_as_well() {
    let variable = |dims: &[usize]| LazyTensor::from(randn(dims)).variable().unwrap();
    let (a, b, w) = (variable(&[4, 3]), variable(&[4, 3]), variable(&[3, 3]));
    let run = |how: How| {
        let leaked = RefCell::new(None);
        let f = |x: &[LazyTensor]| -> Result<(LazyTensor, Vec<LazyTensor>, Option<LazyTensor>)> {
            let h = x[0].matmul(&w)?.tanh()?;
            let k = (&h * &x[1])?;
            *leaked.borrow_mut() = Some(k.clone());
            // a result that reads another one, one that no gradient passes, and an argument
            Ok((h.softmax(1)?, vec![k.exp()?, h.ge(0.0)?, x[1].clone()], Some(h)))
        };
        let (p, many, h) = match how {
            Plain => f(&[a.clone(), b.clone()]).unwrap(),
            Checkpointed => checkpoint(f).call(&[&a, &b]).unwrap(),
        };
        // an early result and a late one, and a value that is no result
        let early = p.log().unwrap().sum_all().unwrap();
        let late = (&many[0] * h.unwrap()).unwrap().cos().unwrap().add(&many[2]).unwrap();
        let mask = many[1].to_dtype(DType::F32).unwrap();
        let used = leaked.take().unwrap().sin().unwrap();
        let sum = late.mul(&mask).unwrap().add(&used).unwrap().sum_all().unwrap();
        let loss = early.add(&sum).unwrap();
        let mut all = grad(&loss, &[&a, &b, &w]).unwrap();
        all.push(loss);
        all_bits(&all)
    };
    assert!(run(Checkpointed) == run(Plain));
}

#[test]
fn variables_made_inside_and_gradients_taken_inside() {
    let x = LazyTensor::from(randn(&[5])).variable().unwrap();
    let run = |how| {
        let f = |args: &[LazyTensor]| -> Result<LazyTensor> {
            let inner = args[0].sin()?.variable()?;
            let slope = grad(&inner.sqr()?.mul(&args[0])?.sum_all()?, &[&inner])?.remove(0);
            slope.tanh()?.mul(&args[0])
        };
        let y = call(how, f, &[&x]);
        let z = call(how, f, &[&y]);
        all_bits(&grad(&z.sum_all().unwrap(), &[&x]).unwrap())
    };
    assert!(run(Checkpointed) == run(Plain));
}

#[test]
fn what_candle_tracks_gets_the_same_bits() {
    let (x, w) = (Var::from_tensor(&randn(&[4, 6])).unwrap(), Var::from_tensor(&randn(&[6, 5])).unwrap());
    let scale = Var::from_tensor(&randn(&[6])).unwrap();
    let run = |how| {
        let [x, w, scale] = [&x, &w, &scale].map(|v| LazyTensor::from(v.as_tensor()));
        let f = |args: &[LazyTensor]| block(&args[0], &w, &scale, 1);
        let y = call(how, f, &[&call(how, f, &[&x])]);
        y.sqr().unwrap().sum_all().unwrap().eval().unwrap()
    };
    let (plain, checkpointed) = (run(Plain), run(Checkpointed));
    assert_eq!(bits(&plain), bits(&checkpointed));
    let (want, got) = (plain.backward().unwrap(), checkpointed.backward().unwrap());
    for var in [&x, &w, &scale] {
        assert_eq!(bits(got.get(var.as_tensor()).unwrap()), bits(want.get(var.as_tensor()).unwrap()));
    }
}

#[test]
fn the_inner_values_are_not_kept_and_are_computed_again() {
    let need = |layers: usize, outer, inner| {
        let net = Net::new(layers, [1024, 32, 128]);
        let loss = net.loss(outer, inner);
        // not of what all layers share: its parts are summed up in one program, for which their operands wait
        let gradients = grad(&loss, &net.ws.iter().collect::<Vec<_>>()).unwrap();
        let roots: Vec<LazyTensor> = std::iter::once(loss.detach()).chain(gradients).collect();
        drop(loss);
        peak_bytes(&roots.iter().collect::<Vec<_>>(), &EvalOptions::default()).unwrap()
    };
    let plain = need(24, Plain, Plain);
    let inner = need(24, Plain, Checkpointed);
    assert!(plain as f64 >= 2.0 * inner as f64, "{plain} bytes without, {inner} with checkpoints");
    // a deeper net costs what the blocks hand on, and their gradients, and no more
    let more = need(48, Plain, Checkpointed) - inner;
    let handed_on = 24 * (1024 * 32 + 2 * 32 * 128) * 4;
    assert!(more < 2 * handed_on, "{more} bytes for 24 more layers");
    // one pass of all layers alone, and one of each
    let runs = |how| {
        let net = Net::new(4, [8, 8, 8]);
        let loss = net.loss(Plain, how);
        let gradients = grad(&loss, &net.wrt()).unwrap();
        drop(loss);
        let report = eval_all_with_report(&gradients.iter().collect::<Vec<_>>()).unwrap().1;
        report.kernels.get("rand").copied().unwrap_or(0)
    };
    assert_eq!((runs(Plain), runs(Checkpointed)), (4, 8));
}

#[test]
fn a_weights_gradient_does_not_wait_for_the_rest() {
    // the gradients of all layers are wanted: none keeps what its layer recomputed until the pass is over
    let net = Net::new(32, [64, 16, 256]);
    let loss = net.loss(Plain, Checkpointed);
    let gradients = grad(&loss, &net.wrt()).unwrap();
    drop(loss);
    let all = peak_bytes(&gradients.iter().collect::<Vec<_>>(), &EvalOptions::default()).unwrap();
    let one = peak_bytes(&[&gradients[0]], &EvalOptions::default()).unwrap();
    let results = 32 * 16 * 256 * 4 * 2;
    assert!(all < one + results, "{all} bytes for all gradients, {one} for one");
}

#[test]
fn no_gradient_no_trace() {
    let (x, w) = (LazyTensor::from(randn(&[3, 3])), LazyTensor::from(randn(&[3, 3])));
    let calls = Cell::new(0);
    let f = checkpoint(|x: &[LazyTensor]| -> Result<LazyTensor> {
        calls.set(calls.get() + 1);
        x[0].matmul(&w)?.relu()
    });
    let y = f.call(&[&x]).unwrap();
    assert_eq!(calls.get(), 1);
    assert_eq!(y.node().recorded().unwrap().0.name(), "relu");
    let y = f.call(&[&x.variable().unwrap()]).unwrap();
    assert_eq!((calls.get(), y.node().recorded().unwrap().0.name()), (2, "checkpoint"));
    // an argument handed back is no result of the region
    let same = checkpoint(|x: &[LazyTensor]| -> Result<LazyTensor> { Ok(x[0].clone()) });
    assert_eq!(same.call(&[&y]).unwrap().node().id(), y.node().id());
}

#[test]
fn errors_of_the_function_and_of_the_gradient_are_those_without_it() {
    let x = LazyTensor::from(randn(&[3, 4])).variable().unwrap();
    let fails = checkpoint(|x: &[LazyTensor]| -> Result<LazyTensor> { x[0].matmul(&x[0]) });
    assert!(fails.call(&[&x]).unwrap_err().to_string().contains("matmul"));
    let other = LazyTensor::from(randn(&[4])).variable().unwrap();
    let line = line!() + 1;
    let cuts = checkpoint(|x: &[LazyTensor]| -> Result<LazyTensor> { x[0].broadcast_mul(&x[1].detach()) });
    let loss = cuts.call(&[&x, &other]).unwrap().sum_all().unwrap();
    let error = grad(&loss, &[&x, &other]).unwrap_err().to_string();
    assert!(error.contains("detach") && error.contains(&format!("checkpoint.rs:{line}:")), "{error}");
    let seed = LazyTensor::from(Tensor::new(1f32, &CPU).unwrap());
    let found = vjp(&[&loss], &[&seed], &[&x, &other]).unwrap();
    assert!(found[0].is_some() && found[1].is_none());
}

#[test]
fn compiled_and_checked_graphs_may_hold_checkpoints() {
    let w = LazyTensor::from(randn(&[4, 4]));
    let step = |how: How| {
        let w = w.clone();
        compile(move |x: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
            let v = x[0].variable()?;
            let f = |args: &[LazyTensor]| args[0].matmul(&w)?.gelu()?.add(&args[0]);
            let y = call(how, f, &[&call(how, f, &[&v])]);
            let loss = y.sqr()?.sum_all()?;
            let g = grad(&loss, &[&v])?.remove(0);
            Ok(vec![loss, g])
        })
    };
    let (plain, checkpointed) = (step(Plain), step(Checkpointed));
    for _ in 0..3 {
        let x = LazyTensor::from(randn(&[2, 4]));
        let (want, got) = (plain.call(&[&x]).unwrap(), checkpointed.call(&[&x]).unwrap());
        assert!(all_bits(&want) == all_bits(&got));
    }
    let net = Net::new(2, [3, 4, 5]);
    let gradients = grad(&net.loss(Checkpointed, Checkpointed), &net.wrt()).unwrap();
    eval_all_checked(&gradients.iter().collect::<Vec<_>>()).unwrap();
}

#[test]
fn a_long_chain_needs_no_stack() {
    let run = || {
        let x = LazyTensor::from(Tensor::new(&[0.5f64], &CPU).unwrap()).variable().unwrap();
        let f = checkpoint(|x: &[LazyTensor]| -> Result<LazyTensor> { x[0].sin()?.affine(1.0, 0.25) });
        let mut y = x.clone();
        for _ in 0..3000 {
            y = f.call(&[&y]).unwrap();
        }
        let g = grad(&y.sum_all().unwrap(), &[&x]).unwrap().remove(0);
        drop(y);
        assert!(g.to_vec1::<f64>().unwrap()[0].is_finite());
    };
    std::thread::Builder::new().stack_size(512 * 1024).spawn(run).unwrap().join().unwrap();
}
