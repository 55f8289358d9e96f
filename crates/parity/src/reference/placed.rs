//! References of what picks and places elements by index, and of numbers that are made.

use super::{bad, indices, strides, Acc, Arr, Result, Summed};

/// An index of a dim of size `n`.
fn index_at(id: f64, n: usize) -> Result<usize> {
    if id < 0.0 || id >= n as f64 {
        return bad(format!("id {id} of {n}"));
    }
    Ok(id as usize)
}

fn flat(index: &[usize], to: &[usize], dim: usize, at: usize) -> usize {
    index.iter().enumerate().map(|(d, &i)| if d == dim { at } else { i } * to[d]).sum()
}

/// Elements of `x` with the coordinate of `dim` replaced by the id at the same place.
///
/// # Errors
/// When an id is out of range.
pub fn gather(x: &Arr, ids: &Arr, dim: usize) -> Result<Arr> {
    let from = strides(&x.dims);
    let data = indices(&ids.dims)
        .zip(&ids.data)
        .map(|(index, &id)| Ok(x.data[flat(&index, &from, dim, index_at(id, x.dims[dim])?)]))
        .collect::<Result<_>>()?;
    Ok(Arr { dims: ids.dims.clone(), data })
}

/// `x` with the elements of `src` written where `ids` says, the last one counting.
///
/// # Errors
/// When an id is out of range.
pub fn scatter(x: &Arr, ids: &Arr, src: &Arr, dim: usize) -> Result<Arr> {
    let mut out = x.clone();
    let to = strides(&x.dims);
    for ((index, &id), &value) in indices(&ids.dims).zip(&ids.data).zip(&src.data) {
        out.data[flat(&index, &to, dim, index_at(id, x.dims[dim])?)] = value;
    }
    Ok(out)
}

/// `x` with the elements of `src` added where `at` says, given the index of the element in `src`.
fn added(x: &Arr, src: &Arr, at: impl Fn(&[usize]) -> Result<usize>) -> Result<Summed> {
    let mut sums = vec![Acc::default(); x.data.len()];
    for (sum, &value) in sums.iter_mut().zip(&x.data) {
        sum.add(value);
    }
    for (index, &value) in indices(&src.dims).zip(&src.data) {
        sums[at(&index)?].add(value);
    }
    let arr = |f: fn(&Acc) -> f64| Arr { dims: x.dims.clone(), data: sums.iter().map(f).collect() };
    Ok(Summed { value: arr(Acc::value), magnitude: arr(Acc::magnitude), inner: None })
}

/// `x` with the elements of `src` added where `ids` says.
///
/// # Errors
/// When an id is out of range.
pub fn scatter_add(x: &Arr, ids: &Arr, src: &Arr, dim: usize) -> Result<Summed> {
    let (to, from) = (strides(&x.dims), strides(&src.dims));
    added(x, src, |index| {
        let own: usize = index.iter().zip(&from).map(|(i, s)| i * s).sum();
        Ok(flat(index, &to, dim, index_at(ids.data[own], x.dims[dim])?))
    })
}

/// `x` with slice j of `src` added to slice ids\[j\].
///
/// # Errors
/// When an id is out of range.
pub fn index_add(x: &Arr, ids: &Arr, src: &Arr, dim: usize) -> Result<Summed> {
    let to = strides(&x.dims);
    added(x, src, |index| Ok(flat(index, &to, dim, index_at(ids.data[index[dim]], x.dims[dim])?)))
}

/// Every `step`-th index of `dim`.
#[must_use]
pub fn stride(x: &Arr, dim: usize, start: usize, len: usize, step: usize) -> Arr {
    let mut dims = x.dims.clone();
    dims[dim] = len;
    let from = strides(&x.dims);
    let data = indices(&dims).map(|index| x.data[flat(&index, &from, dim, start + index[dim] * step)]).collect();
    Arr { dims, data }
}

/// The place of the first largest (or smallest) element along `dim`.
#[must_use]
pub fn arg_reduce(x: &Arr, dim: usize, smallest: bool, keepdim: bool) -> Arr {
    let mut dims = x.dims.clone();
    dims[dim] = 1;
    let from = strides(&x.dims);
    let data = indices(&dims)
        .map(|index| {
            let value = |i: usize| x.data[flat(&index, &from, dim, i)];
            let better = |a: f64, b: f64| if smallest { a < b } else { a > b };
            (1..x.dims[dim]).fold(0, |best, i| if better(value(i), value(best)) { i } else { best }) as f64
        })
        .collect();
    if !keepdim {
        dims.remove(dim);
    }
    Arr { dims, data }
}

/// Philox4x32 with ten rounds (Salmon et al. 2011) of one counter under a key.
fn philox(counter: [u64; 4], key: u64) -> [u64; 4] {
    const LOW: u64 = 0xffff_ffff;
    let mut c = counter;
    let (mut k0, mut k1) = (key & LOW, key >> 32);
    for _ in 0..10 {
        let (p, q) = (0xd251_1f53 * c[0], 0xcd9e_8d57 * c[2]);
        c = [(q >> 32) ^ c[1] ^ k0, q & LOW, (p >> 32) ^ c[3] ^ k1, p & LOW];
        k0 = (k0 + 0x9e37_79b9) & LOW;
        k1 = (k1 + 0xbb67_ae85) & LOW;
    }
    c
}

/// Random numbers of a key, as `docs/ops.md` lays down their bits: `bits` of the fraction (53 takes two words); uniform from `a` to
/// `b`, or normal with mean `a` and deviation `b`.
#[must_use]
pub fn random(key: u64, normal: bool, a: f64, b: f64, bits: u32, dims: &[usize]) -> Arr {
    let wide = bits == 53;
    let count: usize = dims.iter().product();
    let mut data = Vec::with_capacity(count);
    for block in 0..count.div_ceil(4) as u64 {
        let word = |half: u64| philox([block & 0xffff_ffff, block >> 32, u64::from(normal), half], key);
        let (w, v) = (word(0), word(1));
        let four: [u64; 4] = match wide {
            true => [w[0] | w[1] << 32, w[2] | w[3] << 32, v[0] | v[1] << 32, v[2] | v[3] << 32],
            false => w,
        };
        let size: u32 = if wide { 64 } else { 32 };
        for i in 0..4 {
            let number = if normal {
                let keep: u32 = if wide { 53 } else { 32 };
                let open = |w: u64| ((w >> (size - keep)) as f64 + 0.5) / 2f64.powi(keep as i32);
                let (radius, angle) =
                    ((-2.0 * libm::log(open(four[i & !1]))).sqrt(), std::f64::consts::TAU * open(four[i | 1]));
                a + b * radius * if i % 2 == 0 { libm::cos(angle) } else { libm::sin(angle) }
            } else {
                a + (b - a) * ((four[i] >> (size - bits)) as f64 / 2f64.powi(bits as i32))
            };
            data.push(number);
        }
    }
    data.truncate(count);
    Arr { dims: dims.to_vec(), data }
}
