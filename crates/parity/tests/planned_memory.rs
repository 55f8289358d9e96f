//! The memory that a run takes is at most what was planned before it: by a counting allocator, and by what the system says the process
//! had at most.
//!
//! In a binary of its own, with one test, because it counts every allocation of the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_exec::buffer::trim;
use candle_lazy_exec::run::peak_bytes;
use candle_lazy_exec::{eval_all_with, materialize, vjp, AttentionOptions, EvalOptions, LazyTensor};
use candle_lazy_ops::kernels::with_threads;
use candle_lazy_parity::alloc::{Count, CountingAlloc};
use std::sync::Arc;

#[global_allocator]
static ALLOC: CountingAlloc = CountingAlloc;

const CPU: &Device = &Device::Cpu;

type Graph = Box<dyn Fn() -> Vec<LazyTensor>>;

fn eager(dims: &[usize], dtype: DType) -> Tensor {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i * 37) % 113) as f32 / 57.0 - 1.0).collect();
    Tensor::from_vec(values, dims, CPU).unwrap().to_dtype(dtype).unwrap()
}

fn leaf(dims: &[usize], dtype: DType) -> LazyTensor {
    LazyTensor::from(eager(dims, dtype))
}

fn f32s(dims: &[usize]) -> LazyTensor {
    leaf(dims, DType::F32)
}

/// A layer of a transformer on `(b, s, 256)` with 4 heads, of which `kv` have keys.
fn layer(dtype: DType, b: usize, s: usize, kv: usize) -> Graph {
    let (x, wq) = (leaf(&[b, s, 256], dtype), leaf(&[256, 256], dtype));
    let (wk, up, down) = (leaf(&[kv * 64, 256], dtype), leaf(&[1024, 256], dtype), leaf(&[256, 1024], dtype));
    let (bias, norm) = (leaf(&[1024], dtype), leaf(&[256], dtype));
    Box::new(move || {
        let heads = |t: LazyTensor, h: usize| t.reshape((b, s, h, 64)).unwrap().transpose(1, 2).unwrap();
        let n = x.rms_norm(Some(&norm), 1e-5).unwrap();
        let q = heads(n.linear(&wq, None).unwrap(), 4);
        let (k, v) = (heads(n.linear(&wk, None).unwrap(), kv), heads(n.linear(&wk, None).unwrap(), kv));
        let how = AttentionOptions::new(0.125).causal(true);
        let a = LazyTensor::attention(&q, &(k + 1.0).unwrap(), &v, None, &how).unwrap();
        let a = a.transpose(1, 2).unwrap().reshape((b, s, 256)).unwrap();
        let x = (&x + a.linear(&wq, None).unwrap()).unwrap();
        let h = x.rms_norm(Some(&norm), 1e-5).unwrap().linear(&up, Some(&bias)).unwrap().gelu().unwrap();
        vec![(x + h.linear(&down, None).unwrap()).unwrap()]
    })
}

