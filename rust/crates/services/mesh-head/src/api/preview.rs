//! Previews of images on their way, as files of the images' own size.

use std::io::Cursor;

use bytes::Bytes;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::imageops::{self, FilterType as Scaling};
use image::{ExtendedColorType, ImageEncoder as _, RgbImage};
use mesh_proto::PREVIEW_SHARE;

/// A preview as a worker sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Preview {
    /// Width of the image in pixels.
    pub(crate) width: u32,
    /// Height of the image in pixels.
    pub(crate) height: u32,
    /// [`mesh_proto::preview_bytes`] for that size.
    pub(crate) rgb: Bytes,
}

/// A preview as clients get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RenderedPreview {
    /// Width and height in pixels.
    pub(crate) size: (u32, u32),
    pub(crate) png: Vec<u8>,
}

/// Scales a preview to the size of its image. `None` if it has another number of bytes.
pub(crate) fn render(preview: &Preview) -> Option<RenderedPreview> {
    let (width, height) = (preview.width, preview.height);
    let share = PREVIEW_SHARE as u32;
    let small = RgbImage::from_raw(width / share, height / share, preview.rgb.to_vec())?;
    let large = imageops::resize(&small, width, height, Scaling::Triangle);
    let mut png = Vec::new();
    let encoder =
        PngEncoder::new_with_quality(Cursor::new(&mut png), CompressionType::Fast, FilterType::Up);
    encoder
        .write_image(&large, width, height, ExtendedColorType::Rgb8)
        .ok()?;
    Some(RenderedPreview {
        size: (width, height),
        png,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preview_becomes_a_file_of_the_images_size() {
        let rgb: Vec<u8> = (0..9 * 8)
            .flat_map(|at| [if at % 9 < 4 { 0 } else { 200 }; 3])
            .collect();
        let preview = Preview {
            width: 72,
            height: 64,
            rgb: rgb.into(),
        };
        let rendered = render(&preview).unwrap();
        let size = mesh_control::image::png_size(&rendered.png);
        assert_eq!((rendered.size, size), ((72, 64), Some((72, 64))));
        let image = image::load_from_memory(&rendered.png).unwrap().into_rgb8();
        assert_eq!(image.get_pixel(0, 0).0, [0; 3]);
        assert_eq!(image.get_pixel(71, 63).0, [200; 3]);
        let short = Preview {
            rgb: Bytes::from_static(&[0; 5]),
            ..preview
        };
        assert_eq!(render(&short), None);
    }
}
