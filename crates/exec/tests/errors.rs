//! Whatever can be recorded wrongly is refused where it is written: op, shapes, dtypes, a hint, this file and line.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used, clippy::panic)]

use candle_core::{DType, Device, Shape, Tensor, D};
use candle_lazy_exec::{AttentionOptions, Error, LazyTensor, LoraSegment, Result};
use std::collections::BTreeSet;

const CPU: Device = Device::Cpu;

fn of(dims: &[usize], dtype: DType) -> LazyTensor {
    LazyTensor::from(Tensor::zeros(dims, dtype, &CPU).unwrap())
}

fn f(dims: &[usize]) -> LazyTensor {
    of(dims, DType::F32)
}

/// What was refused so far: every name of an op that an error named, and the line of the last one.
#[derive(Default)]
struct Seen(BTreeSet<String>, u32);

impl Seen {
    /// The call between these lines failed, and its error says all that it should.
    fn refused<T>(&mut self, from: u32, to: u32, result: Result<T>, op: &str, parts: &[&str]) {
        let Err(error) = result else {
            panic!("line {from}: {op} was not refused");
        };
        assert!(matches!(error, Error::Record(_)), "line {from}: {error:?}");
        let text = error.to_string();
        assert!(text.starts_with(op), "line {from}: {text} does not begin with {op}");
        for part in parts {
            assert!(text.contains(part), "line {from}: {text} lacks {part}");
        }
        let site = error.site().map(|s| (s.location().file(), s.location().line()));
        let Some((file, line)) = site else {
            panic!("line {from}: {text} names no line");
        };
        assert!(file.ends_with("tests/errors.rs"), "line {from}: {file}");
        assert!((from..=to).contains(&line), "line {from}: the error names line {line}: {text}");
        // one call per line, in the order of the table
        assert!(line > self.1, "line {line} after {}: {text}", self.1);
        self.1 = line;
        self.0.insert(op.to_string());
    }
}

/// `op; parts: call` for every wrong call.
macro_rules! refused {
    ($seen:expr; $($op:literal, [$($part:literal),*]: $call:expr;)*) => {
        $({
            let from = line!();
            let result = $call;
            // `line!()` is that of the whole table, the call's own lies below it
            $seen.refused(from, from + 70, result, $op, &[$($part),*]);
        })*
    };
}

