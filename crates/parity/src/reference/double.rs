//! Numbers of twice the precision of f64: a sum of two that do not overlap (Dekker 1971; Knuth's two-sum). A chain of roundings in
//! f64 would leave a reference no better than the f64 results that it judges.

use std::ops::{Add, Div, Mul, Sub};

/// A number as the sum of two.
#[derive(Debug, Clone, Copy)]
pub(super) struct Double {
    high: f64,
    low: f64,
}

impl Double {
    /// The nearest f64.
    pub(super) fn round(self) -> f64 {
        self.high + self.low
    }

    /// The square root, by one step of Newton's from f64's.
    pub(super) fn sqrt(self) -> Self {
        let root = libm::sqrt(self.high);
        if root == 0.0 || !root.is_finite() {
            return root.into();
        }
        let rest = self - Self::from(root) * Self::from(root);
        sum(root, rest.round() / (2.0 * root))
    }
}

/// a + b, with what its rounding leaves.
fn sum(a: f64, b: f64) -> Double {
    let high = a + b;
    if !high.is_finite() {
        return high.into();
    }
    let rest = high - a;
    Double { high, low: (a - (high - rest)) + (b - rest) }
}

impl From<f64> for Double {
    fn from(x: f64) -> Self {
        Self { high: x, low: 0.0 }
    }
}

impl Add for Double {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        let s = sum(self.high, o.high);
        sum(s.high, s.low + self.low + o.low)
    }
}

impl Sub for Double {
    type Output = Self;
    fn sub(self, o: Self) -> Self {
        self + Self { high: -o.high, low: -o.low }
    }
}

impl Mul for Double {
    type Output = Self;
    fn mul(self, o: Self) -> Self {
        let high = self.high * o.high;
        if !high.is_finite() {
            return high.into();
        }
        sum(high, self.high.mul_add(o.high, -high) + self.high * o.low + self.low * o.high)
    }
}

impl Div for Double {
    type Output = Self;
    fn div(self, o: Self) -> Self {
        let high = self.high / o.high;
        if !high.is_finite() || o.high.is_infinite() {
            return high.into();
        }
        let rest = self - o * Self::from(high);
        sum(high, rest.round() / o.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_f64_rounds_away_is_kept() {
        let (tiny, one) = (Double::from(2f64.powi(-80)), Double::from(1.0));
        assert_eq!((one + tiny - one).round(), 2f64.powi(-80));
        let third = one / Double::from(3.0);
        assert!((third * Double::from(3.0) - one).round().abs() < 2f64.powi(-100));
        let root = Double::from(2.0).sqrt();
        assert!((root * root - Double::from(2.0)).round().abs() < 2f64.powi(-100));
    }
}
