//! The row program: straight-line code over the elements of a row, with reductions between them.

use super::prepared::Prepared;
use crate::error::{Error, Result};
use candle_core::DType;
use std::collections::HashMap;

/// Arithmetic type of all registers of a program.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// Reads and writes u8, f16, bf16 and f32; computes in f32.
    F32,
    /// Reads and writes u8, f32 and f64; computes in f64.
    F64,
}

impl Class {
    /// The class that computes for a float dtype; `None` for any other dtype.
    pub fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F16 | DType::BF16 | DType::F32 => Some(Class::F32),
            DType::F64 => Some(Class::F64),
            _ => None,
        }
    }

    /// Whether inputs of this dtype may be read.
    pub fn reads(self, dtype: DType) -> bool {
        match self {
            Class::F32 => matches!(dtype, DType::U8 | DType::F16 | DType::BF16 | DType::F32),
            Class::F64 => matches!(dtype, DType::U8 | DType::F32 | DType::F64),
        }
    }

    /// Whether outputs of this dtype may be written.
    pub fn writes(self, dtype: DType) -> bool {
        self.reads(dtype)
    }

    /// Bytes of one register element.
    pub fn size(self) -> usize {
        match self {
            Class::F32 => 4,
            Class::F64 => 8,
        }
    }
}

/// A value of a program: the result of instruction `i` is `Reg(i)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Reg(pub u16);

/// How often a value exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Kind {
    /// Once per program.
    Const,
    /// Once per row.
    Row,
    /// Once per element.
    Vec,
}

/// Functions of one argument. NaN in gives NaN out unless said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum UnaryFn {
    /// -x
    Neg,
    /// |x|
    Abs,
    /// 1/x
    Recip,
    /// x·x
    Sqr,
    /// √x
    Sqrt,
    /// 1/√x, computed as the reciprocal of the rounded square root
    Rsqrt,
    /// eˣ
    Exp,
    /// Natural logarithm
    Log,
    /// Sine of radians
    Sin,
    /// Cosine of radians
    Cos,
    /// Hyperbolic tangent
    Tanh,
    /// Error function
    Erf,
    /// 0.5·x·(1 + tanh(√(2/π)·x·(1 + 0.044715·x²)))
    Gelu,
    /// 0.5·x·(1 + erf(x/√2))
    GeluErf,
    /// max(x, 0); NaN gives 0, as Candle's does
    Relu,
    /// x/(1 + e⁻ˣ)
    Silu,
    /// 1/(1 + e⁻ˣ)
    Sigmoid,
    /// Largest integer not above x
    Floor,
    /// Smallest integer not below x
    Ceil,
    /// Nearest integer, halves away from zero
    Round,
    /// -1, 0 or 1; NaN gives 0, as Candle's does
    Sign,
}

/// Functions of two arguments; comparisons give 1 or 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BinaryFn {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// a · b
    Mul,
    /// a / b
    Div,
    /// a / b where b is a number per row, by a reciprocal of twice the precision: off by up to 0.5 + 2⁻²¹ units in the last place (1
    /// near the end of the range). A division wherever b is not per row, in f64, and on machines without a fused multiply-add.
    Quotient,
    /// `if a < b { b } else { a }`: a NaN in `a` stays, a NaN in `b` is dropped, as in Candle's `maximum`
    Max,
    /// `if a > b { b } else { a }`: a NaN in `a` stays, a NaN in `b` is dropped, as in Candle's `minimum`
    Min,
    /// a to the power of b (the platform's `pow`)
    Pow,
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

/// Reductions over the elements of a row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ReduceFn {
    /// Sum in an order that the row's length alone decides; 0 over no elements.
    Sum,
    /// Largest element; -∞ over no elements. As in Candle's `max`, a NaN counts only where it is the row's first element.
    Max,
    /// Smallest element; +∞ over no elements. As in Candle's `min`, a NaN counts only where it is the row's first element.
    Min,
}

/// Storage types whose precision `Instr::Round` imposes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FloatKind {
    /// Half precision.
    F16,
    /// Brain float.
    BF16,
    /// Single precision (no change in class F32).
    F32,
}

/// One instruction. Arguments are earlier registers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Instr {
    /// The element of an input; `Kind::Vec`.
    Load {
        /// Index of the input.
        input: u16,
    },
    /// The value of an input that does not vary along the row axes; `Kind::Row`.
    LoadRow {
        /// Index of the input.
        input: u16,
    },
    /// A scalar given at run time; `Kind::Const`.
    Param {
        /// Index of the parameter.
        index: u16,
    },
    /// Number of elements of a row; `Kind::Const`.
    RowLen,
    /// A function of one argument; its kind.
    Unary(UnaryFn, Reg),
    /// A function of two arguments; the larger kind.
    Binary(BinaryFn, Reg, Reg),
    /// `c != 0 ? a : b` for `Select(c, a, b)`; the largest kind. A NaN condition counts as true.
    Select(Reg, Reg, Reg),
    /// Rounds to a storage type's precision and back; the argument's kind.
    Round(FloatKind, Reg),
    /// Reduces a `Kind::Vec` argument over the row; `Kind::Row`.
    Reduce(ReduceFn, Reg),
    /// √(sum/n + eps) with n the number of elements of a row and eps a run-time scalar, in f64 and rounded once; the
    /// argument's kind. What a norm divides by: taken step by step, its four roundings would show in the result.
    RootMean {
        /// The sum over the row.
        sum: Reg,
        /// Index of the parameter eps.
        eps: u16,
    },
}