#[test]
fn elementwise_ops_refuse_dtypes_and_shapes() {
    let (a, b, i) = (f(&[2, 3]), f(&[4]), of(&[2, 3], DType::U32));
    let (h, short) = (of(&[2, 3], DType::F16), of(&[2, 3], DType::I16));
    let seen = &mut Seen::default();
    refused! { seen;
        "neg", ["u32 [2, 3]", ".to_dtype(DType::F32)"]: i.neg();
        "abs", ["i16 [2, 3]"]: short.abs();
        "recip", ["u32 [2, 3]"]: i.recip();
        "sqr", ["u32 [2, 3]"]: i.sqr();
        "sqrt", ["u32 [2, 3]"]: i.sqrt();
        "rsqrt", ["u32 [2, 3]"]: i.rsqrt();
        "exp", ["u32 [2, 3]"]: i.exp();
        "log", ["u32 [2, 3]"]: i.log();
        "sin", ["u32 [2, 3]"]: i.sin();
        "cos", ["u32 [2, 3]"]: i.cos();
        "tanh", ["u32 [2, 3]"]: i.tanh();
        "erf", ["u32 [2, 3]"]: i.erf();
        "gelu", ["u32 [2, 3]"]: i.gelu();
        "gelu_erf", ["u32 [2, 3]"]: i.gelu_erf();
        "relu", ["i16 [2, 3]"]: short.relu();
        "silu", ["u32 [2, 3]"]: i.silu();
        "sigmoid", ["u32 [2, 3]"]: i.sigmoid();
        "floor", ["i16 [2, 3]"]: short.floor();
        "ceil", ["i16 [2, 3]"]: short.ceil();
        "round", ["i16 [2, 3]"]: short.round();
        "sign", ["i16 [2, 3]"]: short.sign();
        "powf", ["u32 [2, 3]"]: i.powf(2.0);
        "add", ["f32 [2, 3], f32 [4]", "broadcast_add"]: a.add(&b);
        "sub", ["[2, 3]", "broadcast_sub"]: a.sub(&b);
        "mul", ["[2, 3]", "broadcast_mul"]: a.mul(&b);
        "div", ["[2, 3]", "broadcast_div"]: a.div(&b);
        "maximum", ["[2, 3]", "broadcast_maximum"]: a.maximum(&b);
        "minimum", ["[2, 3]", "broadcast_minimum"]: a.minimum(&b);
        "eq", ["[2, 3]", "broadcast_eq"]: a.eq(&b);
        "ne", ["[2, 3]", "broadcast_ne"]: a.ne(&b);
        "lt", ["[2, 3]", "broadcast_lt"]: a.lt(&b);
        "le", ["[2, 3]", "broadcast_le"]: a.le(&b);
        "gt", ["[2, 3]", "broadcast_gt"]: a.gt(&b);
        "ge", ["[2, 3]", "broadcast_ge"]: a.ge(&b);
        "add", ["f32 [2, 3], f16 [2, 3]", ".to_dtype(DType::F32)"]: a.add(&h);
        "add", ["f32 [2, 3], f32 [4]", "do not broadcast"]: a.broadcast_add(&b);
        "add", ["unsqueeze"]: a.broadcast_add(&f(&[2]));
        "sub", ["do not broadcast"]: a.broadcast_sub(&b);
        "mul", ["f16 [2, 3]"]: a.broadcast_mul(&h);
        "div", ["do not broadcast"]: a.broadcast_div(&b);
        "maximum", ["do not broadcast"]: a.broadcast_maximum(&b);
        "minimum", ["do not broadcast"]: a.broadcast_minimum(&b);
        "eq", ["do not broadcast"]: a.broadcast_eq(&b);
        "ne", ["do not broadcast"]: a.broadcast_ne(&b);
        "lt", ["do not broadcast"]: a.broadcast_lt(&b);
        "le", ["do not broadcast"]: a.broadcast_le(&b);
        "gt", ["f16"]: a.broadcast_gt(&h);
        "ge", ["do not broadcast"]: a.broadcast_ge(&b);
        "where_cond", ["f32 [2, 3]", ".ne(0.0)"]: a.where_cond(&a, &a);
        "where_cond", ["do not broadcast"]: i.where_cond(&a, &b);
        "to_dtype", ["i32"]: a.to_dtype(DType::I32);
        "affine", ["i32"]: of(&[2], DType::I32).affine(1.0, 2.0);
        "add", ["f32 [2, 3], f32 [4]"]: &a + &b;
        "sub", ["f32 [2, 3], f32 [4]"]: a.clone() - b.clone();
        "mul", ["f32 [2, 3], f32 [4]"]: &a * Ok::<_, Error>(b.clone());
        "div", ["f32 [2, 3], f32 [4]"]: Ok::<_, Error>(a.clone()) / &b;
        "recip", ["u32 [2, 3]"]: 1.0 / &i;
    }
    assert!(seen.0.len() >= 36, "{:?}", seen.0);
}

#[test]
fn the_line_is_exactly_the_calls() {
    let (a, b) = (f(&[2, 3]), f(&[4, 5]));
    let line = line!() + 1;
    let error = a.matmul(&b).map(|_| ()).unwrap_err();
    assert_eq!(error.site().map(|s| s.location().line()), Some(line));
    let line = line!() + 1;
    let error = (&a + &b).map(|_| ()).unwrap_err();
    assert_eq!(error.site().map(|s| s.location().line()), Some(line));
    let line = line!() + 1;
    let error = a.slice_assign(&[0..1, 1..2], &b).map(|_| ()).unwrap_err();
    assert_eq!(error.site().map(|s| s.location().line()), Some(line));
    let line = line!() + 1;
    let error = a.to_vec1::<f32>().map(|_| ()).unwrap_err();
    assert_eq!(error.site().map(|s| s.location().line()), Some(line));
    let line = line!() + 1;
    let error = LazyTensor::from_vec(vec![1f32], (2, 2), &CPU).map(|_| ()).unwrap_err();
    assert_eq!(error.site().map(|s| s.location().line()), Some(line));
}

