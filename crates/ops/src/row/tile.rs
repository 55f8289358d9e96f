//! The tile interpreter: runs a schedule over a range of rows.

use super::columns;
use super::fuse::Fused;
use super::gather::{gather, scatter};
use super::loops::{self, Arg};
use super::prepared::Resolved;
use super::program::{BinaryFn, Instr, Kind, Reg, RowProgram};
use super::quotient::{normal, quotient, shifted_exp, PerRow};
use super::reduce::{self, Held};
use super::schedule::{Few, Pass, Schedule, NO_SLOT};
use super::space::{Offsets, Space};
use super::whole::{self, Room, Source, What};
use crate::fault;
use crate::math::Real;
use crate::view::{each_dtype, Slice, SliceMut};
use smallvec::{smallvec, SmallVec};

/// How an input is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// In place: dense rows of the register type, this far apart (0: the same row for all).
    Borrowed { pitch: usize },
    /// One row that all rows share, converted once per tile.
    Shared,
    /// One number for each row of a tile.
    PerRow,
    /// Row by row into a tile buffer.
    Copied,
}

/// Everything about a run that does not change from tile to tile.
pub(crate) struct Run<'a, T> {
    pub(crate) program: &'a RowProgram,
    pub(crate) resolved: &'a Resolved,
    pub(crate) schedule: &'a Schedule,
    pub(crate) space: &'a Space,
    pub(crate) inputs: &'a [Slice<'a>],
    /// For each input the output in whose place it is.
    pub(crate) over: &'a [Option<usize>],
    pub(crate) access: &'a [Access],
    /// How far apart each operand's rows are, where it is the same distance everywhere.
    pub(crate) pitches: &'a [Option<usize>],
    /// Index into the space's operands of each output; `None` for constants and row outputs.
    pub(crate) stores: &'a [Option<usize>],
    pub(crate) direct: Few,
    pub(crate) consts: &'a [T],
    pub(crate) params: &'a [f64],
    /// Number of elements of a row of the program, which a segment or an elementwise space may hold a part of.
    pub(crate) row_len: usize,
    pub(crate) tile_rows: usize,
    pub(crate) tile_cols: usize,
    /// Whether tiles lie column by column.
    pub(crate) columns: bool,
}

/// Bytes of a cache line.
pub(super) const LINE_BYTES: usize = 64;

/// Elements of a cache line.
fn per_line<T>() -> usize {
    LINE_BYTES / size_of::<T>()
}

/// A task's scratch.
struct Scratch<'a, T> {
    /// The tile buffers.
    buffers: SmallVec<[&'a mut [T]; 8]>,
    /// The row values of each register that has one per row.
    rows: SmallVec<[Vec<T>; 16]>,
    /// Where each operand's rows begin.
    offsets: SmallVec<[Offsets; 4]>,
}

/// The tile that is being run.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    /// First column.
    col: usize,
    cols: usize,
}

