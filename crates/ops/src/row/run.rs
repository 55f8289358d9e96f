//! Checking a run's operands, choosing tiles and tasks, and running them.

use super::loops::{self, Arg};
use super::program::{is_row_axis, kind_len, Class, Instr, Kind, RowProgram};
use super::reduce::SEGMENT;
use super::schedule::{Facts, Few};
use super::space::{Operand, Space};
use super::tile::{Access, Run, LINE_BYTES};
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels::team;
use crate::math::Real;
use crate::view::{count, each_dtype, row_major, Dims, Slice, SliceMut, Strided, View};
use candle_core::DType;
use smallvec::{smallvec, SmallVec};

const OP: &str = "row program";
/// Elements of a tile: a handful of buffers of this size stays in the first two cache levels.
const TILE: usize = 2048;
/// Rows longer than this run in segments.
const RESIDENT: usize = 8192;
/// Rows per tile where neighbouring rows share cache lines.
const STRIDED_ROWS: usize = 16;
/// Below this much work (elements times [`RowProgram::cost`], some ten microseconds) a run stays on the caller's thread.
const PARALLEL: usize = 1 << 18;
/// So much of it a thread does in a nanosecond.
pub(super) const WORK_PER_NS: usize = 26;
/// A task shorter than this costs more to begin than it evens out.
const TASK_NS: usize = 5_000;

/// For each input the output in whose place it is.
pub(super) type Over = SmallVec<[Option<usize>; 6]>;

/// An element of a dtype.
fn one_of(dtype: DType) -> Slice<'static> {
    match dtype {
        DType::U8 => Slice::U8(&[0]),
        DType::U32 => Slice::U32(&[0]),
        DType::I64 => Slice::I64(&[0]),
        DType::BF16 => Slice::BF16(&[half::bf16::ZERO]),
        DType::F16 => Slice::F16(&[half::f16::ZERO]),
        DType::F64 => Slice::F64(&[0.0]),
        // no output has another dtype
        _ => Slice::F32(&[0.0]),
    }
}

/// Shape of the tiles of a run.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    rows: usize,
    cols: usize,
}

fn tiling(space: &Space, elementwise: bool, strided: bool) -> Tiling {
    let n = space.cols;
    let (rows, cols) = if n == 0 {
        (SEGMENT, 0)
    } else if strided {
        let cols = n.min(if elementwise { 256 } else { SEGMENT });
        ((2 * TILE / cols).max(STRIDED_ROWS), cols)
    } else if elementwise {
        let cols = n.min(TILE);
        ((TILE / cols).max(1), cols)
    } else if n <= RESIDENT {
        ((TILE / n).max(1), n)
    } else {
        (1, 4 * SEGMENT)
    };
    Tiling { rows: rows.min(space.rows.max(1)), cols }
}

/// An input of a run.
#[derive(Clone, Debug)]
pub enum Input<'a> {
    /// Elements as they lie.
    View(View<'a>),
    /// What the output of this number holds before the run: the run is *in place*.
    Output(usize),
}

