//! What the system's allocator does with memory that results give back.
#![allow(unsafe_code)] // a setting of the allocator

/// From now on glibc's allocator keeps memory that was freed for what is asked for next, up to 64 MiB at the end of each of its heaps.
///
/// A batch hands out many results, which live and go together. By default glibc gives blocks of 128 KiB and more back to the system and fetches
/// them again, page by page, until the program has freed a larger one: that sets the thresholds which are set here from the
/// beginning, at their largest (`mallopt(3)`, "M_MMAP_THRESHOLD"). Who has set one by the environment is left alone, and so are other allocators.
#[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
pub(crate) fn keep_freed() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    const OWN: [&str; 3] = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"];
    ONCE.call_once(|| {
        if OWN.iter().any(|name| std::env::var_os(name).is_some()) {
            return;
        }
        // SAFETY: both set a number of the allocator, under its lock; a refusal leaves it as it was.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
            libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 20);
        }
    });
}

/// Elsewhere the allocator does as it does.
#[cfg(not(all(target_os = "linux", target_env = "gnu", not(miri))))]
pub(crate) fn keep_freed() {}
