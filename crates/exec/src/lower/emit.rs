//! From a group of ops to a row program.
//!
//! Each recorded op rounds to its own dtype; inside a composite nothing is rounded. That makes a result independent of
//! what was fused: the same bits with one op per program or with forty.

use super::heads::Products;
use super::units::{Group, PerRow, Units};
use super::{origin, output};
use crate::error::{Error, Result};
use crate::plan::{EpilogueStep, HeadStep, Output, SourceStep, Step, StepKind};
use candle_core::DType;
use candle_lazy_graph::{BinaryOp, CmpOp, FastMap, Graph, Op, ReduceOp, Sym, UnaryOp};
use candle_lazy_ops::fault;
use candle_lazy_ops::row::{emit, BinaryFn, Builder, Class, FloatKind, ReduceFn, Reg, RowProgram, UnaryFn};
use smallvec::SmallVec;

struct Emitter<'a> {
    graph: &'a Graph,
    units: &'a Units,
    unit: usize,
    group: &'a Group,
    builder: Builder,
    regs: FastMap<u32, Reg>,
    inputs: SmallVec<[u32; 4]>,
    params: SmallVec<[u32; 4]>,
}

/// A group's program, and what it is bound to: inputs and scalars as node and scalar numbers.
struct Emitted {
    program: Box<RowProgram>,
    inputs: SmallVec<[u32; 4]>,
    params: SmallVec<[u32; 4]>,
    outputs: SmallVec<[Output; 2]>,
}

/// The members in their order.
fn ordered(group: &Group) -> Vec<u32> {
    let mut members = group.members.clone();
    members.sort_unstable();
    members
}

fn emit_group(graph: &Graph, units: &Units, unit: usize, group: &Group) -> Result<Emitted> {
    let mut emitter = Emitter {
        graph,
        units,
        unit,
        group,
        builder: RowProgram::builder(group.class),
        regs: FastMap::default(),
        inputs: SmallVec::new(),
        params: SmallVec::new(),
    };
    let members = ordered(group);
    for &id in &members {
        let reg = emitter.node(id)?;
        emitter.regs.insert(id, reg);
    }
    let mut outputs = SmallVec::new();
    for &id in &members {
        if units.is_needed(id) {
            let node = &graph.nodes[id as usize];
            let reg = emitter.regs.get(&id).copied().ok_or_else(|| missing(id))?;
            emitter.builder.output(reg, node.dtype);
            outputs.push(output(id, node));
        }
    }
    let program = emitter.builder.finish().map_err(|e| Error::Internal(format!("row program: {e}")))?;
    Ok(Emitted { program: Box::new(program), inputs: emitter.inputs, params: emitter.params, outputs })
}

/// A step of these recorded ops, the last of which an error names.
fn step(graph: &Graph, members: &[u32], kind: StepKind, emitted: (SmallVec<[u32; 4]>, SmallVec<[u32; 4]>)) -> Step {
    let (inputs, params) = emitted;
    Step {
        kind,
        inputs,
        outputs: SmallVec::new(),
        params,
        boundaries: SmallVec::new(),
        free_after: SmallVec::new(),
        origin: members.last().map_or(0, |&id| origin(graph, id)),
        ops: members.iter().filter_map(|&id| graph.nodes[id as usize].op()).map(Op::name).collect(),
        origins: members.iter().map(|&id| origin(graph, id)).collect(),
    }
}

pub(super) fn row_step(graph: &Graph, units: &Units, unit: usize, group: &Group) -> Result<Step> {
    let Emitted { program, inputs, params, outputs } = emit_group(graph, units, unit, group)?;
    let kind = StepKind::Row { program, domain: group.domain.clone(), axes: group.axes.unwrap_or(0) };
    Ok(Step { outputs, ..step(graph, &ordered(group), kind, (inputs, params)) })
}

