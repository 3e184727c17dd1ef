//! Whatever workers send of an image, in any order and over any number of attempts, is taken within the image's size or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_control::image::{ArrivingImage, png_size};
use mesh_proto::{ImageData, ImageStep};
use prost::Message;

fuzz_target!(|messages: Vec<(u8, bool, Vec<u8>)>| {
    let mut image = ArrivingImage::new(64, 64, 3, 0);
    for (attempt, is_step, bytes) in messages {
        let attempt = u32::from(attempt);
        if is_step {
            let Ok(step) = ImageStep::decode(&bytes[..]) else {
                continue;
            };
            if image.step(attempt, step.clone()).is_ok() {
                assert_eq!(image.last(), Some(&step));
                assert!((1..=3).contains(&step.step));
            }
        } else if let Ok(part) = ImageData::decode(&bytes[..])
            && let Ok(Some(file)) = image.data(attempt, &part)
        {
            assert_eq!(png_size(&file), Some((64, 64)));
            assert!(file.len() as u64 <= ArrivingImage::memory(64, 64, 0));
        }
    }
});
