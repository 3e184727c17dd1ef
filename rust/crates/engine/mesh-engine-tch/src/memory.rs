//! The C library's memory for activations.
//!
//! glibc fetches each block over 32 MiB from the system page by page, and gives it back when it is freed. Convolutions rearrange
//! their weights in such blocks: half a million pages for each step of Stable Diffusion 1.5, all of which the system fills with
//! zeros first. Small pictures take about a fifth less time when freed memory is kept for the next block.

/// Has glibc take memory for all threads from one place, which alone can hold blocks of any size; to be called before there are
/// threads. It does nothing with other C libraries.
pub fn share_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    set(libc::M_ARENA_MAX, 1);
}

/// Has glibc keep freed blocks of up to 1 GiB for the next ones, for the whole process.
pub(crate) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for setting in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        set(setting, 1 << 30);
    }
}

/// Gives kept memory back to the system.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` takes a number and locks the allocator itself.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set(setting: libc::c_int, value: libc::c_int) {
    // SAFETY: `mallopt` takes two numbers, locks the allocator itself and refuses a value that it does not know.
    #[allow(unsafe_code)]
    let taken = unsafe { libc::mallopt(setting, value) };
    if taken == 0 {
        tracing::debug!(
            setting,
            value,
            "the C library refused a setting of its memory"
        );
    }
}
