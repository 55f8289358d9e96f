//! A case: an op, its scalars, and how to make its inputs.

use crate::reference::Arr;
use crate::rng::Rng;
use crate::value::{to_arr, to_tensor};
use crate::Result;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor, Var};
use candle_lazy_graph::{infer, Dims, Meta, Op, OutMeta};

/// How an input lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layout {
    /// Row-major.
    Contiguous,
    /// The last two dims swapped in memory.
    Transposed,
    /// A box inside a larger tensor: an offset, and gaps between rows.
    Narrowed,
    /// Every other element of the last dim: a stride of two.
    Stepped,
    /// The first dim that is larger than one repeats one slice (stride 0).
    Broadcast,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 5] = [Self::Contiguous, Self::Transposed, Self::Narrowed, Self::Broadcast, Self::Stepped];

    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Contiguous => "contiguous",
            Self::Transposed => "transposed",
            Self::Narrowed => "narrowed",
            Self::Stepped => "stepped",
            Self::Broadcast => "broadcast",
        }
    }
}

/// Which numbers an input holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Domain {
    /// −3…3, with zeros, ties and whole numbers among them.
    Any,
    /// −300…300: beyond what an exponential in f32 or f16 holds.
    Large,
    /// −0.002…0.002: below an eps.
    Tiny,
    /// 0.05…4.
    Positive,
    /// −0.5…0.5: a weight.
    Small,
    /// As [`Domain::Any`] with infinities, NaN, both zeros, the smallest and large numbers.
    Special,
    /// −3…3, one in fifteen infinite or NaN: some rows have one, some have none.
    Rare,
    /// Within two of 2⁶⁰, in i64: numbers that f64 does not tell apart.
    Huge,
    /// Whole numbers 0…n−1.
    Ids(usize),
    /// Whole numbers from the first to the second.
    Between(u8, u8),
    /// 0 or 1.
    Bits,
    /// Whole numbers −8…8 (0…16 where the dtype is unsigned).
    Whole,
    /// 0, −∞ or −2…2: an additive mask; key 0 of a row is never masked.
    Mask,
    /// Cosine (or sine) of ordinary angles.
    Angle,
    /// −1…1: a weight that is quantised before it is used.
    Quantised(GgmlDType),
}

/// How to make an input.
#[derive(Debug, Clone, PartialEq)]
pub struct InputSpec {
    /// The dims.
    pub dims: Vec<usize>,
    /// The dtype.
    pub dtype: DType,
    /// The layout.
    pub layout: Layout,
    /// The numbers.
    pub domain: Domain,
}

impl InputSpec {
    /// An input.
    #[must_use]
    pub fn new(dims: &[usize], dtype: DType, layout: Layout, domain: Domain) -> Self {
        Self { dims: dims.to_vec(), dtype, layout, domain }
    }

