//! The parameter tree: names, patterns, files; gradients by name.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::text;
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::params::{Gradients, Param, Params};
use candle_lazy_nn::{Error, LazyTensor};

const CPU: Device = Device::Cpu;

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &CPU).unwrap()
}

/// `a.w` of two, `a.b` of one, `z.w` of three elements.
fn tree() -> Params {
    let mut params = Params::new();
    for (name, values) in [("z.w", &[1f32, 2., 3.][..]), ("a.w", &[4., 5.]), ("a.b", &[6.])] {
        params.insert(name, tensor(values)).unwrap();
    }
    params
}

fn names<'a>(params: impl Iterator<Item = &'a Param>) -> Vec<&'a str> {
    params.map(Param::name).collect()
}

#[test]
fn a_parameter_has_the_value_that_was_set_last() {
    let param = Param::new("w", tensor(&[1., 2.])).unwrap();
    let (same, before) = (param.clone(), param.value());
    assert_eq!(before.id(), param.value().id(), "one handle as long as the value is the same");
    let recorded = before.affine(2., 0.).unwrap();
    same.set(tensor(&[5., 7.])).unwrap();
    assert_eq!(param.value().to_vec1::<f32>().unwrap(), [5., 7.]);
    assert_eq!(recorded.to_vec1::<f32>().unwrap(), [2., 4.]);
    assert_eq!((param.shape().dims(), param.dtype(), param.elem_count()), (&[2][..], DType::F32, 2));
    assert!(param.device().is_cpu() && param.is_trainable());
    param.set_trainable(false).unwrap();
    assert!(!same.is_trainable());
    let error = text(param.set(tensor(&[1.])));
    assert!(error.starts_with("parameters: `w` is [2] of F32, the value is [1] of F32, at "), "{error}");
    let error = text(param.set(tensor(&[1., 2.]).to_dtype(DType::F64).unwrap()));
    assert!(error.contains("the value is [2] of F64"), "{error}");
    assert_eq!(param.value().to_vec1::<f32>().unwrap(), [5., 7.]);
}

#[test]
fn names_and_values_that_are_none_are_refused() {
    for name in ["", "a..b", ".a", "a."] {
        assert!(text(Param::new(name, tensor(&[1.]))).contains("is no name"), "{name}");
    }
    let ids = Tensor::new(&[1u32], &CPU).unwrap();
    assert!(text(Param::new("ids", ids)).contains("`ids` is U32: a float tensor is needed"));
    let mut params = tree();
    assert!(text(params.insert("a.w", tensor(&[1.]))).contains("there is a `a.w` already"));
    let again = Param::new("z.w", tensor(&[1.])).unwrap();
    assert!(text(params.add(again)).contains("there is a `z.w` already"));
    assert_eq!(params.get("a.w").unwrap().elem_count(), 2);
}

#[test]
fn a_tree_counts_and_freezes_by_pattern() {
    let params = tree();
    assert_eq!(names(params.iter()), ["a.b", "a.w", "z.w"]);
    assert_eq!((params.len(), params.elem_count(), params.is_empty()), (3, 6, false));
    assert_eq!(params.freeze("*.w").unwrap(), 2);
    assert_eq!(names(params.trainable()), ["a.b"]);
    assert_eq!(params.trainable_elem_count(), 1);
    assert_eq!(params.unfreeze("z.?").unwrap(), 1);
    assert_eq!(names(params.trainable()), ["a.b", "z.w"]);
    assert_eq!(names(params.matching("a.*").unwrap().into_iter()), ["a.b", "a.w"]);
    let error = text(params.freeze("*.lora_A"));
    assert!(error.contains("the pattern `*.lora_A` names none of `a.b`, `a.w`, `z.w`"), "{error}");
    assert_eq!(names(params.trainable()), ["a.b", "z.w"]);
    assert!(params.get("q").is_none());
    assert!(text(Params::new().matching("*")).contains("names none of no names"));
}

