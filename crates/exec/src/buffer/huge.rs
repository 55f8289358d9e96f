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
/// Bytes of a huge page.
pub(super) const HUGE_PAGE: usize = 2 << 20;

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
#[cfg(all(target_os = "linux", not(miri)))]
const POPULATE_FROM: usize = 128 << 10;
/// What one thread makes to be there, at least.
#[cfg(all(target_os = "linux", not(miri)))]
const PART: usize = 64 << 10;
/// About how long a page takes, in nanoseconds.
#[cfg(all(target_os = "linux", not(miri)))]
const PAGE_NS: usize = 500;

/// Up to this size to ask the system whether memory is there takes a noticeable part of what a kernel does with it.
#[cfg(all(target_os = "linux", not(miri)))]
const ASKED_EACH_TIME: usize = 1 << 20;
/// How often memory that was there is taken to be there still, before the system is asked again.
#[cfg(all(target_os = "linux", not(miri)))]
const TRUSTED: u64 = 8;

/// Where memory was that the system said is there: an allocator gives the same piece again and again. One place for each of some hashes; a wrong answer
/// costs time only, since pages that are gone come when they are touched.
#[cfg(all(target_os = "linux", not(miri)))]
struct Seen([std::sync::atomic::AtomicU64; 64]);

#[cfg(all(target_os = "linux", not(miri)))]
impl Seen {
    /// Elements begin on multiples of this.
    const ALIGNED: u64 = 16;

    fn place(&self, start: usize) -> Option<&std::sync::atomic::AtomicU64> {
        let hash = (start as u64 / Self::ALIGNED).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0.get((hash >> 58) as usize)
    }

    /// Whether memory at `start` may be taken to be there.
    fn is_trusted(&self, start: usize) -> bool {
        let Some(place) = self.place(start) else { return false };
        let seen = place.load(std::sync::atomic::Ordering::Relaxed);
        let trusted = seen & !(Self::ALIGNED - 1) == start as u64 && seen % Self::ALIGNED > 0;
        if trusted {
            place.store(seen - 1, std::sync::atomic::Ordering::Relaxed);
        }
        trusted
    }

    /// Memory at `start` was there.
    fn trust(&self, start: usize) {
        if let (Some(place), true) = (self.place(start), (start as u64).is_multiple_of(Self::ALIGNED)) {
            place.store(start as u64 + TRUSTED, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

/// Sees to it that large memory is there, where the system can do so at once and most of it is not; its content stays as it is.
#[cfg(all(target_os = "linux", not(miri)))]
pub(super) fn populate(data: &mut Data) {
    static SEEN: Seen = Seen([const { std::sync::atomic::AtomicU64::new(0) }; 64]);
    let bytes = data.bytes();
    let start = data.address();
    if bytes < POPULATE_FROM || bytes < ASKED_EACH_TIME && SEEN.is_trusted(start) {
        return;
    }
    let page = page();
    let (Some(first), Some(end)) = (start.checked_next_multiple_of(page), start.checked_add(bytes)) else {
        return;
    };
    let last = end / page * page;
    if first >= last || !(is_missing(first, last, page) || is_missing(last - PART.min(last - first), last, page)) {
        SEEN.trust(start);
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

    /// Elements of what is large; Miri takes a microsecond for each.
    const LARGE: usize = if cfg!(miri) { 5000 } else { 3 << 20 };

    #[test]
    fn populated_memory_holds_what_it_held() {
        for len in [0usize, 1, 20_000, 40_000, LARGE] {
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
    fn memory_is_trusted_some_times_and_by_its_own_address() {
        let seen = Seen([const { std::sync::atomic::AtomicU64::new(0) }; 64]);
        let trusted = |start: usize| (0..2 * TRUSTED).filter(|_| seen.is_trusted(start)).count() as u64;
        for start in [16, 4096, 0x7f00_1234_5670] {
            assert_eq!(trusted(start), 0, "{start}");
            seen.trust(start);
            assert!(!seen.is_trusted(start + 16));
            assert_eq!(trusted(start), TRUSTED, "{start}");
        }
        // no multiple: the count has no room beside it
        seen.trust(4100);
        assert_eq!(trusted(4100), 0);
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
        for len in [0usize, 1, 1000, LARGE] {
            let mut vec: Vec<f32> = vec_with_huge_pages(len);
            assert!(vec.is_empty() && vec.capacity() >= len);
            vec.extend((0..len).map(|i| i as f32));
            let plain: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(vec, plain);
        }
    }
}
