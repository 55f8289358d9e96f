//! LoRA of rows with different adapters: each segment of the rows has its own (the segmented products of Punica, Chen et al.,
//! arXiv:2310.18547, §4).

use super::{lora, PARALLEL, WORK_PER_NS};
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels::{check_float, check_out, copy_into, team};
use crate::view::{count, Dims, SliceMut, Strided, View};
use parking_lot::Mutex;

const OP: &str = "lora_segments";

/// Rows that share an adapter.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// How many rows of no segment come before it.
    pub gap: usize,
    /// How many rows it has.
    pub rows: usize,
    /// The first factor, `(in, r)`.
    pub a: &'a View<'a>,
    /// The second factor, `(r, out)`.
    pub b: &'a View<'a>,
    /// The factor of the product.
    pub scale: f64,
}

impl Segment<'_> {
    /// How many numbers its factors have.
    fn factors(&self) -> usize {
        count(self.a.dims()).saturating_add(count(self.b.dims()))
    }

    /// How many multiplications it takes.
    fn work(&self) -> usize {
        self.rows.saturating_mul(self.factors())
    }
}

/// Rows of one segment, or of none.
struct Task<'a, 'o> {
    x: View<'a>,
    base: View<'a>,
    of: Option<Segment<'a>>,
    out: SliceMut<'o>,
}

impl Task<'_, '_> {
    /// Whether all threads work on its rows together, as [`lora`] has them.
    fn is_long(&self) -> bool {
        self.of.is_some_and(|of| of.work() >= PARALLEL)
    }

    /// About how many nanoseconds one thread takes for it.
    fn ns(&self) -> usize {
        let bytes = self.x.dtype().size_in_bytes();
        let moving = |numbers: usize| team::moving_bytes(numbers.saturating_mul(bytes));
        // a few rows take as long as the factors need to come from memory
        let product = self.of.map_or(0, |of| (of.work() / WORK_PER_NS).max(moving(of.factors())));
        moving(count(self.base.dims())).saturating_add(product)
    }

    fn run(mut self) -> Result<()> {
        match self.of {
            Some(of) => lora(&self.x, of.a, of.b, Some(&self.base), of.scale, &mut self.out),
            None => copy_into(&self.base, &mut self.out, &Strided::contiguous(self.base.dims())),
        }
    }
}

/// Some rows of one matrix of a tensor `(…, n, width)`; `index` counts the matrices in row-major order.
fn rows_of<'a>(of: &View<'a>, mut index: usize, start: usize, rows: usize) -> Result<View<'a>> {
    let Strided { dims, strides, offset } = &of.layout;
    let rank = dims.len();
    let mut at = *offset + start * strides[rank - 2];
    for (&size, &stride) in dims[..rank - 2].iter().zip(&strides[..rank - 2]).rev() {
        at += index % size.max(1) * stride;
        index /= size.max(1);
    }
    let (dims, strides) = (Dims::from_slice(&[rows, dims[rank - 1]]), Dims::from_slice(&strides[rank - 2..]));
    View::new(of.data, Strided { dims, strides, offset: at })
}

