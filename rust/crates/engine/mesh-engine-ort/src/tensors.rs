//! The tensors of a node while it runs, read through ONNX Runtime's C interface.
//!
//! `ort`'s own accessors allocate a description of the tensor's type on every call; at two nodes per layer
//! that would show in a decode step of a few milliseconds. The C functions cost tens of nanoseconds.

use std::ptr;

use ort::AsPointer;
use ort::operator::ComputeContext;
use ort::sys;

/// Input `index` as `len` numbers of type `T`.
///
/// # Safety
/// The node must have such an input, a CPU tensor of exactly that type with at least `len` numbers.
pub(crate) unsafe fn input<T>(
    context: &ComputeContext,
    index: usize,
    len: usize,
) -> ort::Result<&[T]> {
    let api = ort::api();
    let mut value: *const sys::OrtValue = ptr::null();
    // SAFETY: the context is the one ONNX Runtime passed to the running kernel.
    check(unsafe { (api.KernelContext_GetInput)(context_ptr(context), index, &mut value) })?;
    // SAFETY: the value belongs to the running step and is only read.
    let data = unsafe { data(value.cast_mut())? };
    // SAFETY: the caller promises type and length; ONNX Runtime keeps the tensor until the node has run.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), len) })
}

/// Output 0, a tensor of `rows` rows of `width` f32.
///
/// # Safety
/// The node must declare output 0 as a CPU tensor of f32. If it may share memory with an input, the slice of
/// that input must not be used any more.
// The tensor is ONNX Runtime's, not part of the context, which only says how long it lives.
#[allow(clippy::mut_from_ref)]
pub(crate) unsafe fn output(
    context: &ComputeContext,
    rows: usize,
    width: usize,
) -> ort::Result<&mut [f32]> {
    let api = ort::api();
    let mut value: *mut sys::OrtValue = ptr::null_mut();
    let dims = [rows as i64, width as i64];
    // SAFETY: as in `input`; the dimensions are copied.
    check(unsafe {
        (api.KernelContext_GetOutput)(
            context_ptr(context),
            0,
            dims.as_ptr(),
            dims.len(),
            &mut value,
        )
    })?;
    // SAFETY: the value was just made for this node.
    let data = unsafe { data(value)? };
    // SAFETY: ONNX Runtime allocated `rows * width` f32 and hands them to this node alone.
    Ok(unsafe { std::slice::from_raw_parts_mut(data.cast(), rows * width) })
}

fn context_ptr(context: &ComputeContext) -> *mut sys::OrtKernelContext {
    context.ptr().cast_mut()
}

/// # Safety
/// `value` must be null or a live tensor.
unsafe fn data(value: *mut sys::OrtValue) -> ort::Result<*mut u8> {
    if value.is_null() {
        return Err(ort::Error::new("tensor is absent"));
    }
    let mut data = ptr::null_mut();
    // SAFETY: the caller's promise, and `value` is not null.
    check(unsafe { (ort::api().GetTensorMutableData)(value, &mut data) })?;
    if data.is_null() {
        // An empty tensor has no memory; a slice of length 0 wants an aligned pointer.
        return Ok(ptr::without_provenance_mut(64));
    }
    Ok(data.cast())
}

fn check(status: sys::OrtStatusPtr) -> ort::Result<()> {
    if status.0.is_null() {
        return Ok(());
    }
    // SAFETY: a status that is not null is ours to read once and release.
    unsafe {
        let message = std::ffi::CStr::from_ptr((ort::api().GetErrorMessage)(status.0));
        let error = ort::Error::new(message.to_string_lossy());
        (ort::api().ReleaseStatus)(status.0);
        Err(error)
    }
}
