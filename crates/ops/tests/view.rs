//! Layout algebra: every view names the elements that plain index arithmetic names.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_lazy_ops::view::{Slice, SliceMut, Strided, View};
use candle_lazy_ops::Error;
use common::{indices, offset};
use proptest::prelude::{any, prop, proptest, ProptestConfig};

/// Offsets of all elements in row-major order.
fn all(l: &Strided) -> Vec<usize> {
    indices(&l.dims).map(|i| offset(l, &i)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_reshape_keeps_the_elements_in_order(
        dims in prop::collection::vec(1usize..5, 0..5),
        cut in any::<u64>(),
        swap in any::<bool>(),
        ones in 0usize..3,
    ) {
        let mut l = Strided::contiguous(&dims);
        if swap && dims.len() >= 2 {
            let mut perm: Vec<usize> = (0..dims.len()).collect();
            perm.swap(0, dims.len() - 1);
            l = l.permute(&perm).unwrap();
        }
        // A random factorisation of the element count.
        let mut left = l.elem_count();
        let mut target = Vec::new();
        let mut c = cut;
        while left > 1 {
            let divisors: Vec<usize> = (2..=left).filter(|d| left.is_multiple_of(*d)).collect();
            let d = divisors[(c % divisors.len() as u64) as usize];
            c /= 7;
            target.push(d);
            left /= d;
        }
        for i in 0..ones {
            target.insert((cut as usize + i) % (target.len() + 1), 1);
        }
        match l.reshape(&target) {
            Some(r) => {
                assert_eq!(r.dims.as_slice(), target.as_slice());
                assert_eq!(all(&r), all(&l));
            }
            // Only a layout with gaps or swapped dims may refuse.
            None => assert!(!l.is_contiguous()),
        }
    }

    #[test]
    fn contiguous_means_row_major(dims in prop::collection::vec(0usize..4, 0..4), p in any::<u64>()) {
        let l = Strided::contiguous(&dims);
        assert!(l.is_contiguous());
        assert_eq!(all(&l), (0..l.elem_count()).collect::<Vec<_>>());
        if dims.len() >= 2 {
            let i = (p % (dims.len() as u64 - 1)) as usize;
            let mut perm: Vec<usize> = (0..dims.len()).collect();
            perm.swap(i, i + 1);
            let t = l.permute(&perm).unwrap();
            let sorted = all(&t) == (0..t.elem_count()).collect::<Vec<_>>();
            assert_eq!(t.is_contiguous(), sorted);
        }
    }
}

#[test]
fn a_narrowed_last_dim_still_splits() {
    let l = Strided::contiguous(&[4, 10]).narrow(1, 2, 6).unwrap();
    let r = l.reshape(&[4, 2, 3]).unwrap();
    assert_eq!(r.strides.as_slice(), [10, 3, 1]);
    assert_eq!(all(&r), all(&l));
    assert!(l.reshape(&[24]).is_none(), "rows do not merge over the gap");
    assert!(l.reshape(&[2, 2, 6]).is_some(), "rows split");
    assert!(l.reshape(&[5, 5]).is_none(), "another count");
}

#[test]
fn broadcast_dims_merge_and_split() {
    let l = Strided::contiguous(&[1, 3]).broadcast_to(&[4, 3]).unwrap();
    assert_eq!(l.strides.as_slice(), [0, 1]);
    assert_eq!(l.reshape(&[2, 2, 3]).unwrap().strides.as_slice(), [0, 0, 1]);
    assert!(l.reshape(&[12]).is_none());
    let z = Strided::contiguous(&[1]).broadcast_to(&[2, 6]).unwrap();
    assert_eq!(all(&z.reshape(&[3, 4]).unwrap()), [0; 12]);
}

#[test]
fn wrong_view_requests_are_errors() {
    let l = Strided::contiguous(&[2, 3]);
    assert!(l.permute(&[0, 0]).is_err());
    assert!(l.permute(&[0]).is_err());
    assert!(l.permute(&[0, 2]).is_err());
    assert!(l.narrow(2, 0, 1).is_err());
    assert!(l.narrow(1, 2, 2).is_err());
    assert!(l.narrow(1, usize::MAX, 2).is_err());
    assert!(l.broadcast_to(&[3]).is_err());
    assert!(l.broadcast_to(&[2, 4]).is_err());
    assert_eq!(l.narrow(0, 2, 0).unwrap().elem_count(), 0);
}

#[test]
fn bounds_are_checked_without_overflow() {
    let l = Strided::contiguous(&[2, 3]);
    assert!(l.check_bounds(6).is_ok());
    assert!(matches!(l.check_bounds(5), Err(Error::OutOfBounds { .. })));
    let mut far = l.clone();
    far.offset = usize::MAX - 2;
    assert!(far.check_bounds(usize::MAX).is_err());
    let mut odd = l.clone();
    odd.strides.pop();
    assert!(odd.check_bounds(6).is_err());
    let huge = Strided::contiguous(&[1]).broadcast_to(&[usize::MAX, 3]).unwrap();
    assert!(huge.check_bounds(1).is_err());
    assert!(Strided::contiguous(&[0, 3]).check_bounds(0).is_ok());
    assert!(View::new(Slice::F32(&[1.0; 5]), l).is_err());
}

#[test]
fn layouts_of_candle_tensors_carry_over() {
    use candle_core::{Device, Tensor};
    let t = Tensor::arange(0f32, 24., &Device::Cpu).unwrap().reshape((2, 3, 4)).unwrap();
    let v = t.transpose(0, 2).unwrap().narrow(0, 1, 2).unwrap();
    let l = Strided::from_layout(v.layout());
    let want: Vec<f32> = v.flatten_all().unwrap().to_vec1().unwrap();
    let got: Vec<f32> = all(&l).into_iter().map(|i| i as f32).collect();
    assert_eq!(got, want);
    let sum = candle_lazy_ops::storage::with_view(&v, |view| {
        assert_eq!(view.dims(), v.dims());
        Ok(view.layout.offset)
    });
    assert_eq!(sum.unwrap(), 1);
}

#[test]
fn slices_name_their_dtype() {
    let mut v = [1f32, 2.0];
    let mut s = SliceMut::F32(&mut v);
    assert_eq!((s.len(), s.dtype()), (2, candle_core::DType::F32));
    if let SliceMut::F32(x) = s.reborrow() {
        x[0] = 5.0;
    }
    assert!(matches!(s.as_slice(), Slice::F32([5.0, 2.0])));
    assert!(!s.is_empty() && !s.as_slice().is_empty());
}
