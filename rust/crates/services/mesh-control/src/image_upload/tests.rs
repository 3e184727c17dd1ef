use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ImageBuffer, ImageEncoder as _, Rgb, RgbImage, Rgba, RgbaImage};
use mesh_proto::initial_image_bytes;

use super::*;

const OWN: Size = Size::Own {
    most_pixels: 1 << 20,
    least_side: 64,
};

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    let image = image.into();
    let mut file = Vec::new();
    let encoder = PngEncoder::new(&mut file);
    let color = image.color().into();
    encoder
        .write_image(image.as_bytes(), image.width(), image.height(), color)
        .unwrap();
    file
}

/// Left half red, right half blue.
fn halves(width: u32, height: u32) -> RgbImage {
    ImageBuffer::from_fn(width, height, |x, _| match x < width / 2 {
        true => Rgb([255, 0, 0]),
        false => Rgb([0, 0, 255]),
    })
}

/// Opaque but for the left half.
fn left_open(width: u32, height: u32) -> RgbaImage {
    ImageBuffer::from_fn(width, height, |x, _| {
        Rgba([9, 9, 9, if x < width / 2 { 0 } else { 255 }])
    })
}

fn refused(file: &[u8], mask: Option<&[u8]>) -> Unusable {
    read(file, mask, OWN).unwrap_err()
}

#[test]
fn png_jpeg_and_webp_files_become_pixels() {
    let image = halves(128, 64);
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, 95)
        .encode_image(&image)
        .unwrap();
    let mut webp = Vec::new();
    WebPEncoder::new_lossless(&mut webp)
        .encode(&image, 128, 64, image::ExtendedColorType::Rgb8)
        .unwrap();
    for (name, file) in [("png", png(image.clone())), ("jpeg", jpeg), ("webp", webp)] {
        let pixels = read(&file, None, OWN).unwrap();
        assert_eq!(
            (pixels.width, pixels.height, pixels.masked),
            (128, 64, false)
        );
        let length = initial_image_bytes(128, 64, false);
        assert_eq!(pixels.bytes.len(), length, "{name}");
        let far = |at: usize, colour: [u8; 3]| {
            let pairs = pixels.bytes[3 * at..].iter().zip(colour);
            pairs.map(|(a, b)| a.abs_diff(b)).max().unwrap()
        };
        assert!(
            far(5, [255, 0, 0]) < 8 && far(123, [0, 0, 255]) < 8,
            "{name}"
        );
    }
}

#[test]
fn an_upload_is_cut_around_its_centre_and_scaled() {
    for (own, size) in [
        ((300, 100), (96, 64)),
        ((100, 300), (64, 96)),
        ((64, 64), (256, 128)),
        ((1000, 999), (72, 72)),
        ((1, 500), (64, 64)),
    ] {
        let file = png(halves(own.0, own.1));
        let pixels = read(&file, None, Size::Exactly(size.0, size.1)).unwrap();
        assert_eq!((pixels.width, pixels.height), size);
        let row = &pixels.bytes[..3 * size.0 as usize];
        if own.0 > 1 {
            // The border stays in the middle.
            assert!(row[0] > 200 && row[2] < 50, "{own:?} {:?}", &row[..3]);
            assert!(row[row.len() - 1] > 200, "{own:?}");
        }
    }
}

#[test]
fn its_own_size_is_in_multiples_of_8_within_the_limits() {
    let of = |width, height, most_pixels| {
        let size = Size::Own {
            most_pixels,
            least_side: 64,
        };
        size.of((width, height))
    };
    assert_eq!(of(515, 519, 1 << 20), (512, 512));
    assert_eq!(of(10, 70, 1 << 20), (64, 64));
    assert_eq!(of(4000, 3000, 512 * 512), (584, 440));
    assert_eq!(of(4000, 3000, u64::MAX), (2048, 1536));
    assert_eq!(of(u32::MAX, 1, 1 << 20), (2048, 64));
    for (width, height) in [(4000, 3000), (1023, 77), (2048, 2048)] {
        let (width, height) = of(width, height, 300_000);
        assert!(u64::from(width) * u64::from(height) <= 300_000);
    }
}

