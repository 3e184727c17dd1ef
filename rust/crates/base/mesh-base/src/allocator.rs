//! Settings of glibc's allocator for memory that was freed.

/// Has freed memory go back to the system: one heap, large buffers outside of it, and no heap that stays as large
/// as it once was. For a process that holds large buffers for a moment, such as the bodies of requests, and whose
/// threads allocate seldom enough to share a heap: a second one has gaps of its own, 7 MiB of them in a head under
/// `make attack`. Call it before any thread starts; other C libraries keep their ways.
///
/// glibc otherwise learns from the first large buffer that is freed to put such ones into its heaps (`mallopt(3)`,
/// `M_MMAP_THRESHOLD`), which then keep their pages.
pub fn give_back_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, LARGE),
        (libc::M_TRIM_THRESHOLD, 2 * LARGE),
    ] {
        // SAFETY: it sets a number of the allocator, under the allocator's own lock. What it cannot set stays as it is.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(parameter, value)
        };
    }
}

/// Gives the pages of the heaps that hold nothing back to the system. Small buffers of many short connections leave such pages between
/// others. It takes some milliseconds, in which other threads cannot allocate.
pub fn trim() {
    // SAFETY: the allocator gives back pages that nobody holds; it may be called at any time by any thread.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Minimum size in bytes of buffers outside the heaps. This is glibc's default, but fixed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: libc::c_int = 128 << 10;
