//! Ops that move elements.

use super::{bad, broadcast_offset, indices, strides, Arr, Result};

/// The same elements in another shape.
///
/// # Errors
/// When the number of elements differs.
pub fn reshape(x: &Arr, dims: &[usize]) -> Result<Arr> {
    Arr::new(dims, x.data.clone())
}

/// Result dim d is source dim `perm[d]`.
#[must_use]
pub fn permute(x: &Arr, perm: &[usize]) -> Arr {
    let dims: Vec<usize> = perm.iter().map(|&p| x.dims[p]).collect();
    let from = strides(&x.dims);
    let data = indices(&dims).map(|i| x.data[i.iter().zip(perm).map(|(i, &p)| i * from[p]).sum::<usize>()]).collect();
    Arr { dims, data }
}

/// `len` indices of `dim` from `start`.
#[must_use]
pub fn narrow(x: &Arr, dim: usize, start: usize, len: usize) -> Arr {
    let mut dims = x.dims.clone();
    dims[dim] = len;
    let from = strides(&x.dims);
    let data = indices(&dims)
        .map(|i| {
            x.data[i.iter().enumerate().map(|(d, &i)| if d == dim { i + start } else { i } * from[d]).sum::<usize>()]
        })
        .collect();
    Arr { dims, data }
}

/// Broadcast to `dims`.
#[must_use]
pub fn broadcast(x: &Arr, dims: &[usize]) -> Arr {
    let data = indices(dims).map(|i| x.data[broadcast_offset(&x.dims, &i)]).collect();
    Arr { dims: dims.to_vec(), data }
}

/// Arrays behind one another along `dim`.
///
/// # Errors
/// When there are none.
pub fn concat(parts: &[&Arr], dim: usize) -> Result<Arr> {
    let Some(first) = parts.first() else {
        return bad("nothing to join");
    };
    let mut dims = first.dims.clone();
    dims[dim] = parts.iter().map(|p| p.dims[dim]).sum();
    let mut out = Arr::full(&dims, f64::NAN);
    let to = strides(&dims);
    let mut start = 0;
    for part in parts {
        for (index, value) in indices(&part.dims).zip(&part.data) {
            let at: usize = index.iter().enumerate().map(|(d, &i)| if d == dim { i + start } else { i } * to[d]).sum();
            out.data[at] = *value;
        }
        start += part.dims[dim];
    }
    Ok(out)
}

/// The slices of `dim` that `ids` name.
///
/// # Errors
/// When an id is out of range.
pub fn index_select(x: &Arr, ids: &Arr, dim: usize) -> Result<Arr> {
    let mut dims = x.dims.clone();
    dims[dim] = ids.data.len();
    let from = strides(&x.dims);
    let mut data = Vec::new();
    for index in indices(&dims) {
        let id = ids.data[index[dim]];
        if id < 0.0 || id >= x.dims[dim] as f64 {
            return bad(format!("id {id} of {:?}", x.dims));
        }
        let at: usize = index.iter().enumerate().map(|(d, &i)| if d == dim { id as usize } else { i } * from[d]).sum();
        data.push(x.data[at]);
    }
    Ok(Arr { dims, data })
}

/// The rows of a table that ids of any rank name.
///
/// # Errors
/// When an id is out of range.
pub fn embedding(table: &Arr, ids: &Arr) -> Result<Arr> {
    let flat = Arr { dims: vec![ids.data.len()], data: ids.data.clone() };
    let mut out = index_select(table, &flat, 0)?;
    out.dims = ids.dims.clone();
    out.dims.push(table.dims[1]);
    Ok(out)
}

/// `x` with `src` written at `start` of `dim`.
#[must_use]
pub fn slice_assign(x: &Arr, src: &Arr, dim: usize, start: usize) -> Arr {
    let mut out = x.clone();
    let to = strides(&x.dims);
    for (index, value) in indices(&src.dims).zip(&src.data) {
        let at: usize = index.iter().enumerate().map(|(d, &i)| if d == dim { i + start } else { i } * to[d]).sum();
        out.data[at] = *value;
    }
    out
}
