//! Any body of /v1/embeddings is a request within its limits, or an error that names a field.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_head::api::embeddings::AskedEmbeddings;

fuzz_target!(|body: &[u8]| match AskedEmbeddings::parse(body) {
    Ok(asked) => assert!((1..=2048).contains(&asked.task.inputs.len())),
    Err(invalid) => assert!(!invalid.param.is_empty() && !invalid.message.is_empty()),
});
