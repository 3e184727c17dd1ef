//! Quotes of a TPM 2.0 (TCG TPM 2.0 Library, parts 1 to 3): a statement, signed inside of the TPM, about its
//! platform configuration registers (PCRs), which the firmware and the boot loader extend with digests of all
//! that they start.
//!
//! - [`Quoter`] makes them on a node. Its attestation key is a primary key: the TPM derives it from its own seed and a fixed
//!   template whenever it is asked, so nothing is stored, and the key is the same after a reinstallation;
//! - [`verify`] checks one at the head. It reads a stranger's bytes: all of it is bounded, and nothing panics.
//!
//! A quote proves that one TPM signed these values for this request. It does not prove whose TPM that is: the
//! head pins the key's name at first sight, and no manufacturer's certificate is asked for. It says nothing
//! of programs that the boot chain does not measure.
//!
//! No C library takes part: commands are marshalled here and go to the kernel's resource manager.

#![forbid(unsafe_code)]

mod device;
mod key;
mod pcrs;
mod quoter;
mod verify;

pub use device::DeviceError;
pub use key::Algorithm;
pub use pcrs::PCRS;
pub use quoter::{DEVICE, Quoter};
pub use verify::{QuoteError, Verified, verify};
