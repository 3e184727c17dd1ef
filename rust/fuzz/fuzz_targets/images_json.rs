//! Any body of /v1/images/generations is a request within its limits, or an error that names a field.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_head::api::images::AskedImages;

fuzz_target!(|body: &[u8]| match AskedImages::parse(body) {
    Ok(asked) => {
        let request = &asked.request;
        assert!((1..=10).contains(&asked.count) && !request.prompt.trim().is_empty());
        assert!(request.steps.is_none_or(|steps| (1..=150).contains(&steps)));
        let fits = |side: u32| (64..=2048).contains(&side) && side % 8 == 0;
        assert!(request.size.is_none_or(|(width, height)| fits(width) && fits(height)));
        assert!(request.guidance.is_none_or(|guidance| (0.0..=50.0).contains(&guidance)));
    }
    Err(invalid) => assert!(!invalid.param.is_empty() && !invalid.message.is_empty()),
});