impl Instr {
    /// Calls `f` with each argument.
    pub(crate) fn each_arg(&self, mut f: impl FnMut(Reg)) {
        match *self {
            Instr::Load { .. } | Instr::LoadRow { .. } | Instr::Param { .. } | Instr::RowLen => {}
            Instr::Unary(_, a) | Instr::Round(_, a) | Instr::Reduce(_, a) | Instr::RootMean { sum: a, .. } => f(a),
            Instr::Binary(_, a, b) => {
                f(a);
                f(b);
            }
            Instr::Select(c, a, b) => {
                f(c);
                f(a);
                f(b);
            }
        }
    }
}

/// A validated program. Build one with [`RowProgram::builder`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RowProgram {
    /// Arithmetic type.
    pub(crate) class: Class,
    /// Straight-line code.
    pub(crate) instrs: Vec<Instr>,
    /// Registers that are stored, and as which dtype.
    pub(crate) outputs: Vec<(Reg, DType)>,
    /// Number of inputs.
    pub(crate) inputs: u16,
    /// Number of run-time scalars.
    pub(crate) params: u16,
    /// What follows from the above.
    pub(crate) prepared: Prepared,
}

/// The kind of each register.
///
/// # Errors
/// `InvalidProgram` naming the instruction that breaks a rule.
pub(crate) fn kinds(instrs: &[Instr]) -> Result<Vec<Kind>> {
    if instrs.len() > usize::from(u16::MAX) {
        return Err(Error::program(format!("{} instructions, at most {} are allowed", instrs.len(), u16::MAX)));
    }
    let mut out: Vec<Kind> = Vec::with_capacity(instrs.len());
    for (i, instr) in instrs.iter().enumerate() {
        let mut kind = Kind::Const;
        let mut bad = None;
        instr.each_arg(|r| match out.get(usize::from(r.0)) {
            Some(&k) => kind = kind.max(k),
            None => bad = Some(r),
        });
        if let Some(r) = bad {
            return Err(Error::program(format!(
                "instruction {i} ({instr:?}) reads register {} before it is written",
                r.0
            )));
        }
        out.push(match instr {
            Instr::Load { .. } => Kind::Vec,
            Instr::LoadRow { .. } => Kind::Row,
            Instr::Reduce(..) if kind != Kind::Vec => {
                return Err(Error::program(format!(
                    "instruction {i} ({instr:?}) reduces a value that does not vary along the row"
                )))
            }
            Instr::Reduce(..) => Kind::Row,
            _ => kind,
        });
    }
    Ok(out)
}

impl RowProgram {
    /// Starts a program.
    pub fn builder(class: Class) -> Builder {
        Builder { class, instrs: Vec::new(), seen: HashMap::new(), outputs: Vec::new() }
    }

    /// Arithmetic type of all registers.
    pub fn class(&self) -> Class {
        self.class
    }

    /// The code; instruction `i` writes register `i`.
    pub fn instrs(&self) -> &[Instr] {
        &self.instrs
    }

    /// The registers that are stored, and as which dtype.
    pub fn outputs(&self) -> &[(Reg, DType)] {
        &self.outputs
    }

    /// Number of inputs.
    pub fn inputs(&self) -> u16 {
        self.inputs
    }

    /// Number of run-time scalars.
    pub fn params(&self) -> u16 {
        self.params
    }

    /// Kind of a register; `None` if the program has no such register.
    pub fn kind_of(&self, reg: Reg) -> Option<Kind> {
        self.prepared.kinds().get(usize::from(reg.0)).copied()
    }

    /// Elements of output `i` over a space of `dims` whose row axes are the bits of `row_axes`:
    /// all elements for `Kind::Vec`, one per row for `Kind::Row`, 1 for `Kind::Const`, 0 if there is no output `i`.
    pub fn output_len(&self, i: usize, dims: &[usize], row_axes: u32) -> usize {
        let kind = self.outputs.get(i).and_then(|&(r, _)| self.kind_of(r));
        match kind {
            None => 0,
            Some(kind) => kind_len(kind, dims, row_axes),
        }
    }
}

