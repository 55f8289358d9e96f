//! Large memory on huge pages, and memory that is there before a kernel writes it.
//!
//! Reading weights is bound by memory, and on ordinary pages the processor's page tables cost up to half of the bandwidth.
//! Where the system grants huge pages only when asked (`madvise`), they must be asked for before the first touch.
//!
//! Memory that a process asks for is not there until it is touched, one page at a time, and in a virtual machine a fault
//! may take longer than what a kernel does to the page. Asked for at once, the pages cost less, and threads share the work.
#![allow(unsafe_code)] // system calls on memory that is not yet in use

use super::Data;

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
    let vec: Vec<T> = Vec::with_capacity(capacity);
    advise(vec.as_ptr() as usize, vec.capacity().saturating_mul(std::mem::size_of::<T>()));
    vec
}

/// Asks for huge pages for `bytes` of memory from `start` on, which the caller holds, if it is large.
#[cfg(target_os = "linux")]
fn advise(start: usize, bytes: usize) {
    if bytes < MIN_BYTES {
        return;
    }
    let (Some(first), Some(end)) = (start.checked_next_multiple_of(HUGE_PAGE), start.checked_add(bytes)) else {
        return;
    };
    let last = end / HUGE_PAGE * HUGE_PAGE;
    if first < last {
        // SAFETY: [first, last) lies inside the memory that the caller holds, is page-aligned, and MADV_HUGEPAGE changes no content;
        // a refusal (a system without huge pages) leaves the memory as it was.
        unsafe {
            libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: usize, _: usize) {}

/// From this size on memory is made to be there.
#[cfg(target_os = "linux")]
const POPULATE_FROM: usize = 128 << 10;
/// What one thread makes to be there, at least.
#[cfg(target_os = "linux")]
const PART: usize = 64 << 10;
/// About how long a page takes, in nanoseconds.
#[cfg(target_os = "linux")]
const PAGE_NS: usize = 500;

/// Sees to it that large memory is there, where the system can do so at once and most of it is not; its content stays as it is.
#[cfg(all(target_os = "linux", not(miri)))]
pub(super) fn populate(data: &mut Data) {
    let bytes = data.bytes();
    if bytes < POPULATE_FROM {
        return;
    }
    let page = page();
    let start = data.address();
    let (Some(first), Some(end)) = (start.checked_next_multiple_of(page), start.checked_add(bytes)) else {
        return;
    };
    let last = end / page * page;
    if first >= last || !(is_missing(first, last, page) || is_missing(last - PART.min(last - first), last, page)) {
        return;
    }
    advise(start, bytes);
    let threads = candle_lazy_ops::kernels::threads();
    let part = (last - first).div_ceil(threads).max(PART).next_multiple_of(page);
    let parts: Vec<(usize, usize)> = (first..last).step_by(part).map(|from| (from, part.min(last - from))).collect();
    candle_lazy_ops::kernels::each((last - first) / page * PAGE_NS, parts, |(from, len)| {
        // SAFETY: a part of [first, last), which lies inside the memory of `data`, that nobody else can reach, and is page-aligned;
        // MADV_POPULATE_WRITE changes no content, and where the system does not know it or has no memory left, the pages come when they are touched.
        unsafe { libc::madvise(from as *mut libc::c_void, len, libc::MADV_POPULATE_WRITE) };
    });
}

/// Elsewhere pages come when they are touched.
#[cfg(not(all(target_os = "linux", not(miri))))]
pub(super) fn populate(_: &mut Data) {}

/// Bytes of a page.
#[cfg(all(target_os = "linux", not(miri)))]
fn page() -> usize {
    static PAGE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    // SAFETY: `sysconf` reads a constant of the system.
    *PAGE.get_or_init(|| usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(4096))
}

/// Whether most of the first pages of [first, last) are not there.
#[cfg(all(target_os = "linux", not(miri)))]
fn is_missing(first: usize, last: usize, page: usize) -> bool {
    let mut there = [0u8; PART / 4096];
    let pages = ((last - first) / page).min(there.len());
    // SAFETY: the pages lie inside of memory that the caller borrows, and `there` has a byte for each; nothing else is written.
    let known = unsafe { libc::mincore(first as *mut libc::c_void, pages * page, there.as_mut_ptr()) } == 0;
    known && there[..pages].iter().filter(|&&p| p & 1 == 0).count() * 2 > pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn populated_memory_holds_what_it_held() {
        for len in [0usize, 1, 20_000, 40_000, 3 << 20] {
            for _ in 0..2 {
                let mut data = Data::fresh(DType::F32, len).unwrap();
                if let Data::F32(numbers) = &mut data {
                    numbers.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
                }
                populate(&mut data);
                let Data::F32(numbers) = data else { panic!("another dtype") };
                assert!(numbers.iter().enumerate().all(|(i, &x)| x == i as f32), "{len}");
            }
        }
    }

    #[test]
    #[cfg(all(target_os = "linux", not(miri)))]
    fn what_was_not_there_is_there() {
        // zeros of this size are a mapping of their own, of which nothing has been touched: the allocator keeps no larger piece than 32 MiB
        let (bytes, page) = (64 << 20, page());
        let mut data = Data::F32(vec![0.0; bytes / 4]);
        let at = data.address().next_multiple_of(page);
        let end = at + bytes / page * page - page;
        assert!(is_missing(at + PART, end, page) && is_missing(end - PART, end, page));
        populate(&mut data);
        assert!(!is_missing(at, end, page) && !is_missing(end - PART, end, page));
    }

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
