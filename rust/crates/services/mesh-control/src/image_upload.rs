//! Images that clients send: read within limits, and scaled to the size of the image to make.
//!
//! Files come from anybody. Their formats are guessed from their first bytes; sizes are checked before anything is
//! decoded, and decoders get a limit on memory. One upload takes up to [`MOST_BYTES`] for its pixels and twice as
//! many while they are scaled, so callers read one at a time.

use std::io::Cursor;

use image::error::LimitErrorKind;
use image::imageops::FilterType;
use image::metadata::Orientation;
use image::{
    DynamicImage, GrayImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Luma,
};

/// Size of the image to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// This width and height in pixels.
    Exactly(u32, u32),
    /// The upload's own in multiples of 8, scaled down to `most_pixels` and up to `least_side`.
    Own {
        /// Most pixels of the image.
        most_pixels: u64,
        /// Least width and height.
        least_side: u32,
    },
}

/// Pixels that an image is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Something is kept.
    pub masked: bool,
    /// As they travel: [`mesh_proto::InitialImage`].
    pub bytes: Vec<u8>,
}

/// An upload that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unusable {
    /// The upload at fault: `image` or `mask`.
    pub field: &'static str,
    /// The fault, for the client.
    pub reason: String,
}

/// Reads an image and its mask. Both are cut to the form of the size around their centres and scaled. The mask's
/// transparent pixels are changed; without a mask those of the image are, or all if there are none.
///
/// # Errors
/// [`Unusable`] names the upload and its fault.
pub fn read(file: &[u8], mask: Option<&[u8]>, size: Size) -> Result<Pixels, Unusable> {
    let image = decode("image", file)?;
    let own = (image.width(), image.height());
    let (width, height) = size.of(own);
    let image = fit(image, width, height);
    let opacity = image.color().has_alpha().then(|| opacity(&image));
    let mut bytes = on_white(image, opacity.as_ref());
    let keep = match mask {
        Some(mask) => Some(read_mask(mask, own, (width, height))?),
        None => opacity.filter(|opacity| opacity.pixels().any(|pixel| !is_kept(pixel))),
    };
    if let Some(keep) = &keep {
        let pixels: Vec<&Luma<u8>> = keep.pixels().collect();
        let packed = pixels.chunks(8).map(|eight| {
            let bits = eight.iter().enumerate();
            bits.fold(0, |byte, (at, pixel)| {
                byte | u8::from(!is_kept(pixel)) << (7 - at)
            })
        });
        bytes.extend(packed);
    }
    Ok(Pixels {
        width,
        height,
        masked: keep.is_some(),
        bytes,
    })
}

fn read_mask(file: &[u8], own: (u32, u32), size: (u32, u32)) -> Result<GrayImage, Unusable> {
    let unusable = |reason: String| Unusable {
        field: "mask",
        reason,
    };
    let mask = decode("mask", file)?;
    if (mask.width(), mask.height()) != own {
        return Err(unusable(format!(
            "'mask' has {}x{} pixels and 'image' {}x{}; send one of the image's size",
            mask.width(),
            mask.height(),
            own.0,
            own.1
        )));
    }
    if !mask.color().has_alpha() {
        return Err(unusable(
            "'mask' has no alpha channel; send a PNG file that is transparent where the image is to be changed"
                .to_owned(),
        ));
    }
    let opacity = opacity(&fit(mask, size.0, size.1));
    if opacity.pixels().all(is_kept) {
        return Err(unusable(
            "'mask' is transparent nowhere, so nothing would be changed; make it transparent where the image is to be changed"
                .to_owned(),
        ));
    }
    Ok(opacity)
}

impl Size {
    fn of(self, (width, height): (u32, u32)) -> (u32, u32) {
        let (most_pixels, least) = match self {
            Size::Exactly(width, height) => return (width, height),
            Size::Own {
                most_pixels,
                least_side,
            } => (most_pixels.max(1) as f64, least_side.clamp(MIN_SIDE, SIDE)),
        };
        let (width, height) = (f64::from(width), f64::from(height));
        let by_pixels = (most_pixels / (width * height)).sqrt();
        let by_side = f64::from(SIDE) / width.max(height);
        let scale = by_pixels.min(by_side).min(1.0);
        let side = |side: f64| ((side * scale) as u32 / 8 * 8).clamp(least.div_ceil(8) * 8, SIDE);
        (side(width), side(height))
    }
}

