//! Loops over a run of elements, cut so that the stores of the body lie on boundaries of cache lines.
//!
//! What stands before the first boundary and behind the last whole line goes through a padded line of its own, in the same vector
//! code: left to the compiler, it would run element by element, which for an exponential costs as much as a line each.

use crate::math::Real;

/// A function of one element. A trait and not a closure, because its call can be told to be inlined: a large function that is not
/// becomes one that knows nothing of the instruction set its loop is compiled for.
pub(super) trait Map1<T>: Copy {
    fn call(self, x: T) -> T;
}

/// A function of two elements.
pub(super) trait Map2<T>: Copy {
    fn call(self, x: T, y: T) -> T;
}

/// A function of three elements.
pub(super) trait Map3<T>: Copy {
    fn call(self, x: T, y: T, z: T) -> T;
}

/// A function of two elements whose left one is always the same.
#[derive(Clone, Copy)]
pub(super) struct Left<F, T>(pub(super) F, pub(super) T);

impl<T: Copy, F: Map2<T>> Map1<T> for Left<F, T> {
    #[inline(always)]
    fn call(self, y: T) -> T {
        self.0.call(self.1, y)
    }
}

/// A function of two elements whose right one is always the same.
#[derive(Clone, Copy)]
pub(super) struct Right<F, T>(pub(super) F, pub(super) T);

impl<T: Copy, F: Map2<T>> Map1<T> for Right<F, T> {
    #[inline(always)]
    fn call(self, x: T) -> T {
        self.0.call(x, self.1)
    }
}

/// Elements of a line, at least a cache line of either register type.
const LINE: usize = 16;
const LINE_BYTES: usize = 64;

/// Where the body begins and ends.
#[inline(always)]
fn body<T>(dst: &[T]) -> (usize, usize) {
    let n = dst.len();
    // a run of a few lines is not worth a head
    let head = if n < 8 * LINE { 0 } else { dst.as_ptr().align_offset(LINE_BYTES).min(LINE) };
    (head, head + (n - head) / LINE * LINE)
}

/// The parts of a run: before the first boundary, whole lines, the rest.
#[inline(always)]
fn parts<T: Real>(dst: &[T]) -> [(usize, usize); 3] {
    if !T::SPLITS {
        // f64 functions are calls, one element each: nothing to pad for
        return [(0, 0), (0, dst.len()), (0, 0)];
    }
    let (from, to) = body(dst);
    [(0, from), (from, to), (to, dst.len())]
}

/// `dst[i] = f(x[i])`; both have one length.
#[inline(always)]
pub(super) fn one<T: Real>(dst: &mut [T], x: &[T], f: impl Map1<T>) {
    let n = dst.len().min(x.len());
    let (dst, x) = (&mut dst[..n], &x[..n]);
    let (mut line_x, mut line) = ([T::ONE; LINE], [T::ONE; LINE]);
    for (part, (from, to)) in parts(dst).into_iter().enumerate() {
        let padded = part != 1 && from < to;
        if padded {
            line_x[..to - from].copy_from_slice(&x[from..to]);
        }
        let (d, x) = if padded { (&mut line[..], &line_x[..]) } else { (&mut dst[from..to], &x[from..to]) };
        for (d, &x) in d.iter_mut().zip(x) {
            *d = f.call(x);
        }
        if padded {
            dst[from..to].copy_from_slice(&line[..to - from]);
        }
    }
}