fn products() -> Vec<(String, Graph)> {
    let mut graphs: Vec<(String, Graph)> = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        let (x, w) = (leaf(&[700, 700], dtype), leaf(&[2, 700, 300], dtype));
        let name = |what: &str| format!("{what} {}", dtype.as_str());
        let (a, b) = (x.clone(), w.clone());
        graphs.push((name("matmul"), Box::new(move || vec![a.matmul(&a).unwrap().broadcast_matmul(&b).unwrap()])));
        let (a, b) = (x.clone(), w.clone());
        let turned = move || vec![a.t().unwrap().broadcast_matmul(&b.narrow(2, 3, 200).unwrap()).unwrap()];
        graphs.push((name("turned matmul"), Box::new(turned)));
        for (rows, rank) in [(1usize, 8usize), (900, 8), (900, 6), (900, 100)] {
            let (x, a, b) = (leaf(&[rows, 700], dtype), leaf(&[700, rank], dtype), leaf(&[rank, 500], dtype));
            let base = leaf(&[rows, 500], dtype);
            let lora = move || {
                let plain = x.lora(&a, &b, 0.5).unwrap();
                let sum = x.lora_add(&base, &a, &b, 0.5).unwrap();
                let turned = x.lora(&a, &b.t().unwrap().contiguous().unwrap().t().unwrap(), 0.5).unwrap();
                vec![(plain + (sum * turned).unwrap()).unwrap()]
            };
            graphs.push((name(&format!("lora of {rows} rows, rank {rank}")), Box::new(lora)));
        }
        graphs.push((name("layer"), layer(dtype, 2, 200, 2)));
        // heads with and without epilogues; a last block of fewer rows than the first; short rows and rows without elements
        for (rows, k, n) in
            [(1usize, 700usize, 900usize), (5, 700, 900), (1025, 128, 200), (8192, 16, 256), (20_000, 0, 64)]
        {
            let x = leaf(&[rows, k], dtype);
            let ws: Vec<LazyTensor> = (0..4).map(|_| leaf(&[n, k], dtype)).collect();
            let (bias, turned) = (leaf(&[n], dtype), leaf(&[n, rows], dtype));
            let heads = move || {
                let p: Vec<LazyTensor> = ws.iter().map(|w| x.linear(w, None).unwrap()).collect();
                let gate = p[0].silu_mul(&p[1].broadcast_add(&bias).unwrap()).unwrap();
                let more = (&gate + &turned.t().unwrap()).unwrap();
                let wide = gate.to_dtype(DType::F32).unwrap();
                vec![gate, more, wide, p[2].clone(), p[3].t().unwrap()]
            };
            graphs.push((name(&format!("heads of {rows} rows of {k}")), Box::new(heads)));
        }
        // few queries, many keys: segments are tasks of their own
        let (q, k) = (leaf(&[1, 8, 3, 64], dtype), leaf(&[1, 2, 9000, 64], dtype));
        let how = AttentionOptions::new(0.125);
        let long = move || {
            let k = k.tanh().unwrap();
            vec![LazyTensor::attention(&q, &k, &k, None, &how).unwrap()]
        };
        graphs.push((name("long attention"), Box::new(long)));
        for (queries, cap) in [(500usize, None), (40, Some(5.0))] {
            let (q, k) = (leaf(&[1, 4, queries, 64], dtype), leaf(&[1, 2, 1500, 64], dtype));
            let how = AttentionOptions { softcap: cap, ..AttentionOptions::new(0.125).causal(true) };
            let gradients = move || {
                let (q, k) = (q.variable().unwrap(), k.variable().unwrap());
                let y = LazyTensor::attention(&q, &k, &k, None, &how).unwrap();
                let g = (&y * 0.5).unwrap();
                vjp(&[&y], &[&g], &[&q, &k]).unwrap().into_iter().flatten().collect()
            };
            graphs.push((name(&format!("gradients of attention, {queries} queries")), Box::new(gradients)));
        }
        let (x, cos) = (leaf(&[2, 300, 8, 64], dtype), leaf(&[300, 32], dtype));
        let rope = move || vec![x.transpose(1, 2).unwrap().rope(&cos, &cos).unwrap()];
        graphs.push((name("rope"), Box::new(rope)));
        let ids = LazyTensor::from(Tensor::from_vec((0..500u32).map(|i| i * 7 % 400).collect(), 500, CPU).unwrap());
        let (x, src) = (leaf(&[400, 600], dtype), leaf(&[500, 600], dtype));
        let index = move || {
            let wide = ids.reshape((500, 1)).unwrap().broadcast_as((500, 600)).unwrap();
            let sum = x.index_add(&ids, &src, 0).unwrap();
            let all = sum.scatter_add(&wide.contiguous().unwrap(), &src, 0).unwrap();
            vec![all.gather(&wide.contiguous().unwrap(), 0).unwrap().index_select(&ids, 0).unwrap()]
        };
        graphs.push((name("indices"), Box::new(index)));
        let x = leaf(&[40, 70, 300], dtype);
        let rows = move || {
            let y = x.softmax(1).unwrap().log_softmax(2).unwrap().layer_norm(None, None, 1e-5).unwrap();
            let z = y.transpose(0, 2).unwrap().exp().unwrap().sum_keepdim(1).unwrap();
            vec![y.broadcast_sub(&z.transpose(0, 2).unwrap()).unwrap().var_keepdim(1).unwrap(), y]
        };
        graphs.push((name("rows"), Box::new(rows)));
    }
    graphs
}