/// `base`, plus `(x·A)·B·scale` in the rows of each segment with its own factors: x `(…, n, in)`, base and output `(…, n, out)`. The
/// segments follow one another along the n rows, of every matrix of x alike. A row's bits are those that [`lora`](super::lora()) gives its segment.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `Unsupported` (not a float), `OutOfBounds`.
pub fn lora_segments<'a>(
    x: &View<'a>,
    base: &View<'a>,
    segments: &[Segment<'a>],
    out: &mut SliceMut<'_>,
) -> Result<()> {
    x.check()?;
    base.check()?;
    check_float(OP, x.dtype())?;
    let bad = |what: String| Error::shape(OP, format!("{what}, x {:?}, base {:?}", x.dims(), base.dims()));
    let ([lead @ .., n, k], [base_lead @ .., base_n, width]) = (x.dims(), base.dims()) else {
        return Err(bad("no rows".into()));
    };
    if lead != base_lead || n != base_n {
        return Err(bad("other rows".into()));
    }
    if base.dtype() != x.dtype() {
        return Err(Error::dtypes(OP, "the base", x.dtype(), base.dtype()));
    }
    let mut covered = 0usize;
    for (i, of) in segments.iter().enumerate() {
        of.a.check()?;
        of.b.check()?;
        if let Some(other) = [of.a, of.b].into_iter().find(|v| v.dtype() != x.dtype()) {
            return Err(Error::dtypes(OP, "a factor", x.dtype(), other.dtype()));
        }
        if !matches!((of.a.dims(), of.b.dims()), ([ka, r], [rb, nb]) if ka == k && r == rb && nb == width) {
            return Err(bad(format!("A {:?} and B {:?} of segment {i}", of.a.dims(), of.b.dims())));
        }
        covered = covered.saturating_add(of.gap).saturating_add(of.rows);
    }
    if covered > *n {
        return Err(bad(format!("segments of {covered} rows")));
    }
    check_out(OP, out, x.dtype(), count(base.dims()))?;
    let mut tasks = Vec::new();
    let mut rest = out.reborrow();
    for index in 0..count(lead) {
        let mut start = 0;
        let mut take = |rows: usize, of: Option<Segment<'a>>| -> Result<()> {
            let from = if fault::active("lora_segments.start") && of.is_some() { 0 } else { start };
            let (x, base) = (rows_of(x, index, from, rows)?, rows_of(base, index, start, rows)?);
            start += rows;
            let (out, left) = std::mem::replace(&mut rest, SliceMut::U8(&mut [])).split_at(rows * width);
            rest = left;
            if rows > 0 {
                tasks.push(Task { x, base, of, out });
            }
            Ok(())
        };
        for of in segments {
            take(of.gap, None)?;
            let adapter = if fault::active("lora_segments.first") { &segments[0] } else { of };
            take(of.rows, Some(Segment { rows: of.rows, ..*adapter }))?;
        }
        take(n - covered, None)?;
    }
    let (long, short): (Vec<_>, Vec<_>) = tasks.into_iter().partition(Task::is_long);
    long.into_iter().try_for_each(Task::run)?;
    let failed = Mutex::new(None);
    team::each(short.iter().map(Task::ns).fold(0, usize::saturating_add), short, |task| {
        if let Err(error) = task.run() {
            failed.lock().get_or_insert(error);
        }
    });
    failed.into_inner().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Slice;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 61) as f32 * 0.03 - 0.9).collect()
    }

    fn view<'a>(data: &'a [f32], dims: &[usize]) -> View<'a> {
        View::new(Slice::F32(data), Strided::contiguous(dims)).unwrap()
    }

    proptest! {
        #[test]
        fn a_row_is_that_of_its_segment_alone(
            matrices in 1usize..3,
            sizes in prop::collection::vec((0usize..3, 0usize..5, 1usize..70), 1..6),
            behind in 0usize..3,
            turned in any::<bool>(),
        ) {
            let (k, width) = (24, 17);
            let n = sizes.iter().map(|(gap, rows, _)| gap + rows).sum::<usize>() + behind;
            let (x, base) = (numbers(matrices * n * k, 1), numbers(matrices * n * width, 2));
            // the same matrices, of which the outer dim is the inner one in memory
            let x_view = if turned {
                View::new(Slice::F32(&x), Strided::contiguous(&[n, matrices, k]).permute(&[1, 0, 2]).unwrap()).unwrap()
            } else {
                view(&x, &[matrices, n, k])
            };
            let factors: Vec<_> = sizes.iter().enumerate().map(|(i, s)| (numbers(k * s.2, i), numbers(s.2 * width, i + 9))).collect();
            let views: Vec<_> =
                factors.iter().zip(&sizes).map(|((a, b), s)| (view(a, &[k, s.2]), view(b, &[s.2, width]))).collect();
            let segments: Vec<_> = sizes.iter().zip(&views).enumerate()
                .map(|(i, (&(gap, rows, _), (a, b)))| Segment { gap, rows, a, b, scale: 0.5 + i as f64 })
                .collect();
            let mut got = vec![0f32; base.len()];
            lora_segments(&x_view, &view(&base, &[matrices, n, width]), &segments, &mut SliceMut::F32(&mut got)).unwrap();
            for m in 0..matrices {
                let mut at = 0;
                let all = m * n * width..(m + 1) * n * width;
                let (got, base) = (&got[all.clone()], &base[all]);
                for of in &segments {
                    prop_assert_eq!(&got[at * width..(at + of.gap) * width], &base[at * width..(at + of.gap) * width]);
                    at += of.gap;
                    let mut want = vec![0f32; of.rows * width];
                    let own = x_view.layout.narrow(0, m, 1).unwrap().narrow(1, at, of.rows).unwrap();
                    let base = view(&base[at * width..(at + of.rows) * width], &[1, of.rows, width]);
                    let own = View::new(Slice::F32(&x), own).unwrap();
                    lora(&own, of.a, of.b, Some(&base), of.scale, &mut SliceMut::F32(&mut want)).unwrap();
                    prop_assert_eq!(&got[at * width..(at + of.rows) * width], &want[..]);
                    at += of.rows;
                }
                prop_assert_eq!(&got[at * width..], &base[at * width..]);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = numbers(6 * 8, 0);
        let (a, b) = (view(&x[..16], &[8, 2]), view(&x[..10], &[2, 5]));
        let segment = Segment { gap: 1, rows: 3, a: &a, b: &b, scale: 1.0 };
        let run = |dims: &[usize], base: &[usize], segments: &[Segment<'_>], len: usize| {
            let mut out = vec![0f32; len];
            lora_segments(&view(&x, dims), &view(&x, base), segments, &mut SliceMut::F32(&mut out))
                .map_err(|e| e.to_string())
        };
        assert!(run(&[6, 8], &[6, 5], &[segment], 30).is_ok());
        assert!(run(&[6, 8], &[6, 5], &[segment, segment], 30).unwrap_err().contains("8 rows"));
        assert!(run(&[6, 8], &[5, 5], &[segment], 25).unwrap_err().contains("other rows"));
        assert!(run(&[6, 8], &[6, 4], &[segment], 24).unwrap_err().contains("segment 0"));
        assert!(run(&[6, 8], &[6, 5], &[segment], 29).is_err());
        assert!(run(&[8], &[5], &[segment], 5).unwrap_err().contains("no rows"));
    }
}