impl<T: Real> Run<'_, T> {
    /// Elements of a tile's buffer, in whole cache lines.
    fn cap(&self) -> usize {
        (self.tile_rows * self.tile_cols).next_multiple_of(per_line::<T>()).max(1)
    }

    /// Runs rows `first..first + rows`; `outs` are the pieces of the outputs that hold exactly these rows.
    pub(crate) fn rows(&self, first: usize, rows: usize, outs: &mut [SliceMut<'_>]) {
        if self.whole_rows(first, rows, outs).is_some() {
            return;
        }
        let cap = self.cap();
        T::scratch(cap * self.schedule.buffers, |memory| {
            let mut scratch = Scratch {
                buffers: memory.chunks_exact_mut(cap).collect(),
                rows: smallvec![Vec::new(); self.program.instrs.len()],
                offsets: smallvec![Offsets::new(); self.space.operands.len()],
            };
            let registers = self.resolved.kinds.iter().zip(&self.program.instrs);
            for (values, (_, instr)) in scratch.rows.iter_mut().zip(registers).filter(|(_, (k, _))| **k == Kind::Row) {
                let numbers = match instr {
                    Instr::Reduce(f, _) => Held::<T>::numbers(*f, self.tile_rows),
                    _ => self.tile_rows,
                };
                values.resize(numbers, T::ZERO);
            }
            self.tiles(first, rows, &mut scratch, outs);
        });
    }

    /// The same where the schedule is one that has a loop of its own, and all that it reads lies in dense rows.
    fn whole_rows(&self, first: usize, rows: usize, outs: &mut [SliceMut<'_>]) -> Option<()> {
        let cols = self.space.cols;
        let whole =
            self.schedule.whole.as_ref().filter(|_| (1..=whole::LONGEST).contains(&cols) && whole::may_run())?;
        let of_input = |i: usize| -> Option<whole::Rows<'_, T>> {
            let Access::Borrowed { pitch } = *self.access.get(i)? else { return None };
            self.pitches.get(i).copied().flatten()?;
            let from = self.space.operands.get(i)?.offset + first * pitch;
            Some(whole::Rows { data: T::of(self.inputs.get(i)?)?.get(from..)?, pitch })
        };
        if whole.inputs().any(|i| of_input(i).is_none()) {
            return None;
        }
        let elements = |x: &Source| {
            let mut rows = x.iter().filter_map(|&i| of_input(i));
            Some(whole::Elements { x: rows.next()?, plus: rows.collect() })
        };
        let (mut out, mut kept) = (None, None);
        for (k, one) in outs.iter_mut().enumerate() {
            let one = T::of_mut(one)?.get_mut(..rows * cols)?;
            *(if k == whole.out { &mut out } else { &mut kept }) = Some(one);
        }
        let out = out?;
        let with_room = |x: &whole::Elements<'_, T>, rows: usize, f: &mut dyn FnMut(Room<'_, T>)| match kept {
            // nothing is taken where nothing is added up
            _ if x.plus.is_empty() => f(Room::None),
            Some(kept) => {
                f(Room::Kept(&mut *kept));
                if let (true, Some(last)) = (fault::active("row.whole.sums"), kept.last_mut()) {
                    *last = fault::nudged(*last);
                }
            }
            None => T::scratch(rows * cols, |room| f(Room::Scratch(room))),
        };
        match &whole.what {
            What::Softmax { x } => {
                let x = elements(x)?;
                with_room(&x, 1, &mut |room| whole::softmax(&x, out, room, cols));
            }
            What::Norm { x, centred, eps, weight, bias } => {
                let x = elements(x)?;
                let (n, eps) = (self.row_len as f64, self.param(*eps));
                let [weight, bias] = [weight, bias].map(|i| i.and_then(of_input));
                let norm = whole::Norm { centred: *centred, n, eps, weight, bias };
                with_room(&x, whole::STEPS, &mut |room| whole::norm(&x, norm, out, room, cols));
            }
        }
        Some(())
    }

    fn tiles(&self, first: usize, rows: usize, scratch: &mut Scratch<'_, T>, outs: &mut [SliceMut<'_>]) {
        // Where this piece begins in each output.
        let base = |o: usize| {
            let mut one = Offsets::new();
            self.space.offsets(&self.space.operands[o], first, 1, &mut one);
            one.first().copied().unwrap_or(0)
        };
        let bases: SmallVec<[Option<(usize, usize)>; 4]> =
            self.stores.iter().map(|store| store.map(|o| (o, base(o)))).collect();
        let mut row = first;
        let mut fresh = true;
        while row < first + rows {
            let n = self.tile_rows.min(first + rows - row);
            for ((operand, pitch), offsets) in self.space.operands.iter().zip(self.pitches).zip(&mut scratch.offsets) {
                match pitch {
                    Some(pitch) => {
                        offsets.clear();
                        offsets.extend((row..row + n).map(|r| operand.offset + r * pitch));
                    }
                    None => self.space.offsets(operand, row, n, offsets),
                }
            }
            for &(o, base) in bases.iter().flatten() {
                for at in &mut scratch.offsets[o] {
                    *at -= base;
                }
            }
            self.tile_of_rows(n, row - first, fresh, scratch, outs);
            fresh = !fault::active("row.stale_sums");
            row += n;
        }
    }

    /// `fresh` says whether sums begin anew, as they do for every tile.
    fn tile_of_rows(
        &self,
        rows: usize,
        local: usize,
        fresh: bool,
        scratch: &mut Scratch<'_, T>,
        outs: &mut [SliceMut<'_>],
    ) {
        for pass in &self.schedule.passes {
            for &i in &pass.before {
                self.row_value(i, rows, &mut scratch.rows, &scratch.offsets);
            }
            for &i in &pass.body {
                if let (Instr::Reduce(f, _), Kind::Row) = (self.program.instrs[i], self.resolved.kinds[i]) {
                    if !fresh {
                        continue;
                    }
                    scratch.rows[i].fill(reduce::reduce_init(f));
                }
            }
            let mut col = 0;
            loop {
                let cols = self.tile_cols.min(self.space.cols - col);
                let tile = Tile { rows, col, cols };
                if !pass.body.is_empty() {
                    self.segment(pass, tile, local, scratch, outs);
                }
                col += cols;
                if col >= self.space.cols {
                    break;
                }
            }
        }
        for (k, &(reg, _)) in self.program.outputs.iter().enumerate() {
            let r = self.root(reg);
            if self.resolved.kinds[r] == Kind::Row {
                let values = &scratch.rows[r][..rows];
                each_dtype!(SliceMut, &mut outs[k], dst => {
                    T::write(values, &mut dst[local..local + rows]);
                });
            }
        }
    }

    fn root(&self, reg: Reg) -> usize {
        self.resolved.alias[usize::from(reg.0)]
    }

    /// Runs one pass over one segment of columns.
    fn segment(&self, pass: &Pass, tile: Tile, local: usize, scratch: &mut Scratch<'_, T>, outs: &mut [SliceMut<'_>]) {
        let len = tile.rows * tile.cols;
        // A sum is complete with its row's last columns: what this pass computes from it reads what a later one would.
        let ends = tile.col + tile.cols >= self.space.cols;
        // what the loops take for rows and columns
        let (outer, inner) = if self.columns { (tile.cols, tile.rows) } else { (tile.rows, tile.cols) };
        let Scratch { buffers, rows: row_values, offsets } = scratch;
        let mut slots: SmallVec<[&mut [T]; 12]> = buffers.iter_mut().map(|b| &mut b[..len]).collect();
        // Outputs that are computed in place are slots like any other.
        let mut stored: SmallVec<[Option<SliceMut<'_>>; 4]> = SmallVec::new();
        for (k, out) in outs.iter_mut().enumerate() {
            let in_place = self.direct.has(k)
                && pass.stores.contains(&k)
                && pass.slots[self.root(self.program.outputs[k].0)] == self.schedule.buffers + k;
            if in_place {
                let at = local * self.space.cols + tile.col;
                let piece = T::of_mut(out).and_then(|o| o.get_mut(at..at + len));
                slots.push(piece.unwrap_or_default());
                stored.push(None);
            } else {
                slots.push(Default::default());
                stored.push(Some(out.reborrow()));
            }
        }
        for &i in &pass.body {
            if let Some(Fused::Squares { x, shift }) = pass.fused[i] {
                let mut acc = std::mem::take(&mut row_values[i]);
                let x = self.arg(x, pass, tile, &slots, row_values, offsets);
                let shift = shift.map(|s| &row_values[self.root(s)][..tile.rows]);
                let mut held = Held::new(&mut acc, self.tile_rows);
                reduce::squares(x, shift, &mut held, tile.rows, tile.cols);
                if ends {
                    held.finish();
                }
                row_values[i] = acc;
                continue;
            }
            if self.resolved.kinds[i] == Kind::Row {
                match self.program.instrs[i] {
                    Instr::Reduce(f, a) => {
                        let mut acc = std::mem::take(&mut row_values[i]);
                        let a = self.arg(a, pass, tile, &slots, row_values, offsets);
                        let reduce = if self.columns { columns::reduce } else { reduce::reduce };
                        let mut held = Held::new(&mut acc, self.tile_rows);
                        reduce(f, a, &mut held, tile.rows, tile.cols, tile.col == 0);
                        if ends {
                            held.finish();
                        }
                        row_values[i] = acc;
                    }
                    _ => self.row_value(i, tile.rows, row_values, offsets),
                }
                continue;
            }
            let slot = pass.slots[i];
            if slot == NO_SLOT {
                continue;
            }
            let mut dst = slots.get_mut(slot).map(std::mem::take).unwrap_or_default();
            match self.program.instrs[i] {
                Instr::Load { input } | Instr::LoadRow { input } => {
                    let input = usize::from(input);
                    match self.over.get(input).copied().flatten() {
                        Some(k) => self.load_output(k, tile, offsets, stored[k].as_ref(), dst),
                        None => self.load(input, tile, offsets, dst),
                    }
                }
                _ if pass.fused[i].is_some() => {
                    let arg = |reg| self.arg(reg, pass, tile, &slots, row_values, offsets);
                    let number = |reg| &row_values[self.root(reg)][..tile.rows];
                    match pass.fused[i] {
                        Some(Fused::ShiftedExp { x, shift }) => {
                            shifted_exp(arg(x), number(shift), dst, tile.cols);
                        }
                        Some(Fused::Normal { x, shift, root, weight, bias }) => {
                            let row = PerRow { shift: shift.map(number), root: number(root) };
                            normal(arg(x), row, weight.map(arg), bias.map(arg), dst, tile.cols);
                        }
                        Some(Fused::Affine { x, mul, add }) => {
                            let [mul, add] = [mul, add].map(|reg| self.consts[self.root(reg)]);
                            loops::affine(arg(x), mul, add, dst, outer, inner);
                        }
                        Some(Fused::Absorbed | Fused::Squares { .. }) | None => {}
                    }
                }
                Instr::Unary(f, a) => {
                    let a = self.arg(a, pass, tile, &slots, row_values, offsets);
                    loops::unary(f, a, dst, outer, inner);
                }
                Instr::Binary(BinaryFn::Quotient, a, b) if self.resolved.kinds[self.root(b)] == Kind::Row => {
                    let d = &row_values[self.root(b)][..tile.rows];
                    let a = self.arg(a, pass, tile, &slots, row_values, offsets);
                    quotient(a, d, dst, outer, inner, self.columns);
                }
                Instr::Binary(f, a, b) => {
                    let a = self.arg(a, pass, tile, &slots, row_values, offsets);
                    let b = self.arg(b, pass, tile, &slots, row_values, offsets);
                    loops::binary(f, a, b, dst, outer, inner);
                }
                Instr::Select(c, a, b) => {
                    let c = self.arg(c, pass, tile, &slots, row_values, offsets);
                    let a = self.arg(a, pass, tile, &slots, row_values, offsets);
                    let b = self.arg(b, pass, tile, &slots, row_values, offsets);
                    loops::select(c, a, b, dst, outer, inner);
                }
                Instr::Round(to, a) => {
                    let a = self.arg(a, pass, tile, &slots, row_values, offsets);
                    loops::round(to, a, dst, outer, inner);
                }
                Instr::RootMean { sum, eps } => {
                    let sum = self.arg(sum, pass, tile, &slots, row_values, offsets);
                    loops::root_mean(sum, self.row_len as f64, self.param(eps), dst, outer, inner);
                }
                // Constants are not in a body, and a reduction is a row value or an alias.
                Instr::Param { .. } | Instr::RowLen | Instr::Reduce(..) => {}
            }
            if let Some(s) = slots.get_mut(slot) {
                *s = std::mem::take(&mut dst);
            }
        }
        for &k in &pass.stores {
            let (Some(out), Some(o)) = (&mut stored[k], self.stores[k]) else {
                continue;
            };
            let reg = self.program.outputs[k].0;
            let arg = self.arg(reg, pass, tile, &slots, row_values, offsets);
            let Arg::Vec { data, pitch } = arg else {
                continue;
            };
            let shape = &self.space.operands[o].row;
            each_dtype!(SliceMut, out, dst => {
                let scatter = if self.columns { columns::scatter } else { scatter };
                scatter(data, pitch, &offsets[o], shape, tile.col, tile.cols, dst);
            });
        }
    }

    fn param(&self, index: u16) -> f64 {
        self.params.get(usize::from(index)).copied().unwrap_or(f64::NAN)
    }

    /// An argument as the loops take it.
    fn arg<'b>(
        &'b self,
        reg: Reg,
        pass: &Pass,
        tile: Tile,
        slots: &'b [&mut [T]],
        rows: &'b [Vec<T>],
        offsets: &[Offsets],
    ) -> Arg<'b, T> {
        let r = self.root(reg);
        match self.resolved.kinds[r] {
            Kind::Const => Arg::Const(self.consts[r]),
            Kind::Row if self.columns => Arg::Vec { data: &rows[r][..tile.rows], pitch: 0 },
            Kind::Row => Arg::Row(&rows[r][..tile.rows]),
            Kind::Vec => {
                let (input, access) = match self.program.instrs[r] {
                    Instr::Load { input } | Instr::LoadRow { input } => {
                        let input = usize::from(input);
                        (input, self.access[input])
                    }
                    _ => (0, Access::Copied),
                };
                match access {
                    Access::Borrowed { pitch } => {
                        let at = offsets[input].first().copied().unwrap_or(0) + tile.col;
                        let data = T::of(&self.inputs[input]).and_then(|d| d.get(at..));
                        Arg::Vec { data: data.unwrap_or_default(), pitch }
                    }
                    Access::PerRow => {
                        let data = slots.get(pass.slots[r]).and_then(|s| s.get(..tile.rows));
                        Arg::Row(data.unwrap_or_default())
                    }
                    shared_or_copied => {
                        let data = slots.get(pass.slots[r]).map(|s| &**s).unwrap_or_default();
                        let pitch = match (shared_or_copied == Access::Shared, self.columns) {
                            (true, _) => 0,
                            (false, true) => tile.rows,
                            (false, false) => tile.cols,
                        };
                        Arg::Vec { data, pitch }
                    }
                }
            }
        }
    }

    /// Reads the columns of an input into a tile buffer.
    fn load(&self, input: usize, tile: Tile, offsets: &[Offsets], dst: &mut [T]) {
        let rows = match self.access[input] {
            Access::Shared => tile.rows.min(1),
            _ => tile.rows,
        };
        let shape = &self.space.operands[input].row;
        let cols = if self.access[input] == Access::PerRow { tile.cols.min(1) } else { tile.cols };
        each_dtype!(Slice, &self.inputs[input], src => {
            let gather = if self.columns { columns::gather } else { gather };
            gather(src, &offsets[input][..rows], shape, tile.col, cols, dst);
        });
    }

    /// Reads what the columns of an output held before into a tile buffer: its stores come behind all instructions.
    fn load_output(&self, k: usize, tile: Tile, offsets: &[Offsets], out: Option<&SliceMut<'_>>, dst: &mut [T]) {
        let (Some(out), Some(o)) = (out, self.stores[k]) else {
            return;
        };
        let shape = &self.space.operands[o].row;
        each_dtype!(SliceMut, out, src => gather(src, &offsets[o][..tile.rows], shape, tile.col, tile.cols, dst));
        if let (true, Some(last)) = (fault::active("row.in_place.tail"), dst.last_mut()) {
            *last = T::ZERO;
        }
    }

    /// Computes a value that exists once per row, from others of its kind.
    fn row_value(&self, i: usize, n: usize, rows: &mut [Vec<T>], offsets: &[Offsets]) {
        let mut out = std::mem::take(&mut rows[i]);
        {
            let dst = &mut out[..n];
            let arg = |reg: Reg| {
                let r = self.root(reg);
                match self.resolved.kinds[r] {
                    Kind::Const => Arg::Const(self.consts[r]),
                    _ => Arg::Vec { data: &rows[r], pitch: n },
                }
            };
            match self.program.instrs[i] {
                Instr::LoadRow { input } => {
                    let input = usize::from(input);
                    each_dtype!(Slice, &self.inputs[input], src => {
                        let fixed = fault::active("row.load_row");
                        for (d, &at) in dst.iter_mut().zip(&offsets[input]) {
                            let at = if fixed { offsets[input][0] } else { at };
                            *d = T::get(src[at]);
                        }
                    });
                }
                Instr::Unary(f, a) => loops::unary(f, arg(a), dst, 1, n),
                Instr::Binary(f, a, b) => loops::binary(f, arg(a), arg(b), dst, 1, n),
                Instr::Select(c, a, b) => loops::select(arg(c), arg(a), arg(b), dst, 1, n),
                Instr::Round(to, a) => loops::round(to, arg(a), dst, 1, n),
                Instr::RootMean { sum, eps } => {
                    loops::root_mean(arg(sum), self.row_len as f64, self.param(eps), dst, 1, n);
                }
                Instr::Load { .. } | Instr::Param { .. } | Instr::RowLen | Instr::Reduce(..) => {}
            }
        }
        rows[i] = out;
    }
}