    /// Whether the input is a variable where gradients are asked for: a float, no quantised weight, and no mask of two dims (a
    /// constant, as masks mostly are).
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        let quantised = matches!(self.domain, Domain::Quantised(_));
        self.dtype.is_float() && !quantised && !(self.domain == Domain::Mask && self.dims.len() == 2)
    }

    /// The dtype, or the kind of a quantised weight.
    fn holds(&self) -> String {
        match self.domain {
            Domain::Quantised(kind) => format!("{kind:?}"),
            _ => self.dtype.as_str().into(),
        }
    }

    fn number(&self, rng: &mut Rng, at: usize) -> f64 {
        let unsigned = matches!(self.dtype, DType::U8 | DType::U32);
        match self.domain {
            Domain::Large => rng.range(-300.0, 300.0),
            Domain::Tiny => rng.range(-0.002, 0.002),
            Domain::Positive => rng.range(0.05, 4.0),
            Domain::Small => rng.range(-0.5, 0.5),
            Domain::Ids(n) => rng.below(n) as f64,
            Domain::Between(low, high) => (usize::from(low) + rng.below(usize::from(high - low) + 1)) as f64,
            Domain::Bits => rng.below(2) as f64,
            Domain::Whole if unsigned => rng.below(17) as f64,
            Domain::Whole => rng.below(17) as f64 - 8.0,
            Domain::Any if !self.dtype.is_float() => {
                if unsigned {
                    rng.below(17) as f64
                } else {
                    rng.below(17) as f64 - 8.0
                }
            }
            Domain::Any => match rng.below(16) {
                0 => 0.0,
                1 => rng.below(7) as f64 - 3.0,
                2 => rng.below(6) as f64 - 2.5,
                _ => rng.range(-3.0, 3.0),
            },
            Domain::Special => match rng.below(12) {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                3 => -0.0,
                4 => 0.0,
                5 => 6.0e-8,
                6 => rng.range(-1000.0, 1000.0),
                _ => rng.range(-3.0, 3.0),
            },
            Domain::Rare => match rng.below(45) {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                _ => rng.range(-3.0, 3.0),
            },
            Domain::Huge => 2f64.powi(60),
            Domain::Mask => {
                let width = self.dims.last().copied().unwrap_or(1).max(1);
                match rng.below(3) {
                    0 if !at.is_multiple_of(width) => f64::NEG_INFINITY,
                    1 => 0.0,
                    _ => rng.range(-2.0, 2.0),
                }
            }
            Domain::Quantised(_) => rng.range(-1.0, 1.0),
            Domain::Angle => libm::cos(rng.range(-3.0, 3.0)),
        }
    }

    pub(crate) fn fill(&self, dims: &[usize], rng: &mut Rng) -> Arr {
        let count = dims.iter().product();
        Arr { dims: dims.to_vec(), data: (0..count).map(|at| self.number(rng, at)).collect() }
    }

    /// The dims of the tensor that the layout is a view of.
    #[must_use]
    pub fn storage_dims(&self) -> Vec<usize> {
        let mut dims = self.dims.clone();
        let rank = dims.len();
        match self.layout {
            Layout::Contiguous => {}
            Layout::Transposed if rank >= 2 => dims.swap(rank - 1, rank - 2),
            Layout::Narrowed if rank >= 1 => {
                dims[rank - 1] += 3;
                dims[0] += if rank > 1 { 2 } else { 0 };
            }
            Layout::Stepped => dims.push(2),
            Layout::Broadcast => {
                if let Some(d) = dims.iter().position(|&n| n > 1) {
                    dims[d] = 1;
                }
            }
            Layout::Transposed | Layout::Narrowed => {}
        }
        dims
    }

    /// The input as a view of `storage`; a differentiable Candle view.
    ///
    /// # Errors
    /// When Candle refuses.
    pub fn view(&self, storage: &Tensor) -> Result<Tensor> {
        let rank = self.dims.len();
        Ok(match self.layout {
            Layout::Contiguous => storage.clone(),
            Layout::Transposed if rank >= 2 => storage.transpose(rank - 1, rank - 2)?,
            Layout::Narrowed if rank >= 1 => {
                let x = storage.narrow(rank - 1, 2, self.dims[rank - 1])?;
                if rank > 1 {
                    x.narrow(0, 1, self.dims[0])?
                } else {
                    x
                }
            }
            Layout::Stepped => storage.narrow(rank, 1, 1)?.squeeze(rank)?,
            Layout::Broadcast => storage.broadcast_as(&self.dims[..])?,
            Layout::Transposed | Layout::Narrowed => storage.clone(),
        })
    }

    /// Whether the layout differs from row-major at these dims.
    #[must_use]
    pub fn layout_applies(&self) -> bool {
        let rank = self.dims.len();
        match self.layout {
            Layout::Contiguous => true,
            Layout::Transposed => rank >= 2 && self.dims[rank - 1] > 1 && self.dims[rank - 2] > 1,
            Layout::Narrowed => rank >= 1 && self.dims.iter().all(|&n| n > 0),
            Layout::Stepped => self.dims.last().is_some_and(|&n| n > 1) && self.dims.iter().all(|&n| n > 0),
            Layout::Broadcast => self.dims.iter().any(|&n| n > 1),
        }
    }
}

/// An op on inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The op.
    pub op: Op,
    /// Its scalars.
    pub scalars: Vec<f64>,
    /// Its inputs.
    pub inputs: Vec<InputSpec>,
}

impl Case {
    /// A case.
    #[must_use]
    pub fn new(op: Op, scalars: &[f64], inputs: Vec<InputSpec>) -> Self {
        Self { op, scalars: scalars.to_vec(), inputs }
    }

    /// The dtype that names the case: the widest input's float dtype, or the first input's, or the result's.
    #[must_use]
    pub fn dtype(&self) -> DType {
        let float = self.inputs.iter().map(|i| i.dtype).find(|d| d.is_float());
        match (&self.op, float.or(self.inputs.first().map(|i| i.dtype))) {
            (
                Op::Full { dtype, .. }
                | Op::CausalMask { dtype, .. }
                | Op::Arange { dtype, .. }
                | Op::Random { dtype, .. },
                _,
            ) => *dtype,
            (_, Some(dtype)) => dtype,
            (_, None) => DType::F32,
        }
    }

    /// The case in words: op, scalars, inputs.
    #[must_use]
    pub fn name(&self) -> String {
        let inputs: Vec<String> =
            self.inputs.iter().map(|i| format!("{} {:?} {}", i.holds(), i.dims, i.layout.name())).collect();
        let scalars = if self.scalars.is_empty() { String::new() } else { format!(" {:?}", self.scalars) };
        format!("{}{scalars}({})", self.op, inputs.join(", "))
    }

    /// What inference says of the result.
    ///
    /// # Errors
    /// When the case is not legal.
    pub fn infer(&self) -> Result<OutMeta> {
        let metas: Vec<Meta<'_>> = self.inputs.iter().map(|i| Meta { dims: &i.dims, dtype: i.dtype }).collect();
        Ok(infer(&self.op, &metas)?)
    }