pub(super) fn products_step(graph: &Graph, units: &Units, unit: usize, products: &Products) -> Result<Step> {
    let mut inputs: SmallVec<[u32; 4]> = SmallVec::new();
    let mut number = |id: u32| match inputs.iter().position(|&i| i == id) {
        Some(at) => at as u32,
        None => {
            inputs.push(id);
            inputs.len() as u32 - 1
        }
    };
    let (mut params, mut outputs) = (SmallVec::<[u32; 4]>::new(), SmallVec::<[Output; 2]>::new());
    let mut heads = Vec::with_capacity(products.heads.len());
    for head in &products.heads {
        let mut rights = SmallVec::new();
        for &product in &head.products {
            let node = &graph.nodes[product as usize];
            let [x, w] = node.inputs.as_slice() else { return Err(missing(product)) };
            // the left side is the first input of all
            number(*x);
            rights.push((number(*w), matches!(node.op(), Some(Op::Linear { .. }))));
        }
        let first = head.products.first().ok_or_else(|| Error::Internal("a head without a product".into()))?;
        let node = &graph.nodes[*first as usize];
        let epilogue = match &head.epilogue {
            None => {
                outputs.push(output(*first, node));
                None
            }
            Some(group) => {
                let emitted = emit_group(graph, units, unit, group)?;
                let source = |id: &u32| match head.products.iter().position(|p| p == id) {
                    Some(product) => SourceStep::Product(product as u32),
                    None => SourceStep::Input(number(*id)),
                };
                let sources = emitted.inputs.iter().map(source).collect();
                let own = params.len()..params.len() + emitted.params.len();
                params.extend(emitted.params);
                outputs.extend(emitted.outputs);
                Some(EpilogueStep { program: emitted.program, inputs: sources, params: own })
            }
        };
        heads.push(HeadStep { dims: node.dims.clone(), rights, epilogue });
    }
    let kind = StepKind::Products { heads };
    Ok(Step { outputs, ..step(graph, &products.members, kind, (inputs, params)) })
}

fn missing(id: u32) -> Error {
    Error::Internal(format!("node %{id} was not emitted"))
}

