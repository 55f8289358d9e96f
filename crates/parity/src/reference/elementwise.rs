//! Elementwise references.

use super::{broadcast_dims, broadcast_offset, indices, Arr, Result};

/// Functions of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unary {
    /// −x
    Neg,
    /// |x|
    Abs,
    /// 1/x
    Recip,
    /// x²
    Sqr,
    /// √x
    Sqrt,
    /// 1/√x
    Rsqrt,
    /// eˣ
    Exp,
    /// ln x
    Log,
    /// sin x
    Sin,
    /// cos x
    Cos,
    /// tanh x
    Tanh,
    /// erf x
    Erf,
    /// x/2·(1 + tanh(√(2/π)(x + 0.044715x³)))
    Gelu,
    /// x/2·(1 + erf(x/√2))
    GeluErf,
    /// max(x, 0)
    Relu,
    /// x/(1 + e⁻ˣ)
    Silu,
    /// 1/(1 + e⁻ˣ)
    Sigmoid,
    /// ⌊x⌋
    Floor,
    /// ⌈x⌉
    Ceil,
    /// The nearest integer, halves away from zero.
    Round,
    /// −1, 0 or 1
    Sign,
}

/// The function at one point.
#[must_use]
pub(crate) fn unary_at(f: Unary, x: f64) -> f64 {
    match f {
        Unary::Neg => -x,
        Unary::Abs => x.abs(),
        Unary::Recip => 1.0 / x,
        Unary::Sqr => x * x,
        Unary::Sqrt => libm::sqrt(x),
        Unary::Rsqrt => 1.0 / libm::sqrt(x),
        Unary::Exp => libm::exp(x),
        Unary::Log => libm::log(x),
        Unary::Sin => libm::sin(x),
        Unary::Cos => libm::cos(x),
        Unary::Tanh => libm::tanh(x),
        Unary::Erf => libm::erf(x),
        Unary::Gelu => {
            // 1 + tanh(y) = 2/(1 + e⁻²ʸ), without the cancellation near −1
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            x / (1.0 + libm::exp(-2.0 * y))
        }
        // 1 + erf(y) = erfc(−y), without the cancellation near −1
        Unary::GeluErf => 0.5 * x * libm::erfc(-x / std::f64::consts::SQRT_2),
        Unary::Relu => {
            if x > 0.0 {
                x
            } else {
                0.0
            }
        }
        Unary::Silu => x / (1.0 + libm::exp(-x)),
        Unary::Sigmoid => 1.0 / (1.0 + libm::exp(-x)),
        Unary::Floor => x.floor(),
        Unary::Ceil => x.ceil(),
        Unary::Round => x.round(),
        Unary::Sign => {
            if x > 0.0 {
                1.0
            } else if x < 0.0 {
                -1.0
            } else {
                0.0
            }
        }
    }
}

/// The function of every element.
#[must_use]
pub fn unary(f: Unary, x: &Arr) -> Arr {
    x.map(|x| unary_at(f, x))
}

/// Functions of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// a + b
    Add,
    /// a − b
    Sub,
    /// a·b
    Mul,
    /// a/b
    Div,
    /// The larger one.
    Maximum,
    /// The smaller one.
    Minimum,
    /// aᵇ
    Pow,
}

fn zip(a: &Arr, b: &Arr, f: impl Fn(f64, f64) -> f64) -> Result<Arr> {
    let dims = broadcast_dims(&a.dims, &b.dims)?;
    let data = indices(&dims)
        .map(|i| f(a.data[broadcast_offset(&a.dims, &i)], b.data[broadcast_offset(&b.dims, &i)]))
        .collect();
    Ok(Arr { dims, data })
}

/// The function of every pair of elements, with broadcasting.
///
/// # Errors
/// When the shapes do not broadcast.
pub fn binary(f: Binary, a: &Arr, b: &Arr) -> Result<Arr> {
    zip(a, b, |a, b| match f {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Maximum => {
            if a > b {
                a
            } else {
                b
            }
        }
        Binary::Minimum => {
            if a < b {
                a
            } else {
                b
            }
        }
        Binary::Pow => libm::pow(a, b),
    })
}

/// Comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// a = b
    Eq,
    /// a ≠ b
    Ne,
    /// a < b
    Lt,
    /// a ≤ b
    Le,
    /// a > b
    Gt,
    /// a ≥ b
    Ge,
}

/// 1 where the comparison holds, else 0, with broadcasting.
///
/// # Errors
/// When the shapes do not broadcast.
pub fn compare(f: Compare, a: &Arr, b: &Arr) -> Result<Arr> {
    zip(a, b, |a, b| {
        let holds = match f {
            Compare::Eq => a == b,
            Compare::Ne => a != b,
            Compare::Lt => a < b,
            Compare::Le => a <= b,
            Compare::Gt => a > b,
            Compare::Ge => a >= b,
        };
        f64::from(u8::from(holds))
    })
}

/// `a` where the condition is not 0, else `b`, with broadcasting.
///
/// # Errors
/// When the shapes do not broadcast.
pub fn select(condition: &Arr, a: &Arr, b: &Arr) -> Result<Arr> {
    let dims = broadcast_dims(&condition.dims, &broadcast_dims(&a.dims, &b.dims)?)?;
    let data = indices(&dims)
        .map(|i| {
            if condition.data[broadcast_offset(&condition.dims, &i)] != 0.0 {
                a.data[broadcast_offset(&a.dims, &i)]
            } else {
                b.data[broadcast_offset(&b.dims, &i)]
            }
        })
        .collect();
    Ok(Arr { dims, data })
}
