//! Whatever workers send of an image, in any order and over any number of attempts, is taken within the image's size or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_control::image::{ArrivingImage, png_size};
use mesh_proto::{ImageData, ImageStep, ImageTask};
use prost::Message;

fuzz_target!(|messages: Vec<(u8, bool, Vec<u8>)>| {
    let task = ImageTask {
        width: 64,
        height: 64,
        steps: 3,
        previews: 2,
        ..ImageTask::default()
    };
    let mut image = ArrivingImage::new(&task);
    for (attempt, is_step, bytes) in messages {
        let attempt = u32::from(attempt);
        if is_step {
            let Ok(step) = ImageStep::decode(&bytes[..]) else {
                continue;
            };
            if image.step(attempt, step.clone()).is_ok() {
                let step = ImageStep {
                    preview: Default::default(),
                    ..step
                };
                assert_eq!(image.last(), Some(&step));
                assert!((1..=3).contains(&step.step));
            }
        } else if let Ok(part) = ImageData::decode(&bytes[..])
            && let Ok(Some(file)) = image.data(attempt, &part)
        {
            assert_eq!(png_size(&file), Some((64, 64)));
            assert!(file.len() as u64 <= ArrivingImage::memory(&task));
        }
    }
});