#[test]
fn views_and_reductions_refuse_dims_and_shapes() {
    let (a, i) = (f(&[2, 3]), of(&[2, 3], DType::U32));
    let seen = &mut Seen::default();
    let huge = usize::MAX / 2;
    refused! { seen;
        "sum", ["f32 [2, 3]"]: a.sum(2);
        "sum", ["f32 [2, 3]"]: a.sum_keepdim((0, 0));
        "mean", ["f32 [2, 3]"]: a.mean(D::Minus(3));
        "mean", ["u32 [2, 3]", ".to_dtype"]: i.mean_keepdim(0);
        "mean", ["u32 [2, 3]"]: i.mean_all();
        "max", ["f32 [2, 3]"]: a.max(7);
        "max", ["empty", "f32 [0, 2]"]: f(&[0, 2]).max_keepdim(0);
        "min", ["f32 [2, 3]"]: a.min(7);
        "min", ["f32 [2, 3]"]: a.min_keepdim(7);
        "reshape", ["f32 [2, 3]"]: a.reshape((4, 2));
        "reshape", ["f32 [2, 3]"]: a.reshape(((), 4));
        "reshape", ["f32 [2, 3]"]: a.reshape(((), huge, 4));
        "reshape", ["f32 [2, 3]"]: a.reshape((huge, 4));
        "flatten", ["f32 [2, 3]"]: a.flatten(0, 5);
        "flatten_to", ["f32 [2, 3]"]: a.flatten_to(5);
        "flatten_from", ["f32 [2, 3]"]: a.flatten_from(5);
        "squeeze", ["f32 [2, 3]"]: a.squeeze(5);
        "unsqueeze", ["f32 [2, 3]"]: a.unsqueeze(5);
        "permute", ["f32 [2, 3]"]: a.permute((0, 2));
        "permute", ["f32 [2, 3]"]: a.permute((0, 0));
        "transpose", ["f32 [2, 3]"]: a.transpose(0, 2);
        "t", ["f32 [3]", "two dims"]: f(&[3]).t();
        "narrow", ["f32 [2, 3]"]: a.narrow(1, 2, 2);
        "narrow", ["f32 [2, 3]"]: a.narrow(1, usize::MAX, 2);
        "narrow", ["f32 [2, 3]"]: a.narrow(4, 0, 1);
        "get", ["f32 [2, 3]", "index 2"]: a.get(2);
        "get_on_dim", ["f32 [2, 3]"]: a.get_on_dim(1, 3);
        "chunk", ["f32 [2, 3]"]: a.chunk(0, 0);
        "chunk", ["f32 [2, 3]"]: a.chunk(2, 4);
        "broadcast_as", ["f32 [2, 3]", "[2, 4]"]: a.broadcast_as((2, 4));
        "broadcast_as", ["f32 [2, 3]"]: a.expand((3, 3));
        "broadcast_as", ["f32 [2, 3]", "memory"]: a.broadcast_left((huge, 4));
        "dim", ["f32 [2, 3]"]: a.dim(2);
        "dims1", ["f32 [2, 3]"]: a.dims1();
        "dims2", ["f32 [3]"]: f(&[3]).dims2();
        "dims3", ["f32 [2, 3]"]: a.dims3();
        "dims4", ["f32 [2, 3]"]: a.dims4();
        "dims5", ["f32 [2, 3]"]: a.dims5();
        "contiguous", ["8 dims"]: f(&[1; 9]).contiguous();
        "permute", ["8 dims"]: f(&[1; 9]).transpose(0, 8);
    }
    assert_eq!(a.chunk(usize::MAX, 0).unwrap().len(), 2, "as many chunks as there are");
}