/// How many values of a kind there are.
pub(crate) fn kind_len(kind: Kind, dims: &[usize], row_axes: u32) -> usize {
    match kind {
        Kind::Const => 1,
        Kind::Vec => crate::view::count(dims),
        Kind::Row => {
            let outer: crate::view::Dims =
                dims.iter().enumerate().filter(|&(i, _)| !is_row_axis(row_axes, i)).map(|(_, &d)| d).collect();
            crate::view::count(&outer)
        }
    }
}

/// Whether axis `i` is set in the mask.
pub(crate) fn is_row_axis(row_axes: u32, i: usize) -> bool {
    i < 32 && row_axes >> i & 1 == 1
}

/// Builds a [`RowProgram`]; identical instructions become one.
#[derive(Clone, Debug)]
pub struct Builder {
    class: Class,
    instrs: Vec<Instr>,
    seen: HashMap<Instr, Reg>,
    outputs: Vec<(Reg, DType)>,
}

impl Builder {
    /// The arithmetic type of the program.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Adds any instruction, or finds the identical one. Rules are checked by [`Builder::finish`].
    pub fn push(&mut self, instr: Instr) -> Reg {
        if let Some(&r) = self.seen.get(&instr) {
            return r;
        }
        // A program that overflows the register space is refused in `finish`.
        let reg = Reg(u16::try_from(self.instrs.len()).unwrap_or(u16::MAX));
        self.instrs.push(instr);
        self.seen.insert(instr, reg);
        reg
    }

    /// The element of input `input`.
    pub fn load(&mut self, input: u16) -> Reg {
        self.push(Instr::Load { input })
    }

    /// The value of input `input`, which does not vary along the row axes.
    pub fn load_row(&mut self, input: u16) -> Reg {
        self.push(Instr::LoadRow { input })
    }

    /// Run-time scalar `index`.
    pub fn param(&mut self, index: u16) -> Reg {
        self.push(Instr::Param { index })
    }

    /// Number of elements of a row.
    pub fn row_len(&mut self) -> Reg {
        self.push(Instr::RowLen)
    }

    /// `f(a)`.
    pub fn unary(&mut self, f: UnaryFn, a: Reg) -> Reg {
        self.push(Instr::Unary(f, a))
    }

    /// `f(a, b)`.
    pub fn binary(&mut self, f: BinaryFn, a: Reg, b: Reg) -> Reg {
        self.push(Instr::Binary(f, a, b))
    }

    /// `c != 0 ? a : b`.
    pub fn select(&mut self, c: Reg, a: Reg, b: Reg) -> Reg {
        self.push(Instr::Select(c, a, b))
    }

    /// Rounds to a storage type's precision and back.
    pub fn round(&mut self, to: FloatKind, a: Reg) -> Reg {
        self.push(Instr::Round(to, a))
    }

    /// Reduces `a` over the row axes.
    pub fn reduce(&mut self, f: ReduceFn, a: Reg) -> Reg {
        self.push(Instr::Reduce(f, a))
    }

    /// √(sum/n + eps), n being the number of elements of a row and eps run-time scalar `eps`.
    pub fn root_mean(&mut self, sum: Reg, eps: u16) -> Reg {
        self.push(Instr::RootMean { sum, eps })
    }

    /// Stores a register as `dtype`; the order of calls is the order of the outputs.
    pub fn output(&mut self, reg: Reg, dtype: DType) {
        self.outputs.push((reg, dtype));
    }

    /// Kind of a register so far; `None` for an unknown one.
    pub fn kind_of(&self, reg: Reg) -> Option<Kind> {
        kinds(&self.instrs).ok()?.get(usize::from(reg.0)).copied()
    }

    /// Validates and closes the program. The numbers of inputs and parameters are the largest used plus one.
    ///
    /// # Errors
    /// `InvalidProgram` naming the rule that is broken.
    pub fn finish(self) -> Result<RowProgram> {
        let (mut inputs, mut params) = (0u16, 0u16);
        for instr in &self.instrs {
            match *instr {
                Instr::Load { input } | Instr::LoadRow { input } => {
                    inputs = inputs.max(input.saturating_add(1));
                }
                Instr::Param { index } | Instr::RootMean { eps: index, .. } => {
                    params = params.max(index.saturating_add(1));
                }
                _ => {}
            }
        }
        let kinds = kinds(&self.instrs)?;
        if self.outputs.is_empty() {
            return Err(Error::program("no output"));
        }
        for &(reg, dtype) in &self.outputs {
            if kinds.get(usize::from(reg.0)).is_none() {
                return Err(Error::program(format!("output of unknown register {}", reg.0)));
            }
            if !self.class.writes(dtype) {
                return Err(Error::program(format!("class {:?} cannot write {}", self.class, dtype.as_str())));
            }
        }
        let prepared = Prepared::new(&self.instrs, kinds);
        Ok(RowProgram { class: self.class, instrs: self.instrs, outputs: self.outputs, inputs, params, prepared })
    }
}
