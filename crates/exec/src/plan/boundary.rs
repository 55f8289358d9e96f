//! Why two steps are not one.

use std::fmt;

/// Beyond this many inputs or ops a row program costs more registers than fusing saves.
pub(crate) const MAX_INPUTS: usize = 16;
/// See [`MAX_INPUTS`].
pub(crate) const MAX_MEMBERS: usize = 48;

/// Why an op does not run in one row program with an op whose result it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Boundary {
    /// The options say so.
    Off,
    /// The op of this name, one of the two, has a kernel of its own.
    Kernel(&'static str),
    /// The op of this name, one of the two, shows the other's elements in other places: nothing is computed.
    View(&'static str),
    /// The op of this name, one of the two, is Candle's own.
    Candle(&'static str),
    /// The program would have more ops than one may.
    Full,
    /// One computes in f32, the other in f64.
    Classes,
    /// One value per row, whose reduced dims are gone, is read as something else than rows.
    Gone,
    /// Both reduce, over different dims.
    OtherRows,
    /// A value per row is reduced again.
    Again,
    /// They run over different shapes.
    OtherShape,
    /// The program would have more inputs than one may.
    Inputs,
    /// The reader reduces rows, and a product is made in parts of them.
    Reduces,
    /// Another step, or the caller, wants the product too.
    Shared,
    /// The reader follows a product of another left side.
    OtherLeft,
    /// The reader comes so long after the product that what the product reads would wait in memory.
    Far,
    /// Something between them is not part of the program, and waits for it.
    Between,
}

impl fmt::Display for Boundary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => write!(f, "fusion is off"),
            Self::Kernel(op) => write!(f, "{op} has a kernel of its own"),
            Self::View(op) => write!(f, "{op} is a view"),
            Self::Candle(op) => write!(f, "{op} is Candle's own"),
            Self::Full => write!(f, "more than {MAX_MEMBERS} ops"),
            Self::Classes => write!(f, "one computes in f32, the other in f64"),
            Self::Gone => write!(f, "the reduced dims are gone: keepdim would keep the rows"),
            Self::OtherRows => write!(f, "they reduce over different dims"),
            Self::Again => write!(f, "a value per row is reduced again"),
            Self::OtherShape => write!(f, "they run over different shapes"),
            Self::Inputs => write!(f, "more than {MAX_INPUTS} inputs"),
            Self::Reduces => write!(f, "the reader reduces rows, which a product makes in parts"),
            Self::Shared => write!(f, "another step, or the caller, wants it too"),
            Self::OtherLeft => write!(f, "the reader is one with a product of another left side"),
            Self::Far => write!(f, "the reader comes too long after it"),
            Self::Between => write!(f, "what lies between them is not fused, and waits for the first"),
        }
    }
}
