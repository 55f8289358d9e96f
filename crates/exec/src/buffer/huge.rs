//! Large memory on huge pages.
//!
//! Reading weights is bound by memory, and on ordinary pages the processor's page tables cost up to half of the bandwidth.
//! Where the system grants huge pages only when asked (`madvise`), they must be asked for before the first touch.
#![allow(unsafe_code)] // one system call on memory that is not yet in use

/// Smaller memory gains nothing from pages of 2 MiB.
#[cfg(target_os = "linux")]
const MIN_BYTES: usize = 4 << 20;
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// An empty `Vec` of at least `capacity` elements whose memory asks for huge pages where the system has them.
///
/// Fill it with `extend`: memory that was touched before the advice stays on small pages.
#[must_use]
pub fn vec_with_huge_pages<T: Copy>(capacity: usize) -> Vec<T> {
    let vec = Vec::with_capacity(capacity);
    advise(&vec);
    vec
}

#[cfg(target_os = "linux")]
fn advise<T>(vec: &Vec<T>) {
    let bytes = vec.capacity().saturating_mul(std::mem::size_of::<T>());
    if bytes < MIN_BYTES {
        return;
    }
    let start = vec.as_ptr() as usize;
    let (Some(first), Some(end)) = (start.checked_next_multiple_of(HUGE_PAGE), start.checked_add(bytes)) else {
        return;
    };
    let last = end / HUGE_PAGE * HUGE_PAGE;
    if first < last {
        // SAFETY: [first, last) lies inside the allocation of `vec`, is page-aligned, and MADV_HUGEPAGE changes no content;
        // a refusal (a system without huge pages) leaves the memory as it was.
        unsafe {
            libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_: &Vec<T>) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_holds_what_an_ordinary_vec_holds() {
        for len in [0usize, 1, 1000, 3 << 20] {
            let mut vec: Vec<f32> = vec_with_huge_pages(len);
            assert!(vec.is_empty() && vec.capacity() >= len);
            vec.extend((0..len).map(|i| i as f32));
            let plain: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(vec, plain);
        }
    }
}
