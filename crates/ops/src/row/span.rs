//! Loops over a run of elements, cut so that the stores of the body lie on boundaries of cache lines.
//!
//! What stands before the first boundary and behind the last whole line goes through a padded line of its own, in the same vector
//! code: left to the compiler, it would run element by element, which for an exponential costs as much as a line each.

use crate::math::Real;

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

#[inline(always)]
fn padded<T: Real>(x: &[T]) -> [T; LINE] {
    let mut line = [T::ONE; LINE];
    line[..x.len()].copy_from_slice(x);
    line
}

/// `dst[i] = f(x[i])`; both have one length.
#[inline(always)]
pub(super) fn one<T: Real>(dst: &mut [T], x: &[T], f: impl Fn(T) -> T) {
    let n = dst.len().min(x.len());
    let (dst, x) = (&mut dst[..n], &x[..n]);
    if !T::SPLITS {
        // f64 functions are calls, one element each: nothing to pad for
        for (d, &x) in dst.iter_mut().zip(x) {
            *d = f(x);
        }
        return;
    }
    let (from, to) = body(dst);
    for (d, &x) in dst[from..to].iter_mut().zip(&x[from..to]) {
        *d = f(x);
    }
    for (from, to) in [(0, from), (to, n)] {
        if from < to {
            let mut line = padded(&x[from..to]);
            for v in &mut line {
                *v = f(*v);
            }
            dst[from..to].copy_from_slice(&line[..to - from]);
        }
    }
}

/// `dst[i] = f(x[i], y[i])`; all have one length.
#[inline(always)]
pub(super) fn two<T: Real>(dst: &mut [T], x: &[T], y: &[T], f: impl Fn(T, T) -> T) {
    let n = dst.len().min(x.len()).min(y.len());
    let (dst, x, y) = (&mut dst[..n], &x[..n], &y[..n]);
    let (from, to) = body(dst);
    for ((d, &x), &y) in dst[from..to].iter_mut().zip(&x[from..to]).zip(&y[from..to]) {
        *d = f(x, y);
    }
    for (from, to) in [(0, from), (to, n)] {
        if from < to {
            let (mut line, other) = (padded(&x[from..to]), padded(&y[from..to]));
            for (v, &y) in line.iter_mut().zip(&other) {
                *v = f(*v, y);
            }
            dst[from..to].copy_from_slice(&line[..to - from]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_visited_once_wherever_the_run_begins() {
        let x: Vec<f32> = (0..400).map(|i| i as f32 * 0.37 - 50.0).collect();
        let mut out = vec![0f32; 500];
        for start in 0..17 {
            for len in (0..40).chain([127, 128, 129, 200, 255, 256, 257, 300]) {
                out.fill(-1.0);
                let (x, y) = (&x[start / 2..start / 2 + len], &x[start..start + len]);
                one(&mut out[start..start + len], x, |v| v * 3.0 + 1.0);
                for (i, v) in out.iter().enumerate() {
                    let inside = i.checked_sub(start).filter(|&j| j < len);
                    assert_eq!(*v, inside.map_or(-1.0, |j| x[j] * 3.0 + 1.0), "{start} {len} {i}");
                }
                two(&mut out[start..start + len], x, y, |a, b| a * 2.0 - b);
                for (i, v) in out.iter().enumerate() {
                    let inside = i.checked_sub(start).filter(|&j| j < len);
                    assert_eq!(*v, inside.map_or(-1.0, |j| x[j] * 2.0 - y[j]), "{start} {len} {i}");
                }
            }
        }
    }
}
