//! Zeroed memory on cache line boundaries.
//!
//! Unsafe code: the allocation itself, and views of it as numbers.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::KernelError;

const ALIGN: usize = 64;

/// A zeroed byte buffer that starts on a cache line.
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
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
        let layout = Layout::from_size_align(len, ALIGN).map_err(|_| failed.clone())?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(failed)?;
        Ok(Buffer { start, len })
    }

    /// Makes the buffer at least `len` bytes long; the contents are lost when it grows.
    pub(crate) fn reserve(&mut self, what: &'static str, len: usize) -> Result<(), KernelError> {
        if self.len < len {
            *self = Buffer::default();
            *self = Buffer::zeroed(what, len.next_multiple_of(4096))?;
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
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0
            && let Ok(layout) = Layout::from_size_align(self.len, ALIGN)
        {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
    }
}

#[repr(align(64))]
struct Line;

/// A pointer that the tasks of one loop write through, each to its own part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shared<T>(pub(crate) *mut T);

// SAFETY: every user states which part each task writes; the parts of different tasks do not overlap.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}
