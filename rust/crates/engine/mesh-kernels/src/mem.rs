//! Zeroed memory on cache line boundaries.
//!
//! Unsafe code: the allocation itself, and views of it as numbers.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::KernelError;

const ALIGN: usize = 64;
/// Size of a huge page on the systems that have them.
const HUGE: usize = 2 << 20;

/// A zeroed byte buffer that starts on a cache line.
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
    /// The buffer that has the memory, if this one is a part of it. No other part overlaps with this one.
    whole: Option<Arc<Buffer>>,
}

// SAFETY: the buffer owns its memory; shared references only read it.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zeroed bytes, or an error where the system gives none.
    pub(crate) fn zeroed(what: &'static str, len: usize) -> Result<Buffer, KernelError> {
        let failed = KernelError::NoMemory { what, bytes: len };
        if len == 0 {
            return Ok(Buffer::default());
        }
        let layout = layout(len).ok_or_else(|| failed.clone())?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) }).ok_or(failed)?;
        advise_huge(start, layout);
        // SAFETY: `len` bytes were just allocated.
        unsafe { start.as_ptr().write_bytes(0, len) };
        Ok(Buffer {
            start,
            len,
            whole: None,
        })
    }

    /// Makes the buffer at least `len` bytes long; the contents are lost when it grows.
    pub(crate) fn reserve(&mut self, what: &'static str, len: usize) -> Result<(), KernelError> {
        if self.len < len {
            *self = Buffer::default();
            *self = Buffer::zeroed(what, len.next_multiple_of(4096))?;
        }
        Ok(())
    }

    /// Moves the contents of `buffers` next to each other, each on a cache line, where together they fill huge
    /// pages: with small pages a core reads a quarter fewer bytes in a second.
    ///
    /// # Errors
    /// If the system gives no memory; all buffers are then as before.
    pub(crate) fn join<'a>(
        what: &'static str,
        buffers: impl IntoIterator<Item = &'a mut Buffer>,
    ) -> Result<(), KernelError> {
        let buffers: Vec<&mut Buffer> = buffers.into_iter().collect();
        let place = |buffer: &Buffer| buffer.len.next_multiple_of(ALIGN);
        let total = buffers.iter().map(|buffer| place(buffer)).sum();
        if total < HUGE {
            return Ok(());
        }
        let whole = Arc::new(Buffer::zeroed(what, total)?);
        let mut at = 0;
        for buffer in buffers {
            // SAFETY: the places of the buffers follow each other within the new one, which nothing else uses
            // yet.
            let start = unsafe { whole.start.add(at) };
            let len = buffer.len;
            // SAFETY: as above; the buffer has `len` bytes elsewhere.
            unsafe {
                start
                    .as_ptr()
                    .copy_from_nonoverlapping(buffer.start.as_ptr(), len)
            };
            at += place(buffer);
            *buffer = Buffer {
                start,
                len,
                whole: Some(Arc::clone(&whole)),
            };
        }
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes are allocated and were zeroed; an empty buffer has an aligned dangling pointer.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The whole buffer as f32, as many as fit.
    pub(crate) fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `bytes`; the alignment is that of a cache line, and any bits are an f32.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / 4) }
    }
}

impl Default for Buffer {
    fn default() -> Buffer {
        Buffer {
            start: NonNull::<Line>::dangling().cast(),
            len: 0,
            whole: None,
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0
            && self.whole.is_none()
            && let Some(layout) = layout(self.len)
        {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
    }
}

/// Alignment and size for `len` bytes: large buffers start at a huge page's boundary.
fn layout(len: usize) -> Option<Layout> {
    let align = if len >= HUGE { HUGE } else { ALIGN };
    Layout::from_size_align(len, align).ok()
}

/// Asks for huge pages under a buffer that starts on one: weights are read front to back at every step, and
/// small pages cost a look-up each 4 KiB and stop the hardware's prefetching.
fn advise_huge(start: NonNull<u8>, layout: Layout) {
    #[cfg(target_os = "linux")]
    if layout.align() == HUGE {
        // SAFETY: whole pages within an allocation of ours; the advice changes no contents. Without it all
        // goes on as before.
        unsafe {
            libc::madvise(
                start.as_ptr().cast(),
                layout.size() / HUGE * HUGE,
                libc::MADV_HUGEPAGE,
            )
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, layout);
}

/// Returns memory to the system when dropped: all memory that the process freed before and its allocator
/// still holds.
///
/// The weights of a stage are hundreds of buffers that lie among others in the allocator's heaps. glibc keeps
/// their pages when they are freed, for as long as the process runs, and other processes of a small machine
/// never see them again. In a struct its field belongs behind the large ones, in a function its variable
/// before them, so that it is dropped last.
#[derive(Debug, Default)]
pub struct Reclaim;

impl Drop for Reclaim {
    fn drop(&mut self) {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: the allocator gives back only unused pages; any thread may call it at any time.
        unsafe {
            libc::malloc_trim(0)
        };
    }
}

#[repr(align(64))]
struct Line;

/// A pointer that the tasks of one loop write through, each to its own part.
#[derive(Debug)]
pub(crate) struct TaskPointer<T>(pub(crate) *mut T);

impl<T> Clone for TaskPointer<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for TaskPointer<T> {}

// SAFETY: every user states which part each task writes; the parts of different tasks do not overlap.
unsafe impl<T> Send for TaskPointer<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for TaskPointer<T> {}

impl<T> TaskPointer<T> {
    /// The pointer. A method, so that closures capture the whole.
    #[inline(always)]
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

/// Zeroed memory that costs nothing until it is written, and can be given back in parts.
#[derive(Debug)]
pub(crate) struct Region {
    #[cfg(unix)]
    start: NonNull<u8>,
    #[cfg(unix)]
    len: usize,
    #[cfg(not(unix))]
    buffer: Buffer,
}

// SAFETY: the region owns its memory; writers through its pointers hold its owner exclusively.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

#[cfg(unix)]
impl Region {
    pub(crate) fn reserve(what: &'static str, len: usize) -> Result<Region, KernelError> {
        // SAFETY: an anonymous mapping at an address of the system's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Region { start, len }),
            _ => Err(KernelError::NoMemory { what, bytes: len }),
        }
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Gives a range of whole pages back; it reads as zero afterwards (on Linux; elsewhere its contents may
    /// stay).
    pub(crate) fn release(&mut self, range: std::ops::Range<usize>) {
        if range.end <= self.len && range.start < range.end {
            // SAFETY: within the mapping. A failure leaves the memory as it is, which is allowed.
            unsafe {
                libc::madvise(
                    self.start.as_ptr().add(range.start).cast(),
                    range.len(),
                    libc::MADV_DONTNEED,
                );
            }
        }
    }
}

#[cfg(unix)]
impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `reserve` with this length.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(not(unix))]
impl Region {
    pub(crate) fn reserve(what: &'static str, len: usize) -> Result<Region, KernelError> {
        Ok(Region {
            buffer: Buffer::zeroed(what, len)?,
        })
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.buffer.start.as_ptr()
    }

    pub(crate) fn release(&mut self, _range: std::ops::Range<usize>) {}
}