impl Emitter<'_> {
    /// The register of an input: a member's, or a load.
    fn input(&mut self, id: u32, per_row: bool) -> Result<Reg> {
        // of a step's members the products are no registers: an epilogue loads them
        if self.units.unit_of(id) == Some(self.unit) && self.group.members.contains(&id) {
            return self.regs.get(&id).copied().ok_or_else(|| missing(id));
        }
        let number = match self.inputs.iter().position(|&i| i == id) {
            Some(_) if fault::active("emit.input_number") => self.inputs.len() - 1,
            Some(number) => number,
            None => {
                self.inputs.push(id);
                self.inputs.len() - 1
            }
        };
        let number = u16::try_from(number).map_err(|_| Error::Internal("too many inputs".into()))?;
        let row = per_row || !self.varies_along_rows(id);
        let row = row || self.group.axes.is_some() && fault::active("emit.load_row");
        Ok(if row { self.builder.load_row(number) } else { self.builder.load(number) })
    }

    /// Whether an input counts as having a value per element: it has more than one element along the reduced dims, or these
    /// dims have size one, where per row and per element are the same.
    fn varies_along_rows(&self, id: u32) -> bool {
        let dims = &self.graph.nodes[id as usize].dims;
        let rank = self.group.domain.len();
        let Some(axes) = self.group.axes else {
            return true;
        };
        let reduced = |d: &usize| axes & (1 << *d) != 0;
        // aligned at the end: a missing dim is a broadcast one
        let varies = |d: usize| (d + dims.len()).checked_sub(rank).is_some_and(|i| dims[i] != Sym::ONE);
        (0..rank).filter(reduced).any(varies) || (0..rank).filter(reduced).all(|d| self.group.domain[d] == Sym::ONE)
    }

    fn param(&mut self, param: u32) -> Result<Reg> {
        let number = self.param_index(param)?;
        Ok(self.builder.param(number))
    }

    /// Number of a scalar among the program's parameters.
    fn param_index(&mut self, param: u32) -> Result<u16> {
        let number = match self.params.iter().position(|&p| p == param) {
            _ if fault::active("emit.first_param") && !self.params.is_empty() => 0,
            Some(number) => number,
            None => {
                self.params.push(param);
                self.params.len() - 1
            }
        };
        u16::try_from(number).map_err(|_| Error::Internal("too many scalars".into()))
    }

    /// A scalar rounded to the dtype that Candle would convert it to.
    fn rounded_param(&mut self, param: u32, dtype: DType) -> Result<Reg> {
        let reg = self.param(param)?;
        Ok(self.rounded(reg, dtype))
    }

    fn rounded(&mut self, reg: Reg, dtype: DType) -> Reg {
        if fault::active("emit.unrounded") {
            return reg;
        }
        match dtype {
            DType::F16 => self.builder.round(FloatKind::F16, reg),
            DType::BF16 => self.builder.round(FloatKind::BF16, reg),
            DType::F32 if self.group.class == Class::F64 => self.builder.round(FloatKind::F32, reg),
            _ => reg,
        }
    }

    fn node(&mut self, id: u32) -> Result<Reg> {
        let node = &self.graph.nodes[id as usize];
        let Some(op) = node.op() else {
            return Err(Error::Internal(format!("leaf %{id} in a row program")));
        };
        let mut x: SmallVec<[Reg; 4]> = SmallVec::new();
        let per_row = self.units.per_row[id as usize] == PerRow::Kept;
        for &input in &node.inputs {
            x.push(self.input(input, per_row && !matches!(op, Op::Reduce { .. }))?);
        }
        let arg = |i: usize| x.get(i).copied().ok_or_else(|| missing(id));
        let fail = |e: candle_lazy_ops::Error| Error::Internal(format!("row program of {}: {e}", op.name()));
        let reg = match op {
            Op::Unary(f) => {
                let f = unary(*f);
                self.builder.unary(f, arg(0)?)
            }
            Op::Binary(f) => self.builder.binary(binary(*f), arg(0)?, arg(1)?),
            Op::Compare(f) => self.builder.binary(compare(*f), arg(0)?, arg(1)?),
            Op::CompareScalar(f) => {
                let dtype = self.graph.nodes[node.inputs[0] as usize].dtype;
                let scalar = if fault::active("emit.unrounded_scalar") {
                    self.param(node.params[0])?
                } else {
                    self.rounded_param(node.params[0], dtype)?
                };
                self.builder.binary(compare(*f), arg(0)?, scalar)
            }
            Op::Affine => {
                let (mul, add) = (self.param(node.params[0])?, self.param(node.params[1])?);
                if fault::active("emit.affine_order") {
                    let sum = self.builder.binary(BinaryFn::Add, arg(0)?, add);
                    self.builder.binary(BinaryFn::Mul, sum, mul)
                } else {
                    let product = self.builder.binary(BinaryFn::Mul, arg(0)?, mul);
                    self.builder.binary(BinaryFn::Add, product, add)
                }
            }
            Op::Powf => {
                let e = self.param(node.params[0])?;
                let f = if fault::active("emit.powf") { BinaryFn::Mul } else { BinaryFn::Pow };
                self.builder.binary(f, arg(0)?, e)
            }
            Op::Where if fault::active("emit.where_arms") => self.builder.select(arg(0)?, arg(2)?, arg(1)?),
            Op::Elu => {
                let alpha = self.rounded_param(node.params[0], node.dtype)?;
                emit::elu(&mut self.builder, arg(0)?, alpha)
            }
            Op::Clamp => {
                let low = self.rounded_param(node.params[0], node.dtype)?;
                let high = self.rounded_param(node.params[1], node.dtype)?;
                emit::clamp(&mut self.builder, arg(0)?, low, high)
            }
            Op::Where => self.builder.select(arg(0)?, arg(1)?, arg(2)?),
            Op::Cast(_) => arg(0)?,
            Op::Reduce { axes: 0, .. } => arg(0)?,
            Op::Reduce { op, .. } => self.reduce(*op, arg(0)?).map_err(fail)?,
            Op::Softmax { .. } => emit::softmax(&mut self.builder, arg(0)?).map_err(fail)?,
            Op::LogSoftmax { .. } => emit::log_softmax(&mut self.builder, arg(0)?).map_err(fail)?,
            Op::RmsNorm { weight } => {
                let eps = self.param_index(node.params[0])?;
                let weight = if *weight { Some(arg(1)?) } else { None };
                emit::rms_norm(&mut self.builder, arg(0)?, weight, eps).map_err(fail)?
            }
            Op::LayerNorm { weight, bias } => {
                let eps = self.param_index(node.params[0])?;
                let w = if *weight { Some(arg(1)?) } else { None };
                let b = if *bias { Some(arg(1 + usize::from(*weight))?) } else { None };
                let (w, b) = if fault::active("emit.layer_norm_operands") { (b, w) } else { (w, b) };
                emit::layer_norm(&mut self.builder, arg(0)?, w, b, eps).map_err(fail)?
            }
            Op::Glu { act } => {
                let act = if fault::active("emit.glu_act") { &UnaryOp::Tanh } else { act };
                let gate = self.builder.unary(unary(*act), arg(0)?);
                self.builder.binary(BinaryFn::Mul, gate, arg(1)?)
            }
            other => return Err(Error::Internal(format!("{} in a row program", other.name()))),
        };
        Ok(self.rounded(reg, node.dtype))
    }

    fn reduce(&mut self, op: ReduceOp, x: Reg) -> candle_lazy_ops::Result<Reg> {
        Ok(match op {
            ReduceOp::Sum => self.builder.reduce(ReduceFn::Sum, x),
            ReduceOp::Max => self.builder.reduce(ReduceFn::Max, x),
            ReduceOp::Min => self.builder.reduce(ReduceFn::Min, x),
            ReduceOp::Mean if fault::active("emit.mean_is_sum") => self.builder.reduce(ReduceFn::Sum, x),
            ReduceOp::Mean => emit::mean(&mut self.builder, x),
            ReduceOp::Var => emit::var(&mut self.builder, x)?,
            ReduceOp::LogSumExp => emit::log_sum_exp(&mut self.builder, x)?,
        })
    }
}

