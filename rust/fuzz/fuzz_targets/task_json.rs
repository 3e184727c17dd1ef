//! Any payload of a Task is a task or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_head::api::dcf::DcfTask;

fuzz_target!(|payload: &[u8]| {
    let _ = DcfTask::parse(payload);
});