#[test]
fn files_bring_back_the_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("params.safetensors");
    let params = tree();
    let half = Tensor::new(&[[1.5f32, -2.]], &CPU).unwrap().to_dtype(DType::BF16).unwrap();
    let mut params_with_half = params.clone();
    params_with_half.insert("half", half.t().unwrap()).unwrap();
    // a value that is not computed yet is computed
    params.get("a.b").unwrap().set(LazyTensor::from(tensor(&[3.])).affine(2., 1.).unwrap()).unwrap();
    params_with_half.save(&path).unwrap();
    let others = tree();
    let mut others_with_half = others.clone();
    others_with_half.insert("half", half.zeros_like().unwrap().reshape((2, 1)).unwrap()).unwrap();
    others.freeze("z.w").unwrap();
    others_with_half.load(&path).unwrap();
    let read = |name: &str| others.get(name).unwrap().value().to_vec1::<f32>().unwrap();
    assert_eq!((read("a.b"), read("a.w"), read("z.w")), (vec![7.], vec![4., 5.], vec![1., 2., 3.]));
    let half = others_with_half.get("half").unwrap().value();
    assert_eq!(half.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap(), [[1.5], [-2.]]);
    assert!(!others.get("z.w").unwrap().is_trainable());
    // other libraries read it too
    let stored = candle_core::safetensors::load(&path, &CPU).unwrap();
    assert_eq!(stored["a.w"].to_vec1::<f32>().unwrap(), [4., 5.]);
}

#[test]
fn a_file_of_another_tree_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("params.safetensors");
    tree().save(&path).unwrap();
    let mut more = tree();
    more.insert("y", tensor(&[1.])).unwrap();
    let error = text(more.load(&path));
    assert!(error.ends_with("params.safetensors is not a valid parameter file: it lacks `y`"), "{error}");
    let mut fewer = Params::new();
    fewer.insert("a.w", tensor(&[0., 0.])).unwrap();
    assert!(text(fewer.load(&path)).ends_with("nothing here is called `a.b`, `z.w`"));
    fewer.insert("q", tensor(&[0.])).unwrap();
    assert!(text(fewer.load(&path)).ends_with("it lacks `q`, and nothing here is called `a.b`, `z.w`"));
    assert_eq!(fewer.get("a.w").unwrap().value().to_vec1::<f32>().unwrap(), [0., 0.]);
    let with = |b: Tensor| {
        let mut params = Params::new();
        for (name, value) in [("a.w", tensor(&[0., 0.])), ("a.b", b), ("z.w", tensor(&[0.; 3]))] {
            params.insert(name, value).unwrap();
        }
        let error = text(params.load(&path));
        assert_eq!(params.get("a.w").unwrap().value().to_vec1::<f32>().unwrap(), [0., 0.]);
        error
    };
    let error = with(tensor(&[1., 2.]));
    assert!(error.contains("tensor `a.b` in ") && error.ends_with("expected shape [2], found [1]"), "{error}");
    let error = with(tensor(&[1.]).to_dtype(DType::F16).unwrap());
    assert!(error.contains("tensor `a.b` in ") && error.ends_with("expected F16, found F32"), "{error}");
    // what is no such file
    std::fs::write(&path, b"no").unwrap();
    assert!(matches!(tree().load(&path), Err(Error::Format { .. })));
    assert!(matches!(tree().load(dir.path().join("absent")), Err(Error::Io { .. })));
}

