//! Rotary tables applied to heads, whole and in part.

// what tests share fails as tests do
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::{LazyTensor, RopeScaling, RopeTable};
use candle_nn::rotary_emb::{rope_i_slow, rope_slow};

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn near(got: &LazyTensor, want: &Tensor) {
    let got = got.eval().unwrap();
    assert_eq!(got.dims(), want.dims());
    for (g, w) in flat(&got).iter().zip(flat(want)) {
        // two units at the largest sum of products, 2·√2·2
        assert!((g - w).abs() <= 2.0 * f32::EPSILON * 4.0, "{g} {w}");
    }
}

#[test]
fn a_table_turns_the_dims_that_it_has_and_passes_the_rest_on() {
    let (start, len) = (3, 5);
    for (dim, rotary) in [(8, 8), (8, 4), (10, 2), (6, 6)] {
        let table = RopeTable::new(rotary, 100.0, &RopeScaling::None, 16, DType::F32, &Device::Cpu).unwrap();
        assert_eq!((table.rotary_dim(), table.positions()), (rotary, 16));
        let x = crate::common::Rng::new(dim as u64).tensor(&[2, 3, len, dim], 2.0).unwrap();
        let (cos, sin) = table.slice(start, len).unwrap();
        let (c, s) = (cos.eval().unwrap(), sin.eval().unwrap());
        let head = x.narrow(3, 0, rotary).unwrap().contiguous().unwrap();
        let rest = x.narrow(3, rotary, dim - rotary).unwrap();
        let whole = |turned: Tensor| match dim == rotary {
            true => turned,
            false => Tensor::cat(&[turned, rest.clone()], 3).unwrap(),
        };
        let lazy = LazyTensor::from(&x);
        near(&table.apply(&lazy, start).unwrap(), &whole(rope_slow(&head, &c, &s).unwrap()));
        near(&lazy.rope_partial(&cos, &sin, true).unwrap(), &whole(rope_i_slow(&head, &c, &s).unwrap()));
        let same = RopeTable::from_tables(cos, sin).unwrap();
        assert_eq!(
            flat(&same.apply(&lazy, 0).unwrap().eval().unwrap()),
            flat(&table.apply(&lazy, start).unwrap().eval().unwrap())
        );
    }
}

#[test]
fn what_does_not_fit_is_refused_here() {
    let table = RopeTable::new(8, 100.0, &RopeScaling::None, 4, DType::F32, &Device::Cpu).unwrap();
    let x = |dims: &[usize]| LazyTensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
    let line = line!() + 1;
    for wrong in [table.apply(&x(&[1, 1, 2, 6]), 0), table.apply(&x(&[1, 1, 5, 8]), 0), table.apply(&x(&[1, 2, 8]), 0)]
    {
        let text = wrong.unwrap_err().to_string();
        assert!(text.contains(&format!("rope.rs:{line}")), "{text}");
    }
    assert!(RopeTable::from_tables(x(&[3, 2]), x(&[2, 2])).is_err());
}