fn graphs() -> Vec<(String, Graph)> {
    let mut graphs = products();
    graphs.extend(of_the_engine());
    let mut add = |name: &str, graph: Graph| graphs.push((name.into(), graph));
    let x = f32s(&[1000, 1000]);
    let y = x.clone();
    add("chain", Box::new(move || vec![((&y + 1.0).unwrap().gelu().unwrap() * &y).unwrap()]));
    let y = x.clone();
    add(
        "results that shrink and grow",
        Box::new(move || {
            let mut t = y.clone();
            for part in [900, 500, 700, 100, 800] {
                t = t.narrow(0, 0, part.min(t.dims()[0])).unwrap().contiguous().unwrap().cumsum(0).unwrap();
                t = LazyTensor::cat(&[&t, &t], 0).unwrap();
            }
            vec![t]
        }),
    );
    let y = x.clone();
    add(
        "views, shared and twice",
        Box::new(move || {
            let a = y.exp().unwrap();
            let turned = a.t().unwrap().reshape(1_000_000).unwrap();
            let part = a.narrow(1, 3, 900).unwrap();
            vec![a.clone(), part, turned, a.reshape((100, 10_000)).unwrap(), a]
        }),
    );
    let y = x.clone();
    add(
        "slices written",
        Box::new(move || {
            let target = y.exp().unwrap();
            let once = target.slice_set_owned(&y.narrow(0, 0, 10).unwrap(), 0, 5).unwrap();
            let copied = once.slice_scatter(&y.narrow(0, 0, 10).unwrap(), 0, 50).unwrap();
            let leaf = y.slice_scatter(&y.narrow(0, 0, 3).unwrap(), 0, 7).unwrap();
            vec![(once + copied).unwrap(), leaf]
        }),
    );
    add(
        "made from nothing",
        Box::new(move || {
            let mask =
                LazyTensor::causal_mask(1000, 1000, None, DType::F16, CPU).unwrap().to_dtype(DType::F32).unwrap();
            let range = LazyTensor::arange_recorded(0.0, 1.0, 1_000_000, DType::F32, CPU).unwrap();
            vec![(mask + range.reshape((1000, 1000)).unwrap()).unwrap()]
        }),
    );
    let var = Var::from_tensor(&eager(&[600, 600], DType::F32)).unwrap();
    add(
        "tracked",
        Box::new(move || {
            let w = LazyTensor::from(var.as_tensor().clone());
            vec![w.matmul(&w).unwrap().exp().unwrap().t().unwrap().sum(0).unwrap()]
        }),
    );
    let weight = Arc::new(QTensor::quantize(&eager(&[512, 256], DType::F32), GgmlDType::Q8_0).unwrap());
    let y = f32s(&[2, 300, 256]);
    add("quantised", Box::new(move || vec![y.tanh().unwrap().qmatmul(&weight).unwrap().exp().unwrap()]));
    let ids = LazyTensor::from(eager(&[700, 700], DType::I64));
    add("integers", Box::new(move || vec![ids.t().unwrap().add(&ids).unwrap().mul(&ids).unwrap()]));
    let (y, targets) = (x, LazyTensor::from(Tensor::from_vec(vec![3u32; 1000], 1000, CPU).unwrap()));
    add(
        "losses",
        Box::new(move || {
            let image = y.reshape((10, 100, 1000)).unwrap().group_norm(4, None, None, 1e-5).unwrap();
            vec![image.reshape((1000, 1000)).unwrap().cross_entropy(&targets).unwrap()]
        }),
    );
    graphs
}

