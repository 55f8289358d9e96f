//! Loops over a run of elements, cut so that the stores of the body lie on boundaries of cache lines.
//!
//! What stands before the first boundary and behind the last whole line is done with the elements beside it, as a whole line that laps
//! over the body (of a run that is shorter than a line, as a padded one), in the same vector code: left to the compiler, it would run
//! element by element, which for an exponential costs as much as a line each. No run is written where it is read.

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

/// The parts of a run, in this order: the line at its beginning, whole lines from the first boundary on, the line at its end. `None`
/// where the run is shorter than a line and goes through a padded one.
#[inline(always)]
fn parts<T: Real>(dst: &[T]) -> Option<[(usize, usize); 3]> {
    let n = dst.len();
    if !T::SPLITS {
        // f64 functions are calls, one element each: nothing to pad for
        return Some([(0, 0), (0, n), (n, n)]);
    }
    if n < LINE {
        return None;
    }
    let (from, to) = body(dst);
    let (head, tail) = (if from > 0 { LINE } else { 0 }, if to < n { n - LINE } else { n });
    Some([(0, head), (from, to), (tail, n)])
}

/// A line that begins with a short run.
#[inline(always)]
fn padded<T: Real>(x: &[T]) -> [T; LINE] {
    let mut line = [T::ONE; LINE];
    for (l, &x) in line.iter_mut().zip(x) {
        *l = x;
    }
    line
}

/// `dst[i] = f(x[i])`; both have one length.
#[inline(always)]
pub(super) fn one<T: Real>(dst: &mut [T], x: &[T], f: impl Map1<T>) {
    let n = dst.len().min(x.len());
    let (dst, x) = (&mut dst[..n], &x[..n]);
    let Some(parts) = parts(dst) else {
        let mut line = padded(x);
        for l in &mut line {
            *l = f.call(*l);
        }
        return dst.copy_from_slice(&line[..n]);
    };
    for (from, to) in parts {
        for (d, &x) in dst[from..to].iter_mut().zip(&x[from..to]) {
            *d = f.call(x);
        }
    }
}

/// `dst[i] = f(x[i], y[i])`; all have one length.
#[inline(always)]
pub(super) fn two<T: Real>(dst: &mut [T], x: &[T], y: &[T], f: impl Map2<T>) {
    let n = dst.len().min(x.len()).min(y.len());
    let (dst, x, y) = (&mut dst[..n], &x[..n], &y[..n]);
    let Some(parts) = parts(dst) else {
        let mut line = padded(x);
        for (l, y) in line.iter_mut().zip(padded(y)) {
            *l = f.call(*l, y);
        }
        return dst.copy_from_slice(&line[..n]);
    };
    for (from, to) in parts {
        for ((d, &x), &y) in dst[from..to].iter_mut().zip(&x[from..to]).zip(&y[from..to]) {
            *d = f.call(x, y);
        }
    }
}

/// `dst[i] = f(x[i], y[i], z[i])`; all have one length.
#[inline(always)]
pub(super) fn three<T: Real>(dst: &mut [T], x: &[T], y: &[T], z: &[T], f: impl Map3<T>) {
    let n = dst.len().min(x.len()).min(y.len()).min(z.len());
    let (dst, x, y, z) = (&mut dst[..n], &x[..n], &y[..n], &z[..n]);
    let Some(parts) = parts(dst) else {
        let mut line = padded(x);
        for ((l, y), z) in line.iter_mut().zip(padded(y)).zip(padded(z)) {
            *l = f.call(*l, y, z);
        }
        return dst.copy_from_slice(&line[..n]);
    };
    for (from, to) in parts {
        for (((d, &x), &y), &z) in dst[from..to].iter_mut().zip(&x[from..to]).zip(&y[from..to]).zip(&z[from..to]) {
            *d = f.call(x, y, z);
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