#[test]
fn a_file_is_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("params.safetensors");
    tree().save(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    let params = tree();
    // ids beyond the table: the value cannot be computed
    let ids = LazyTensor::new(&[9u32], &CPU).unwrap();
    let broken = LazyTensor::from(tensor(&[1.])).index_select(&ids, 0).unwrap();
    params.get("a.b").unwrap().set(broken).unwrap();
    assert!(params.save(&path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let absent = dir.path().join("absent").join("params.safetensors");
    assert!(matches!(tree().save(&absent), Err(Error::Io { .. })));
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["params.safetensors"], "nothing else is left behind");
}

#[test]
fn gradients_have_the_names_of_their_parameters() {
    let params = tree();
    params.freeze("a.w").unwrap();
    let lazy = |values: &[f32]| LazyTensor::from(tensor(values));
    let grads = Gradients::of(&params, [lazy(&[1.]), lazy(&[2., 3., 4.])]).unwrap();
    assert_eq!(grads.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a.b", "z.w"]);
    assert_eq!((grads.len(), grads.is_empty()), (2, false));
    assert!(text(Gradients::of(&params, [lazy(&[1.])])).contains("1 gradients for 2 trainable parameters"));
    let three = [lazy(&[1.]), lazy(&[2., 3., 4.]), lazy(&[1.])];
    assert!(text(Gradients::of(&params, three)).contains("3 gradients for 2 trainable parameters"));
    let error = text(Gradients::of(&params, [lazy(&[1., 2.]), lazy(&[2., 3., 4.])]));
    assert!(error.contains("`a.b` is [1], its gradient [2] of F32"), "{error}");
    let mut grads = Gradients::new();
    let param = params.get("a.b").unwrap();
    grads.insert(param, lazy(&[1.])).unwrap();
    assert!(text(grads.insert(param, lazy(&[1.]))).contains("`a.b` has a gradient already"));
    let doubled = grads.scaled(2.).unwrap();
    assert_eq!(doubled.get("a.b").unwrap().to_vec1::<f32>().unwrap(), [2.]);
    assert!(doubled.get("z.w").is_none());
}

#[test]
fn parts_of_a_batch_add_up_without_a_graph() {
    let params = tree();
    params.freeze("z.w").unwrap();
    let part = |b: f32, w: [f32; 2]| {
        let grads = [LazyTensor::from(tensor(&[b])), LazyTensor::from(tensor(&w))];
        Gradients::of(&params, grads.map(|g| g.affine(3., 0.).unwrap())).unwrap()
    };
    let mut sums = Gradients::new();
    let loss = LazyTensor::from(tensor(&[1.])).affine(5., 0.).unwrap();
    sums.accumulate(part(1., [2., 3.]), &[&loss]).unwrap();
    assert!(loss.is_ready());
    let report = sums.accumulate(part(10., [20., 30.]), &[]).unwrap();
    assert!(sums.iter().all(|(_, sum)| sum.is_ready()) && report.nodes > 0);
    sums.accumulate(part(100., [200., 300.]), &[]).unwrap();
    assert_eq!(sums.get("a.b").unwrap().to_vec1::<f32>().unwrap(), [333.]);
    assert_eq!(sums.get("a.w").unwrap().to_vec1::<f32>().unwrap(), [666., 999.]);
    let mut other = Gradients::new();
    other.insert(params.get("z.w").unwrap(), tensor(&[1.; 3])).unwrap();
    assert!(text(sums.accumulate(other, &[])).contains("gradients of `a.b`, `a.w` and of `z.w` do not add up"));
    assert_eq!(sums.get("a.b").unwrap().to_vec1::<f32>().unwrap(), [333.]);
}

/// Two layers of one input, of which the second is cut off.
fn layers() -> (Params, [candle_lazy_nn::params::Param; 3]) {
    let mut params = Params::new();
    let w = params.insert("w", Tensor::new(&[2f32, 3.], &Device::Cpu).unwrap()).unwrap();
    let b = params.insert("b", Tensor::new(&[1f32, 1.], &Device::Cpu).unwrap()).unwrap();
    let fixed = params.insert("fixed", Tensor::new(&[5f32, 5.], &Device::Cpu).unwrap()).unwrap();
    params.freeze("fixed").unwrap();
    (params, [w, b, fixed])
}

#[test]
fn gradients_of_a_tree_are_those_of_its_trainable_parameters() {
    let (params, [w, b, fixed]) = layers();
    assert!(w.value().is_variable() && !fixed.value().is_traced());
    let y = ((w.value().sqr().unwrap() + b.value()).unwrap() * fixed.value()).unwrap();
    let grads = params.grad(&y.sum_all().unwrap()).unwrap();
    assert_eq!(grads.get("w").unwrap().to_vec1::<f32>().unwrap(), [20., 30.]);
    assert_eq!(grads.get("b").unwrap().to_vec1::<f32>().unwrap(), [5., 5.]);
    assert!(grads.get("fixed").is_none() && !grads.get("w").unwrap().is_traced());
    params.unfreeze("fixed").unwrap();
    let y = (w.value() * fixed.value()).unwrap().sum_all().unwrap();
    let error = params.grad(&y).unwrap_err().to_string();
    assert!(error.contains("does not depend"), "{error}");
}

#[test]
fn a_report_says_what_every_parameter_got() {
    let (params, [w, b, _]) = layers();
    let line = line!() + 1;
    let loss = (w.value().sqr().unwrap() + b.value().detach()).unwrap().sum_all().unwrap();
    let report = params.grad_report(&loss).unwrap();
    let text = report.to_string();
    // of w: (4, 6)
    assert!(text.contains(&format!("w [2]: norm {:.3e}", 52f64.sqrt())), "{text}");
    assert!(text.contains("fixed [2]: frozen") && text.contains("b [2]: no gradient: detach"), "{text}");
    assert!(text.contains(&format!("params.rs:{line}:")), "{text}");
    assert_eq!(report.unreached().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["b"]);
}