/// `dst[i] = f(x[i], y[i])`; all have one length.
#[inline(always)]
pub(super) fn two<T: Real>(dst: &mut [T], x: &[T], y: &[T], f: impl Map2<T>) {
    let n = dst.len().min(x.len()).min(y.len());
    let (dst, x, y) = (&mut dst[..n], &x[..n], &y[..n]);
    let (mut line_x, mut line_y, mut line) = ([T::ONE; LINE], [T::ONE; LINE], [T::ONE; LINE]);
    for (part, (from, to)) in parts(dst).into_iter().enumerate() {
        let padded = part != 1 && from < to;
        if padded {
            line_x[..to - from].copy_from_slice(&x[from..to]);
            line_y[..to - from].copy_from_slice(&y[from..to]);
        }
        let (d, x, y) = if padded {
            (&mut line[..], &line_x[..], &line_y[..])
        } else {
            (&mut dst[from..to], &x[from..to], &y[from..to])
        };
        for ((d, &x), &y) in d.iter_mut().zip(x).zip(y) {
            *d = f.call(x, y);
        }
        if padded {
            dst[from..to].copy_from_slice(&line[..to - from]);
        }
    }
}

/// `dst[i] = f(x[i], y[i], z[i])`; all have one length.
#[inline(always)]
pub(super) fn three<T: Real>(dst: &mut [T], x: &[T], y: &[T], z: &[T], f: impl Map3<T>) {
    let n = dst.len().min(x.len()).min(y.len()).min(z.len());
    let (dst, x, y, z) = (&mut dst[..n], &x[..n], &y[..n], &z[..n]);
    let mut lines = [[T::ONE; LINE]; 4];
    for (part, (from, to)) in parts(dst).into_iter().enumerate() {
        let padded = part != 1 && from < to;
        let [line, line_x, line_y, line_z] = &mut lines;
        if padded {
            line_x[..to - from].copy_from_slice(&x[from..to]);
            line_y[..to - from].copy_from_slice(&y[from..to]);
            line_z[..to - from].copy_from_slice(&z[from..to]);
        }
        let (d, x, y, z) = if padded {
            (&mut line[..], &line_x[..], &line_y[..], &line_z[..])
        } else {
            (&mut dst[from..to], &x[from..to], &y[from..to], &z[from..to])
        };
        for (((d, &x), &y), &z) in d.iter_mut().zip(x).zip(y).zip(z) {
            *d = f.call(x, y, z);
        }
        if padded {
            dst[from..to].copy_from_slice(&line[..to - from]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    struct Linear;

    impl Map1<f32> for Linear {
        fn call(self, x: f32) -> f32 {
            x * 3.0 + 1.0
        }
    }

    impl Map2<f32> for Linear {
        fn call(self, x: f32, y: f32) -> f32 {
            x * 2.0 - y
        }
    }

    impl Map3<f32> for Linear {
        fn call(self, x: f32, y: f32, z: f32) -> f32 {
            x * 2.0 - y + z
        }
    }

    #[test]
    fn every_element_is_visited_once_wherever_the_run_begins() {
        let x: Vec<f32> = (0..400).map(|i| i as f32 * 0.37 - 50.0).collect();
        let mut out = vec![0f32; 500];
        for start in 0..17 {
            for len in (0..40).chain([127, 128, 129, 200, 255, 256, 257, 300]) {
                out.fill(-1.0);
                let (x, y) = (&x[start / 2..start / 2 + len], &x[start..start + len]);
                one(&mut out[start..start + len], x, Linear);
                for (i, v) in out.iter().enumerate() {
                    let inside = i.checked_sub(start).filter(|&j| j < len);
                    assert_eq!(*v, inside.map_or(-1.0, |j| x[j] * 3.0 + 1.0), "{start} {len} {i}");
                }
                two(&mut out[start..start + len], x, y, Linear);
                for (i, v) in out.iter().enumerate() {
                    let inside = i.checked_sub(start).filter(|&j| j < len);
                    assert_eq!(*v, inside.map_or(-1.0, |j| x[j] * 2.0 - y[j]), "{start} {len} {i}");
                }
                three(&mut out[start..start + len], x, y, x, Linear);
                for (i, v) in out.iter().enumerate() {
                    let inside = i.checked_sub(start).filter(|&j| j < len);
                    assert_eq!(*v, inside.map_or(-1.0, |j| x[j] * 2.0 - y[j] + x[j]), "{start} {len} {i}");
                }
            }
        }
    }
}
