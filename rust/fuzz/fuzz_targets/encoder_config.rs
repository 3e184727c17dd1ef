//! Any files of an embedding model's folder are a configuration within the limits, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::encoder::{EncoderConfig, Sentences};

fuzz_target!(|data: &[u8]| {
    // The first file is config.json; the others follow, each after a byte that no JSON has.
    let mut files = data.split(|&byte| byte == 0xff);
    let Ok(config) = EncoderConfig::parse(files.next().unwrap_or_default()) else {
        return;
    };
    assert_eq!(config.head_dim() * config.heads, config.hidden);
    assert!(config.first_position < config.positions && config.hidden <= 8192);
    let read = |name: &str, limit: u64| {
        assert!(!name.contains("..") && !name.starts_with('/') && limit > 0);
        Ok(files.next().map(<[u8]>::to_vec))
    };
    if let Ok(sentences) = Sentences::parse(read, &config) {
        assert!((1..=config.positions - config.first_position).contains(&sentences.max_tokens));
        assert!(sentences.prompt(None).is_ok());
    }
});