    /// The scalars as the op takes them: a number to compare with is converted to the input's dtype first, as Candle does.
    ///
    /// # Errors
    /// When Candle cannot convert.
    pub fn held_scalars(&self) -> Result<Vec<f64>> {
        match (&self.op, self.inputs.first()) {
            (Op::CompareScalar(_), Some(input)) => {
                let scalars = Arr { dims: vec![self.scalars.len()], data: self.scalars.clone() };
                Ok(to_arr(&to_tensor(&scalars, input.dtype)?)?.data)
            }
            _ => Ok(self.scalars.clone()),
        }
    }

    /// Whether some input holds what is not a number, or no number of the references: infinities, NaN, integers beyond 2⁵³.
    #[must_use]
    pub fn is_special(&self) -> bool {
        self.inputs.iter().any(|i| matches!(i.domain, Domain::Special | Domain::Rare | Domain::Huge))
    }

    /// The inputs for a seed.
    ///
    /// # Errors
    /// When Candle cannot make them.
    pub fn inputs(&self, seed: u64) -> Result<Vec<Tensor>> {
        self.views(&self.storages(seed)?)
    }

    /// The inputs as views of `storages`.
    ///
    /// # Errors
    /// When Candle refuses.
    pub fn views(&self, storages: &[Tensor]) -> Result<Vec<Tensor>> {
        storages.iter().zip(&self.inputs).map(|(s, spec)| spec.view(s)).collect()
    }

    /// What the inputs are views of.
    ///
    /// # Errors
    /// When Candle cannot make them.
    pub fn storages(&self, seed: u64) -> Result<Vec<Tensor>> {
        let mut rng = Rng::named(seed, &self.name());
        let storage = |spec: &InputSpec| -> Result<Tensor> {
            let dims = spec.storage_dims();
            if spec.domain == Domain::Huge {
                let data =
                    (0..dims.iter().product()).map(|_| (1i64 << 60) + rng.below(5) as i64 - 2).collect::<Vec<_>>();
                return Ok(Tensor::from_vec(data, dims, &candle_core::Device::Cpu)?);
            }
            to_tensor(&spec.fill(&dims, &mut rng), spec.dtype)
        };
        self.inputs.iter().map(storage).collect()
    }

    /// The same numbers with every tracked input a view of a variable: variables (`None` for integers) and inputs.
    ///
    /// # Errors
    /// When Candle cannot make them.
    pub fn tracked_inputs(&self, seed: u64) -> Result<(Vec<Option<Var>>, Vec<Tensor>)> {
        let mut vars = Vec::new();
        let mut inputs = Vec::new();
        for (storage, spec) in self.storages(seed)?.iter().zip(&self.inputs) {
            if spec.is_tracked() {
                let var = Var::from_tensor(storage)?;
                inputs.push(spec.view(var.as_tensor())?);
                vars.push(Some(var));
            } else {
                inputs.push(spec.view(storage)?);
                vars.push(None);
            }
        }
        Ok((vars, inputs))
    }

    /// The same inputs with other scalars. `None` where there are none, or where they choose what is computed.
    #[must_use]
    pub fn with_other_scalars(&self) -> Option<Self> {
        if self.scalars.is_empty() {
            return None;
        }
        let scalars = self.scalars.iter().map(|s| s * 0.5 + 0.375).collect();
        Some(Self { scalars, ..self.clone() })
    }

    /// The same pattern at other sizes: every size above one doubled, so that equal sizes stay equal and 0 and 1 stay
    /// themselves. `None` where the op does not scale that way.
    #[must_use]
    pub fn at_other_sizes(&self) -> Option<Self> {
        let twice = |n: &usize| if *n > 1 { n * 2 } else { *n };
        let op = match &self.op {
            // a product of sizes does not double with them
            Op::Reshape { shape } => {
                let from = &self.inputs.first()?.dims;
                let grow = from.iter().map(twice).product::<usize>();
                // a size that the input has doubles with it; the first other one takes the rest of the growth
                let mut dims: Vec<usize> = shape.iter().map(|n| if from.contains(n) { twice(n) } else { *n }).collect();
                let have: usize = dims.iter().product();
                if have != grow {
                    let rest = dims.iter().zip(shape).position(|(n, was)| *was > 1 && n == was)?;
                    if have == 0 || !grow.is_multiple_of(have) {
                        return None;
                    }
                    dims[rest] *= grow / have;
                }
                Op::Reshape { shape: Dims::from_slice(&dims) }
            }
            other => other.map_sizes(twice),
        };
        let inputs: Vec<InputSpec> = self
            .inputs
            .iter()
            .map(|i| {
                let dims: Vec<usize> = i.dims.iter().map(twice).collect();
                InputSpec { dims, ..i.clone() }
            })
            .collect();
        let other = Self { op, scalars: self.scalars.clone(), inputs };
        (other.inputs != self.inputs || other.op != self.op).then_some(())?;
        other.infer().ok()?;
        Some(other)
    }
}