/// Graphs over values that the engine holds, of which some may be written in place, some look as if they might, and some are views.
fn of_the_engine() -> Vec<(String, Graph)> {
    let mut graphs: Vec<(String, Graph)> = Vec::new();
    let mut add = |name: &str, graph: Graph| graphs.push((name.into(), graph));
    let x = f32s(&[800, 1000]);
    let held = move || {
        let a = x.exp().unwrap();
        materialize(&[&a]).unwrap();
        a
    };
    let make = held.clone();
    let part = f32s(&[10, 1000]);
    let src = part.clone();
    add("a value given away", Box::new(move || vec![make().slice_set_owned(&src, 0, 3).unwrap()]));
    let (make, src) = (held, part.clone());
    add(
        "a value that a view shares",
        Box::new(move || {
            let a = make();
            let v = a.narrow(0, 0, 700).unwrap();
            materialize(&[&v]).unwrap();
            // `v` stays: it is a root
            vec![a.slice_set_owned(&src, 0, 3).unwrap(), (v + 1.0).unwrap()]
        }),
    );
    let src = part.clone();
    let y = f32s(&[800, 1000]);
    add(
        "a view given away",
        Box::new(move || {
            let v = y.exp().unwrap().narrow(0, 0, 700).unwrap();
            materialize(&[&v]).unwrap();
            vec![v.slice_set_owned(&src, 0, 3).unwrap()]
        }),
    );
    let (y, src) = (f32s(&[800, 1000]), part);
    add(
        "two nodes with one value",
        Box::new(move || {
            let (a, b) = (y.exp().unwrap(), y.exp().unwrap());
            materialize(&[&a, &b]).unwrap();
            vec![a.slice_set_owned(&src, 0, 3).unwrap(), b.neg().unwrap()]
        }),
    );
    let (x, w, bias) = (f32s(&[900, 600]), f32s(&[700, 600]), f32s(&[700]));
    let v = f32s(&[900, 16]);
    add(
        "a product that is turned for the next",
        Box::new(move || {
            let h = x.linear(&w, Some(&bias)).unwrap();
            vec![h.t().unwrap().matmul(&v).unwrap()]
        }),
    );
    graphs
}

/// Graphs that were planned and run on one thread before.
fn with_one_thread_first() -> Vec<(String, Graph)> {
    // rows so long that what a thread packs is not kept
    let (x, w) = (f32s(&[16, 40_000]), f32s(&[128, 40_000]));
    let graph = move || vec![x.linear(&w, None).unwrap().gelu().unwrap()];
    let alone = graph.clone();
    with_threads(1, move || {
        let roots = alone();
        eval_all_with(&[&roots[0]], &EvalOptions { validate: false, ..EvalOptions::default() }).unwrap();
    });
    vec![("one thread first".into(), Box::new(graph))]
}

/// A number of KiB of `/proc/self/status`, in bytes.
fn status(what: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with(what))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[test]
fn no_run_takes_more_than_was_planned() {
    let count = Count::begin();
    assert!(count.is_counting());
    let (mut tight, mut all) = (0, 0);
    // what one thread needs is less than what all do, and is not taken for it
    for (name, graph) in graphs().into_iter().chain(with_one_thread_first()) {
        // with a new plan and threads without memory, as it goes on, and with products that add their bias themselves
        for (time, skipped) in [(0, None), (1, None), (2, Some("split_bias"))] {
            let skip_passes = skipped.into_iter().collect();
            let options = EvalOptions { validate: false, skip_passes, ..EvalOptions::default() };
            let roots = graph();
            let roots: Vec<&LazyTensor> = roots.iter().collect();
            let planned = peak_bytes(&roots, &options).unwrap();
            trim();
            // 5: forget the high-water mark
            let told = std::fs::write("/proc/self/clear_refs", "5").is_ok();
            let resident = status("VmRSS:");
            count.reset();
            let (values, report) = eval_all_with(&roots, &options).unwrap();
            let measured = count.peak_bytes() as u64;
            // what plans and nodes are made of
            let own = (64 << 10) + 1024 * report.nodes as u64;
            assert_eq!(report.peak_bytes, planned, "{name}: what is planned does not change");
            assert!(measured <= planned + own, "{name}, time {time}: {measured} bytes taken, {planned} planned");
            if let (true, Some(resident), Some(most)) = (told, resident, status("VmHWM:")) {
                // pages are whole, and the allocator keeps some for itself
                let grown = most.saturating_sub(resident);
                assert!(
                    grown <= planned + own + (4 << 20),
                    "{name}, time {time}: {grown} more resident, {planned} planned"
                );
            }
            all += 1;
            tight += usize::from(planned as f64 <= 1.5 * measured as f64);
            println!("{name}: {measured} of {planned}");
            drop(values);
        }
    }
    assert!(2 * tight > all, "a bound that few come near bounds little: {tight} of {all} within half as much again");
}
