//! Any body of /v1/images/edits, and any files in it, become pixels of the right number, or an error that names a field.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mesh_control::image_upload::{Size, read};
use mesh_head::api::image_edits::AskedEdit;
use mesh_proto::{ImageCard, initial_image_bytes};

fuzz_target!(|data: (bool, &[u8], Option<&[u8]>)| {
    let (form, bytes, mask) = data;
    let kind = match form {
        true => "multipart/form-data; boundary=X",
        false => "application/json",
    };
    match AskedEdit::parse(kind, &Bytes::copy_from_slice(bytes)) {
        Ok(asked) => {
            assert!(!asked.image.is_empty() && asked.strength.is_none_or(|s| s > 0.0 && s <= 1.0));
            let card = ImageCard {
                width: 64,
                height: 64,
                ..ImageCard::default()
            };
            if let Ok(images) = asked.read_files(&card) {
                assert!(images.request.init.is_some() && images.request.size.is_some());
            }
        }
        Err(invalid) => assert!(!invalid.param.is_empty() && !invalid.message.is_empty()),
    }
    // The files alone: the way through a form is long.
    if let Ok(pixels) = read(bytes, mask, Size::Exactly(64, 72)) {
        let length = initial_image_bytes(64, 72, pixels.masked);
        assert_eq!(pixels.bytes.len(), length);
    }
});