#[test]
fn what_is_transparent_in_the_mask_is_changed() {
    let file = png(halves(64, 64));
    let pixels = read(&file, Some(&png(left_open(64, 64))), OWN).unwrap();
    assert!(pixels.masked);
    assert_eq!(pixels.bytes.len(), initial_image_bytes(64, 64, true));
    let (rgb, mask) = pixels.bytes.split_at(64 * 64 * 3);
    assert_eq!(&rgb[..3], [255, 0, 0]);
    for row in mask.chunks(8) {
        assert_eq!(row, [255, 255, 255, 255, 0, 0, 0, 0]);
    }
    // The image's own transparency is a mask, and white where it is not.
    let own = png(left_open(64, 64));
    let alone = read(&own, None, OWN).unwrap();
    assert!(alone.masked);
    assert_eq!(alone.bytes[..3], [255; 3]);
    assert_eq!(alone.bytes[64 * 64 * 3..], *mask);
    let opaque = RgbaImage::from_pixel(64, 64, Rgba([1, 2, 3, 255]));
    let opaque = read(&png(opaque), None, OWN).unwrap();
    assert_eq!((opaque.masked, &opaque.bytes[..3]), (false, &[1, 2, 3][..]));
}

#[test]
fn masks_that_cannot_be_meant_are_refused() {
    let file = png(halves(64, 64));
    for (mask, words) in [
        (png(left_open(64, 32)), "64x32 pixels and 'image' 64x64"),
        (png(halves(64, 64)), "no alpha channel"),
        (
            png(RgbaImage::from_pixel(64, 64, Rgba([0, 0, 0, 255]))),
            "transparent nowhere",
        ),
        (b"GIF89a".to_vec(), "not a PNG, JPEG or WebP file"),
    ] {
        let error = refused(&file, Some(&mask));
        assert_eq!(error.field, "mask");
        assert!(error.reason.contains(words), "{error}");
    }
}

/// A PNG file that claims a size and has no pixels of it.
fn claims(width: u32, height: u32) -> Vec<u8> {
    let mut file = png(halves(64, 64));
    file[16..20].copy_from_slice(&width.to_be_bytes());
    file[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc(&file[12..29]);
    file[29..33].copy_from_slice(&crc.to_be_bytes());
    file
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            let odd = crc & 1 == 1;
            (crc >> 1) ^ if odd { 0xEDB8_8320 } else { 0 }
        })
    })
}

#[test]
fn hostile_uploads_are_refused_before_they_take_memory() {
    for (width, height) in [
        (1 << 30, 1 << 30),
        (u32::MAX >> 1, 1),
        (4097, 4097),
        (30_000, 30_000),
    ] {
        let error = refused(&claims(width, height), None);
        assert_eq!(error.field, "image");
    }
    let error = refused(&claims(8192, 4096), None);
    assert!(error.reason.contains("8192x4096 pixels"), "{error}");
    for junk in [
        &b""[..],
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\0\0\0\0WEBP",
    ] {
        refused(junk, None);
    }
    // A whole file of few bytes whose pixels are many.
    let dark = RgbImage::new(4096, 4096);
    let bomb = png(dark);
    assert!(bomb.len() < 500_000, "{}", bomb.len());
    let pixels = read(&bomb, None, Size::Exactly(64, 64)).unwrap();
    assert_eq!(pixels.bytes, vec![0; 64 * 64 * 3]);
}

#[test]
fn cut_and_changed_files_are_errors_or_images() {
    let image = halves(24, 16);
    let mut jpeg = Vec::new();
    JpegEncoder::new(&mut jpeg).encode_image(&image).unwrap();
    let mut webp = Vec::new();
    WebPEncoder::new_lossless(&mut webp)
        .encode(&image, 24, 16, image::ExtendedColorType::Rgb8)
        .unwrap();
    for file in [png(image), jpeg, webp] {
        for length in 0..file.len() {
            let _ = read(&file[..length], None, Size::Exactly(64, 64));
        }
        assert!(read(&file[..file.len() / 3], None, OWN).is_err());
        for at in 0..file.len() {
            for bit in [0, 3, 7] {
                let mut changed = file.clone();
                changed[at] ^= 1 << bit;
                if let Ok(pixels) = read(&changed, None, Size::Exactly(64, 64)) {
                    assert!(pixels.bytes.len() <= initial_image_bytes(64, 64, true));
                }
            }
        }
    }
}