#[test]
fn products_and_movement_refuse_what_does_not_fit() {
    let (a, ids) = (f(&[2, 3]), of(&[2], DType::U32));
    let none: [LazyTensor; 0] = [];
    let seen = &mut Seen::default();
    refused! { seen;
        "matmul", ["f32 [2, 3], f32 [2, 3]", "right side", ".t()"]: a.matmul(&a);
        "matmul", ["left side", ".t()"]: f(&[3, 2]).matmul(&f(&[3, 4]));
        "matmul", ["broadcast_matmul"]: f(&[2, 2, 3]).matmul(&f(&[3, 4]));
        "matmul", ["two dims", "unsqueeze"]: a.matmul(&f(&[3]));
        "matmul", ["u32 [2]"]: ids.matmul(&ids);
        "matmul", ["f32 [2, 3], f64 [3, 2]", ".to_dtype"]: a.matmul(&of(&[3, 2], DType::F64));
        "matmul", ["do not broadcast"]: f(&[2, 2, 3]).broadcast_matmul(&f(&[3, 3, 4]));
        "cat", ["no tensors"]: LazyTensor::cat(&none, 0);
        "cat", ["f32 [2, 3], f32 [2]"]: LazyTensor::cat(&[a.clone(), f(&[2])], 0);
        "cat", ["f32 [2, 3]"]: LazyTensor::cat(&[a.clone(), a.clone()], 2);
        "cat", ["f32 [2, 3], u32 [2]"]: LazyTensor::cat(&[a.clone(), ids.clone()], 0);
        "stack", ["no tensors"]: LazyTensor::stack(&none, 0);
        "stack", ["f32 [2, 3]"]: LazyTensor::stack(&[a.clone(), a.clone()], 3);
        "stack", ["f32 [2, 3], f32 [2]", "cat"]: LazyTensor::stack(&[a.clone(), f(&[2])], 0);
        "index_select", ["f32 [2, 3]"]: a.index_select(&ids, 2);
        "index_select", ["f32 [2, 3], f32 [2, 3]", ".to_dtype(DType::U32)"]: a.index_select(&a, 0);
        "index_select", ["one dim", "u32 [1, 2]"]: a.index_select(&of(&[1, 2], DType::U32), 0);
        "embedding", ["two dims", "f32 [3]"]: f(&[3]).embedding(&ids);
        "embedding", [".to_dtype(DType::U32)"]: a.embedding(&a);
        "slice_assign", ["f32 [2, 3], f32 [2, 4]"]: a.slice_scatter(&f(&[2, 4]), 1, 0);
        "slice_scatter", ["f32 [2, 3]"]: a.slice_scatter(&a, 4, 0);
        "slice_assign", ["f32 [2, 3]"]: a.slice_scatter(&a, 0, usize::MAX);
        "slice_set", ["f32 [2, 3]"]: a.clone().slice_set_owned(&a, 4, 0);
        "slice_assign", ["f32 [2, 3], f16 [1, 3]"]: a.clone().slice_set_owned(&of(&[1, 3], DType::F16), 0, 0);
        "slice_assign", ["f32 [2, 3]"]: a.slice_assign(&[0..1, 0..1, 0..1], &a);
        "slice_assign", ["f32 [2, 3]", "1..9"]: a.slice_assign(&[0..2, 1..9], &a);
        "slice_assign", ["f32 [2, 3]"]: a.slice_assign(std::slice::from_ref(&(0..2)), &f(&[1]));
        "slice_assign", ["f32 [2, 1]"]: a.slice_assign(&[0..1, 1..2], &f(&[2, 1]));
    }
}