impl RowProgram {
    /// Runs the program over a space of `dims`, whose row axes are the bits of `row_axes` (0: elementwise;
    /// a row is then one element).
    ///
    /// Each input's layout has exactly `dims`, with stride 0 along broadcast axes; an input read by
    /// `LoadRow` has size 1 or stride 0 along the row axes. Outputs are contiguous and fully written: `Kind::Vec` in row-major
    /// order of `dims`, `Kind::Row` row-major without the row axes, `Kind::Const` one element. Lengths are
    /// those of [`RowProgram::output_len`].
    ///
    /// An output's bits depend on the row's elements and length only: not on layouts, thread count, or the number of rows.
    ///
    /// # Errors
    /// `InvalidProgram`, `ShapeMismatch`, `DTypeMismatch`, `OutOfBounds`; nothing is written then.
    pub fn run(
        &self,
        dims: &[usize],
        row_axes: u32,
        inputs: &[View<'_>],
        params: &[f64],
        outputs: &mut [SliceMut<'_>],
    ) -> Result<()> {
        self.check(dims, row_axes, inputs, params, outputs)?;
        let over = SmallVec::from_elem(None, inputs.len());
        self.of_class(dims, row_axes, (inputs, &over), params, outputs);
        Ok(())
    }

    /// Runs an elementwise program over a space of `dims`, some of whose inputs are what an output holds before: a tile of such an output is
    /// read before it is written. Each of these outputs has one element for each of `dims`; for the rest as [`run`](Self::run), whose bits
    /// it gives.
    ///
    /// # Errors
    /// As [`run`](Self::run), and `InvalidProgram` for an output in whose place [nothing may stand](Self::may_run_in_place); nothing is
    /// written then.
    pub fn run_in_place(
        &self,
        dims: &[usize],
        inputs: &[Input<'_>],
        params: &[f64],
        outputs: &mut [SliceMut<'_>],
    ) -> Result<()> {
        let mut views: SmallVec<[View<'_>; 6]> = SmallVec::new();
        let mut over: Over = SmallVec::new();
        for input in inputs {
            match input {
                Input::View(view) => {
                    views.push(view.clone());
                    over.push(None);
                }
                Input::Output(k) => {
                    let Some(out) = outputs.get(*k).filter(|_| self.may_run_in_place(*k)) else {
                        return Err(Error::program(format!("no output {k} with a value for each element")));
                    };
                    // one element for all: the checks ask its dtype and dims, and nobody reads it
                    let layout = Strided { dims: dims.into(), strides: smallvec![0; dims.len()], offset: 0 };
                    views.push(View { data: one_of(out.dtype()), layout });
                    over.push(Some(*k));
                }
            }
        }
        self.check(dims, 0, &views, params, outputs)?;
        for (view, over) in views.iter_mut().zip(&over) {
            if over.is_some() {
                view.layout = Strided::contiguous(dims);
            }
        }
        self.of_class(dims, 0, (&views, &over), params, outputs);
        Ok(())
    }

    /// Whether output `k` of an elementwise run has a value of its own for each element, so that it may be in the place of an input.
    #[must_use]
    pub fn may_run_in_place(&self, k: usize) -> bool {
        let kinds = &self.prepared.resolved(true).kinds;
        self.outputs.get(k).is_some_and(|(reg, _)| kinds.get(usize::from(reg.0)) == Some(&Kind::Vec))
    }

    fn of_class(
        &self,
        dims: &[usize],
        row_axes: u32,
        inputs: (&[View<'_>], &Over),
        params: &[f64],
        outputs: &mut [SliceMut<'_>],
    ) {
        match self.class {
            Class::F32 => self.typed::<f32>(dims, row_axes, inputs, params, outputs),
            Class::F64 => self.typed::<f64>(dims, row_axes, inputs, params, outputs),
        }
    }

    fn check(
        &self,
        dims: &[usize],
        row_axes: u32,
        inputs: &[View<'_>],
        params: &[f64],
        outputs: &[SliceMut<'_>],
    ) -> Result<()> {
        if dims.len() > 32 || (dims.len() < 32 && row_axes >> dims.len() != 0) {
            return Err(Error::shape(OP, format!("row axes {row_axes:#b} on {} dims", dims.len())));
        }
        let counts = [
            ("inputs", usize::from(self.inputs), inputs.len()),
            ("parameters", usize::from(self.params), params.len()),
            ("outputs", self.outputs.len(), outputs.len()),
        ];
        for (what, want, got) in counts {
            if want != got {
                return Err(Error::shape(OP, format!("{want} {what} wanted, {got} given")));
            }
        }
        for (i, v) in inputs.iter().enumerate() {
            v.check()?;
            if v.dims() != dims {
                return Err(Error::shape(OP, format!("input {i} has dims {:?}, the space {dims:?}", v.dims())));
            }
            if !self.class.reads(v.dtype()) {
                return Err(Error::dtype(OP, format!("class {:?} cannot read {}", self.class, v.dtype().as_str())));
            }
        }
        for instr in &self.instrs {
            if let Instr::LoadRow { input } = *instr {
                let varies = inputs.get(usize::from(input)).is_some_and(|v| {
                    (0..dims.len()).any(|a| is_row_axis(row_axes, a) && dims[a] > 1 && v.layout.strides[a] != 0)
                });
                if varies {
                    return Err(Error::shape(
                        OP,
                        format!("input {input} is read once per row but varies along the row axes"),
                    ));
                }
            }
        }
        for (i, (out, &(reg, dtype))) in outputs.iter().zip(&self.outputs).enumerate() {
            if out.dtype() != dtype {
                return Err(Error::dtypes(OP, &format!("output {i}"), dtype, out.dtype()));
            }
            let want = self.kind_of(reg).map_or(0, |k| kind_len(k, dims, row_axes));
            if out.len() != want {
                return Err(Error::shape(OP, format!("output {i} needs {want} elements, has {}", out.len())));
            }
        }
        Ok(())
    }

    fn typed<T: Real>(
        &self,
        dims: &[usize],
        row_axes: u32,
        (inputs, over): (&[View<'_>], &Over),
        params: &[f64],
        outputs: &mut [SliceMut<'_>],
    ) {
        let row_len: usize =
            (0..dims.len()).filter(|&a| is_row_axis(row_axes, a)).fold(1usize, |n, a| n.saturating_mul(dims[a]));
        let consts = self.constants::<T>(params, row_len);
        let elementwise = row_axes == 0;
        let kinds = &self.prepared.resolved(elementwise).kinds;

        // Operands of the space: the inputs, then the outputs that have one value per element.
        let mut layouts: SmallVec<[Strided; 4]> = inputs.iter().map(|v| v.layout.clone()).collect();
        let out_strides: Dims = row_major(dims);
        let mut stores: SmallVec<[Option<usize>; 4]> = SmallVec::new();
        let mut outs: SmallVec<[SliceMut<'_>; 4]> = SmallVec::new();
        for (out, &(reg, _)) in outputs.iter_mut().zip(&self.outputs) {
            let r = usize::from(reg.0);
            let mut out = out.reborrow();
            stores.push(None);
            match kinds[r] {
                Kind::Const => {
                    let v = consts[r];
                    each_dtype!(SliceMut, &mut out, dst => dst.fill(v.put()));
                    // Written: the tasks get an empty piece.
                    out = out.split_at(0).0;
                }
                Kind::Row => {}
                Kind::Vec => {
                    if let Some(s) = stores.last_mut() {
                        *s = Some(layouts.len());
                    }
                    layouts.push(Strided { dims: dims.into(), strides: out_strides.clone(), offset: 0 });
                }
            }
            outs.push(out);
        }
        let space = Space::new(dims, row_axes, &layouts);
        // Without elements only reductions have something to say.
        let per_row = self.outputs.iter().any(|&(r, _)| kinds[usize::from(r.0)] == Kind::Row);
        if space.rows == 0 || (count(dims) == 0 && !per_row) {
            return;
        }
        let data: SmallVec<[Slice<'_>; 4]> = inputs.iter().map(|v| v.data).collect();
        let job =
            Job { program: self, elementwise, data: &data, over, stores: &stores, consts: &consts, params, row_len };
        match space.split_row(TILE).filter(|_| elementwise) {
            Some((main, rest)) => {
                let cut = main.rows * main.cols;
                let (mut heads, mut tails) = (SmallVec::<[_; 4]>::new(), SmallVec::<[_; 4]>::new());
                for (out, store) in outs.into_iter().zip(&stores) {
                    let (a, b) = out.split_at(if store.is_some() { cut } else { 0 });
                    heads.push(a);
                    tails.push(b);
                }
                job.run(&main, heads, 0);
                if let Some(rest) = rest.filter(|_| !fault::active("row.split.rest")) {
                    job.run(&rest, tails, cut);
                }
            }
            None => job.run(&space, outs, 0),
        }
    }

    /// Evaluates what exists once per program.
    fn constants<T: Real>(&self, params: &[f64], row_len: usize) -> SmallVec<[T; 16]> {
        let kinds = self.prepared.kinds();
        let mut out = smallvec![T::ZERO; self.instrs.len()];
        for (i, instr) in self.instrs.iter().enumerate() {
            if kinds[i] != Kind::Const {
                continue;
            }
            let arg = |r: super::Reg| Arg::Const(out[usize::from(r.0)]);
            let mut v = [T::ZERO];
            match *instr {
                Instr::Param { index } => {
                    let p = params.get(usize::from(index)).copied();
                    v = [p.unwrap_or(f64::NAN).put_as()];
                }
                Instr::RowLen => v = [((row_len + fault::one_if("row.row_len")) as f64).put_as()],
                Instr::Unary(f, a) => loops::unary(f, arg(a), &mut v, 1, 1),
                Instr::Binary(f, a, b) => loops::binary(f, arg(a), arg(b), &mut v, 1, 1),
                Instr::Select(c, a, b) => loops::select(arg(c), arg(a), arg(b), &mut v, 1, 1),
                Instr::Round(to, a) => loops::round(to, arg(a), &mut v, 1, 1),
                Instr::RootMean { sum, eps } => {
                    let eps = params.get(usize::from(eps)).copied().unwrap_or(f64::NAN);
                    loops::root_mean(arg(sum), row_len as f64, eps, &mut v, 1, 1);
                }
                Instr::Load { .. } | Instr::LoadRow { .. } | Instr::Reduce(..) => {}
            }
            out[i] = v[0];
        }
        out
    }

    /// How many threads a run over so many elements may use.
    fn threads(&self, elements: usize) -> usize {
        threads(self.work(elements))
    }

    /// What so many elements cost, roughly, in additions.
    fn work(&self, elements: usize) -> usize {
        elements.saturating_mul(self.prepared.cost)
    }

    /// About how many nanoseconds one thread needs for so many elements.
    pub(crate) fn cost_ns(&self, elements: usize) -> usize {
        self.work(elements) / WORK_PER_NS
    }

    /// An upper bound, in bytes, on the scratch that a run over this space allocates, over all threads of the current pool.
    pub fn scratch_bytes(&self, dims: &[usize], row_axes: u32) -> usize {
        let n: usize =
            (0..dims.len()).filter(|&a| is_row_axis(row_axes, a)).fold(1usize, |n, a| n.saturating_mul(dims[a]));
        let total = count(dims);
        if total == 0 {
            return 0;
        }
        // The largest tile any layout can lead to, see `tiling`.
        let tile = if row_axes == 0 {
            2 * TILE
        } else {
            let dense = if n <= RESIDENT { n.max(TILE) } else { 4 * SEGMENT };
            dense.max(STRIDED_ROWS * n.min(SEGMENT)).max(2 * TILE)
        }
        .min(total.max(1));
        let threads = self.threads(total);
        // a register's buffer is whole cache lines, and the first one begins on a line
        let per_reg = tile.saturating_mul(self.class.size()).next_multiple_of(LINE_BYTES);
        per_reg.saturating_mul(self.instrs.len()).saturating_add(LINE_BYTES).saturating_mul(threads)
    }
}

/// Conversion of a run-time scalar to a register type.
trait PutAs {
    fn put_as<T: Real>(self) -> T;
}

impl PutAs for f64 {
    fn put_as<T: Real>(self) -> T {
        T::from_f64(self)
    }
}

/// A program bound to its operands.
struct Job<'a, T> {
    program: &'a RowProgram,
    elementwise: bool,
    data: &'a [Slice<'a>],
    over: &'a Over,
    stores: &'a [Option<usize>],
    consts: &'a [T],
    params: &'a [f64],
    row_len: usize,
}

impl<T: Real> Job<'_, T> {
    /// Whether tiles lie column by column: where what is written, or else what is read, has far elements in a row and near rows.
    fn in_columns(&self, space: &Space) -> bool {
        let near = |o: &Operand| o.outer.last() == Some(&1) && o.row.single().is_none_or(|s| s > 1);
        let mut written = self.stores.iter().flatten().filter_map(|&o| space.operands.get(o)).peekable();
        let rows = space.outer.last().copied().unwrap_or(1);
        let columns = match written.peek() {
            Some(_) => written.all(near),
            None => space.operands.iter().any(near),
        };
        !self.elementwise && rows >= STRIDED_ROWS && columns
    }

    /// Runs all rows of a space; `outs` begin `skipped` elements into the outputs they were cut from.
    fn run(&self, space: &Space, outs: SmallVec<[SliceMut<'_>; 4]>, skipped: usize) {
        // The output operands are addressed from the start of `outs`.
        let mut space = space.clone();
        for o in self.stores.iter().flatten() {
            if let Some(operand) = space.operands.get_mut(*o) {
                operand.offset -= skipped;
            }
        }
        let space = &space;
        let strided = space.operands.iter().any(|o| o.row.single().is_none_or(|s| s > 1));
        let mut tiles = tiling(space, self.elementwise, strided);
        let segmented = tiles.cols < space.cols;
        let columns = self.in_columns(space);

        let pitches: SmallVec<[Option<usize>; 4]> = space.operands.iter().map(|o| space.pitch(o)).collect();
        let mut borrowed = Few::default();
        let mut access: SmallVec<[Access; 4]> = SmallVec::new();
        for (i, (data, operand)) in self.data.iter().zip(&space.operands).enumerate() {
            let pitch = if tiles.rows == 1 { Some(pitches[i].unwrap_or(0)) } else { pitches[i] };
            access.push(match (pitch, operand.row.single()) {
                // read before its output is written
                _ if self.over.get(i).is_some_and(Option::is_some) => Access::Copied,
                (Some(pitch), Some(1)) if T::of(data).is_some() && !columns && borrowed.add(i) => {
                    Access::Borrowed { pitch }
                }
                (_, Some(0)) if self.elementwise && !columns => Access::PerRow,
                (Some(0), _) if tiles.rows > 1 && !columns => Access::Shared,
                _ => Access::Copied,
            });
        }
        // What rows share is gathered once, and a number of a row once for it, but an output is stored element by element: an input that is an
        // output must fill its tile.
        let resolved = self.program.prepared.resolved(self.elementwise);
        for &(reg, _) in &self.program.outputs {
            let root = resolved.alias.get(usize::from(reg.0)).copied();
            if let Some(Instr::Load { input } | Instr::LoadRow { input }) =
                root.and_then(|r| self.program.instrs.get(r))
            {
                if let Some(a) = access.get_mut(usize::from(*input)) {
                    if matches!(a, Access::Shared | Access::PerRow) && !fault::active("row.shared_output") {
                        *a = Access::Copied;
                    }
                }
            }
        }
        let block = space.block_rows(self.stores.iter().flatten().copied());
        let mut direct = Few::default();
        for (k, (out, store)) in outs.iter().zip(self.stores).enumerate() {
            let dense = store.is_some_and(|o| space.operands[o].row.single() == Some(1));
            // a later instruction may read what the output held before
            let dense = dense && !self.over.contains(&Some(k));
            if !columns && dense && block == 1 && out.dtype() == T::DTYPE && (tiles.rows == 1 || !segmented) {
                direct.add(k);
            }
        }
        let facts = Facts { elementwise: self.elementwise, segmented, columns, borrowed, direct };
        let schedule = self.program.schedule(facts);
        if schedule.buffers == 0 && !segmented && !strided && pitches.iter().all(Option::is_some) {
            // nothing is kept but rows that are read again while they are near
            let most = if self.elementwise { 8 * TILE } else { 2 * TILE };
            tiles.rows = tiles.rows.max((most / tiles.cols.max(1)).min(space.rows));
        }
        let run = Run {
            program: self.program,
            resolved,
            schedule: &schedule,
            space,
            inputs: self.data,
            over: self.over,
            access: &access,
            pitches: &pitches,
            stores: self.stores,
            direct,
            consts: self.consts,
            params: self.params,
            row_len: self.row_len,
            tile_rows: tiles.rows,
            tile_cols: tiles.cols,
            columns,
        };
        let blocks = space.rows / block.max(1);
        let elements = space.rows.saturating_mul(space.cols);
        let work = self.program.work(elements);
        let Some(per_task) = per_task(work, blocks) else {
            let mut outs = outs;
            run.rows(0, space.rows - fault::one_if("row.last_row").min(space.rows), &mut outs);
            return;
        };
        let per_task = (per_task * block).next_multiple_of(lcm_rows(block, tiles.rows));
        let lost = fault::active("row.last_task");
        let mut tasks = Vec::new();
        let mut rest = outs;
        let mut first = 0;
        while first < space.rows {
            let rows = per_task.min(space.rows - first);
            let mut mine: SmallVec<[SliceMut<'_>; 4]> = SmallVec::new();
            let mut later: SmallVec<[SliceMut<'_>; 4]> = SmallVec::new();
            for (out, store) in rest.into_iter().zip(self.stores) {
                let len = if store.is_some() { rows * space.cols } else { rows };
                let (a, b) = out.split_at(len);
                mine.push(a);
                later.push(b);
            }
            tasks.push((first, rows, mine));
            rest = later;
            first += rows;
        }
        if lost {
            tasks.pop();
        }
        team::each(work / WORK_PER_NS, tasks, |(first, rows, mut outs)| run.rows(first, rows, &mut outs));
    }
}

/// How many threads so much work may use.
fn threads(work: usize) -> usize {
    if work < PARALLEL {
        return 1;
    }
    team::threads()
}

/// How many of `units` that are so much work together a task has; `None` where the caller does all. About four tasks per thread even out, but
/// none is to be over at once.
pub(super) fn per_task(work: usize, units: usize) -> Option<usize> {
    let threads = threads(work);
    (threads > 1 && units > 1).then(|| units.div_ceil((work / WORK_PER_NS / TASK_NS).clamp(threads, threads * 4)))
}

/// Rows per task are a multiple of a block, and of whole tiles where a block is a single row.
fn lcm_rows(block: usize, tile: usize) -> usize {
    if block == 1 {
        tile.max(1)
    } else {
        block
    }
}