pub(crate) fn unary(op: UnaryOp) -> UnaryFn {
    match op {
        UnaryOp::Neg => UnaryFn::Neg,
        UnaryOp::Abs => UnaryFn::Abs,
        UnaryOp::Recip => UnaryFn::Recip,
        UnaryOp::Sqr => UnaryFn::Sqr,
        UnaryOp::Sqrt => UnaryFn::Sqrt,
        UnaryOp::Rsqrt => UnaryFn::Rsqrt,
        UnaryOp::Exp => UnaryFn::Exp,
        UnaryOp::Log => UnaryFn::Log,
        UnaryOp::Sin => UnaryFn::Sin,
        UnaryOp::Cos => UnaryFn::Cos,
        UnaryOp::Tanh => UnaryFn::Tanh,
        UnaryOp::Erf => UnaryFn::Erf,
        UnaryOp::Gelu => UnaryFn::Gelu,
        UnaryOp::GeluErf => UnaryFn::GeluErf,
        UnaryOp::Relu => UnaryFn::Relu,
        UnaryOp::Silu => UnaryFn::Silu,
        UnaryOp::Sigmoid => UnaryFn::Sigmoid,
        UnaryOp::Floor => UnaryFn::Floor,
        UnaryOp::Ceil => UnaryFn::Ceil,
        UnaryOp::Round => UnaryFn::Round,
        UnaryOp::Sign => UnaryFn::Sign,
    }
}

pub(crate) fn binary(op: BinaryOp) -> BinaryFn {
    match op {
        BinaryOp::Add => BinaryFn::Add,
        BinaryOp::Sub => BinaryFn::Sub,
        BinaryOp::Mul => BinaryFn::Mul,
        BinaryOp::Div => BinaryFn::Div,
        BinaryOp::Maximum => BinaryFn::Max,
        BinaryOp::Minimum => BinaryFn::Min,
        BinaryOp::Pow => BinaryFn::Pow,
    }
}

fn compare(op: CmpOp) -> BinaryFn {
    match op {
        CmpOp::Eq => BinaryFn::Eq,
        CmpOp::Ne => BinaryFn::Ne,
        CmpOp::Lt => BinaryFn::Lt,
        CmpOp::Le => BinaryFn::Le,
        CmpOp::Gt => BinaryFn::Gt,
        CmpOp::Ge => BinaryFn::Ge,
    }
}