#[test]
fn composites_refuse_what_does_not_fit() {
    let (a, i) = (f(&[2, 3]), of(&[2, 3], DType::U32));
    let (q, k) = (f(&[1, 4, 5, 8]), f(&[1, 3, 5, 8]));
    let plain = AttentionOptions::new(1.0);
    let (zero_cap, no_cause) =
        (AttentionOptions { softcap: Some(0.0), ..plain }, AttentionOptions { window: Some(2), ..plain });
    let seen = &mut Seen::default();
    let (factor_a, factor_b) = (f(&[3, 2]), f(&[2, 4]));
    let own = |rows: usize| LoraSegment { rows, adapter: Some((&factor_a, &factor_b, 1.0)) };
    let none = |rows: usize| LoraSegment { rows, adapter: None };
    refused! { seen;
        "softmax", ["f32 [2, 3]"]: a.softmax(2);
        "softmax", ["u32 [2, 3]"]: i.softmax(0);
        "log_softmax", ["f32 [2, 3]"]: a.log_softmax(2);
        "rms_norm", ["f32 [2, 3], f32 [2]", "the weight"]: a.rms_norm(Some(&f(&[2])), 1e-5);
        "rms_norm", ["f32 []"]: f(&[]).rms_norm(None, 1e-5);
        "layer_norm", ["the bias"]: a.layer_norm(Some(&f(&[3])), Some(&f(&[2])), 1e-5);
        "layer_norm", ["f64 [3]", ".to_dtype(DType::F32)"]: a.layer_norm(Some(&of(&[3], DType::F64)), None, 1e-5);
        "linear", ["f32 [2, 3], f32 [3, 5]", ".t()"]: a.linear(&f(&[3, 5]), None);
        "linear", ["the bias", "f32 [4]"]: a.linear(&f(&[5, 3]), Some(&f(&[4])));
        "linear", ["f32 [3]"]: a.linear(&f(&[3]), None);
        "lora", ["f32 [2, 3], f32 [3, 2], f32 [3, 4]"]: a.lora(&f(&[3, 2]), &f(&[3, 4]), 1.0);
        "lora", ["the base"]: a.lora_add(&f(&[2, 2]), &f(&[3, 2]), &f(&[2, 4]), 1.0);
        "lora_segments", ["3 rows", "has 2"]: a.lora_segments(&f(&[2, 4]), &[own(3)]);
        "lora_segments", ["has 2"]: a.lora_segments(&f(&[2, 4]), &[none(usize::MAX), none(2), own(1)]);
        "lora_segments", ["has 2"]: a.lora_segments(&f(&[2, 4]), &[own(1), none(2)]);
        "lora_segments", ["at least one segment"]: a.lora_segments(&f(&[2, 4]), &[none(2)]);
        "lora_segments", ["adapter 0"]: a.lora_segments(&f(&[2, 5]), &[none(1), own(1)]);
        "lora_segments", ["(…, rows, in)"]: f(&[3]).lora_segments(&f(&[4]), &[own(0)]);
        "glu", ["f32 [2, 3], f32 [3]"]: a.silu_mul(&f(&[3]));
        "glu", ["u32 [2, 3]"]: i.gelu_mul(&i);
        "rope", ["f32 [2, 3]"]: a.rope(&a, &a);
        "rope", ["f32 [1, 4, 5, 8]"]: q.rope_i(&f(&[5, 8]), &f(&[5, 8]));
        "attention", ["4 query heads", "3 key heads"]: LazyTensor::attention(&q, &k, &k, None, &plain);
        "attention", ["f32 [2, 3]"]: LazyTensor::attention(&a, &a, &a, None, &plain);
        "attention", ["the mask", "f32 [7]"]: LazyTensor::attention(&q, &q, &q, Some(&f(&[7])), &plain);
        "attention", ["softcap"]: LazyTensor::attention(&q, &q, &q, None, &zero_cap);
        "attention", ["window"]: LazyTensor::attention(&q, &q, &q, None, &no_cause);
    }
}