/// Decodes a file and turns it as its metadata say.
fn decode(field: &'static str, file: &[u8]) -> Result<DynamicImage, Unusable> {
    let unusable = |reason: String| Unusable { field, reason };
    let format = image::guess_format(file).ok();
    let format = format.filter(|format| FORMATS.contains(format));
    let Some(format) = format else {
        return Err(unusable(format!(
            "'{field}' is not a PNG, JPEG or WebP file"
        )));
    };
    let unread = |error: ImageError| {
        unusable(match error {
            ImageError::Limits(limit)
                if matches!(limit.kind(), LimitErrorKind::InsufficientMemory) =>
            {
                format!("'{field}' takes more than {MOST_BYTES} bytes of memory; scale it down")
            }
            error => format!("'{field}' cannot be read: {error}"),
        })
    };
    let mut limits = Limits::default();
    limits.max_alloc = Some(MOST_BYTES);
    limits.max_image_width = None;
    limits.max_image_height = None;
    let mut reader = ImageReader::with_format(Cursor::new(file), format);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(unread)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MOST_PIXELS || decoder.total_bytes() > MOST_BYTES {
        return Err(unusable(format!(
            "'{field}' has {width}x{height} pixels of {} bits, more than the limit of {MOST_PIXELS} pixels and {MOST_BYTES} bytes; scale it \
             down",
            decoder.color_type().bits_per_pixel()
        )));
    }
    limits.reserve(decoder.total_bytes()).map_err(unread)?;
    decoder.set_limits(limits).map_err(unread)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(unread)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Cuts an image to the form of a size around its centre, and scales it.
fn fit(image: DynamicImage, width: u32, height: u32) -> DynamicImage {
    let (own_width, own_height) = (image.width(), image.height());
    let (w, h) = (u64::from(own_width), u64::from(own_height));
    let part = |side: u64, other: u64, this: u32, of: u32| {
        let cut = (other * u64::from(this)).div_ceil(u64::from(of).max(1));
        cut.clamp(1, side.max(1)) as u32
    };
    let cut_width = part(w, h, width, height);
    let cut_height = part(h, w, height, width);
    let image = match (cut_width, cut_height) == (own_width, own_height) {
        true => image,
        false => image.crop_imm(
            (own_width - cut_width) / 2,
            (own_height - cut_height) / 2,
            cut_width,
            cut_height,
        ),
    };
    if (cut_width, cut_height) == (width, height) {
        return image;
    }
    // Averages of whole pixels are as good where there are many, and take little memory.
    match cut_width >= 2 * width && cut_height >= 2 * height {
        true => image.thumbnail_exact(width, height),
        false => image.resize_exact(width, height, FilterType::CatmullRom),
    }
}

/// The alpha channel of an image that has one.
fn opacity(image: &DynamicImage) -> GrayImage {
    let (width, height) = (image.width(), image.height());
    let alpha = match image {
        DynamicImage::ImageRgba8(image) => image.pixels().map(|pixel| pixel.0[3]).collect(),
        DynamicImage::ImageLumaA8(image) => image.pixels().map(|pixel| pixel.0[1]).collect(),
        other => other.to_rgba8().pixels().map(|pixel| pixel.0[3]).collect(),
    };
    GrayImage::from_raw(width, height, alpha).expect("there is a value for each pixel")
}

/// Three bytes a pixel, with white behind what is transparent.
fn on_white(image: DynamicImage, opacity: Option<&GrayImage>) -> Vec<u8> {
    let mut rgb = image.into_rgb8();
    if let Some(opacity) = opacity {
        for (pixel, Luma([alpha])) in rgb.pixels_mut().zip(opacity.pixels()) {
            let alpha = u16::from(*alpha);
            let mixed = |colour: u8| (u16::from(colour) * alpha + 255 * (255 - alpha)) / 255;
            pixel.0 = pixel.0.map(|colour| mixed(colour) as u8);
        }
    }
    rgb.into_raw()
}

fn is_kept(opacity: &Luma<u8>) -> bool {
    opacity.0[0] >= 128
}

/// Most pixels of an upload.
pub const MOST_PIXELS: u64 = 16 << 20;
/// Most bytes of its decoded pixels.
pub const MOST_BYTES: u64 = 64 << 20;
/// Largest and smallest side of an image to make.
const SIDE: u32 = 2048;
const MIN_SIDE: u32 = 64;
const FORMATS: [ImageFormat; 3] = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];

#[cfg(test)]
mod tests;