#[test]
fn making_and_reading_refuse_with_the_line_too() {
    let a = f(&[2, 3]);
    let (rag, huge) = (vec![vec![1f32], vec![]], usize::MAX / 2);
    let seen = &mut Seen::default();
    refused! { seen;
        "new", ["len"]: LazyTensor::new(rag, &CPU);
        "from_vec", ["f32 [3]", "[2, 2]"]: LazyTensor::from_vec(vec![1f32; 3], (2, 2), &CPU);
        "from_vec", ["f32 [0]"]: LazyTensor::from_vec(Vec::<f32>::new(), (1usize << 32, 1usize << 32), &CPU);
        "from_vec", ["f32 [3]"]: LazyTensor::from_vec(vec![1f32; 3], (huge, 3), &CPU);
        "from_slice", ["u8 [3]"]: LazyTensor::from_slice(&[1u8; 3], ((), 2), &CPU);
        "from_slice", ["u8 [3]"]: LazyTensor::from_slice(&[1u8; 3], ((), huge, 3), &CPU);
        "arange", ["f32"]: LazyTensor::arange(0f32, 1e9, &CPU);
        "arange", ["f32"]: LazyTensor::arange(0f32, f32::INFINITY, &CPU);
        "full", ["memory"]: LazyTensor::filled(1.0, Shape::from((huge, 4)), DType::F32, &CPU);
        "full", ["i32"]: LazyTensor::zeros(3, DType::I32, &CPU);
        "full", ["i16"]: LazyTensor::ones(3, DType::I16, &CPU);
        "full", ["i32"]: of(&[2], DType::I32).zeros_like();
        "full", ["i32"]: of(&[2], DType::I32).ones_like();
        "causal_mask", ["4 queries"]: LazyTensor::causal_mask(4, 3, None, DType::F32, &CPU);
        "causal_mask", ["u32"]: LazyTensor::causal_mask(3, 3, None, DType::U32, &CPU);
        "causal_mask", ["window"]: LazyTensor::causal_mask(3, 3, Some(0), DType::F32, &CPU);
        "to_scalar", ["f32 [2, 3]"]: a.to_scalar::<f32>();
        "to_vec0", ["f32 [2, 3]"]: a.to_vec0::<f32>();
        "to_vec1", ["f32 [2, 3]", "flatten_all"]: a.to_vec1::<f32>();
        "to_vec2", ["f32 [2, 3]", ".to_dtype(DType::F64)"]: a.to_vec2::<f64>();
        "to_vec3", ["f32 [2, 3]"]: a.to_vec3::<f32>();
    }
}

#[test]
fn what_fails_while_running_names_line_op_operands_and_module() {
    let _scope = candle_lazy_exec::module_scope("model.layers.3.self_attn.q_proj");
    let (table, ids) = (f(&[5, 3]), LazyTensor::new(&[1i64, -1], &CPU).unwrap());
    for (op, result) in [
        ("index_select(f32 [5, 3], i64 [2])", table.index_select(&ids, 0)),
        ("embedding(f32 [5, 3], i64 [2])", table.embedding(&ids)),
    ] {
        let recorded = result.unwrap();
        let text = (&recorded * 2.0).unwrap().exp().unwrap().eval().unwrap_err().to_string();
        let line = format!("tests/errors.rs:{}", recorded.site().location().line());
        for part in [op, &line, "model.layers.3.self_attn.q_proj", "-1"] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
    }
    // memory that no system grants
    // beyond the budget of pending bytes it is evaluated at once, and so refused where it is recorded
    let line = line!() + 1;
    let text = LazyTensor::filled(1.0, 1usize << 50, DType::F64, &CPU).map(|_| ()).unwrap_err().to_string();
    assert!(text.contains(&format!("tests/errors.rs:{line}")) && text.contains("bytes of memory"), "{text}");
    // integers that Candle divides by zero: a panic there, an error here
    let ints = LazyTensor::new(&[1u32, 2], &CPU).unwrap();
    let zero = (ints.sub(&ints)).unwrap();
    let error = ints.div(&zero).unwrap().eval().unwrap_err();
    assert!(matches!(error, Error::Panic { .. }) && error.to_string().contains("div(u32 [2], u32 [2])"), "{error}");
}
