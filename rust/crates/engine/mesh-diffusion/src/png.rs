//! Pictures as PNG files.

use std::io::Cursor;

use png::{BitDepth, ColorType, Decoder, Encoder, Limits, Transformations};

use crate::imaging::Image;

/// A picture read from a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// Its colours, whatever lies under transparent pixels included.
    pub image: Image,
    /// Opacity of each pixel, row by row; `None` if the file has no transparency.
    pub alpha: Option<Vec<u8>>,
}

/// Errors of writing and reading PNG files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum PngError {
    /// The picture has another number of bytes than its size says.
    #[error("a picture of {width}×{height} pixels has {bytes} bytes of RGB")]
    Size {
        width: u32,
        height: u32,
        bytes: usize,
    },
    /// A larger picture than allowed.
    #[error(
        "the PNG file has {width}×{height} pixels, over the limit of {limit} in all; scale it down"
    )]
    TooLarge { width: u32, height: u32, limit: u64 },
    /// The file is damaged or no PNG file.
    #[error("cannot read the PNG file: {0}")]
    Decode(String),
    /// Writing failed.
    #[error("cannot write a PNG file: {0}")]
    Encode(String),
}

/// A PNG file of a picture. `parameters`, the text from which it was made, goes into a chunk of that name, where web
/// interfaces look for it: `tEXt` if it is Latin-1, else `iTXt`.
///
/// # Errors
/// If the picture has not the bytes that its size says.
pub fn encode(image: &Image, parameters: Option<&str>) -> Result<Vec<u8>, PngError> {
    let failed = |error: png::EncodingError| PngError::Encode(error.to_string());
    let (width, height) = (image.width, image.height);
    let bytes = image.rgb.len();
    if bytes as u64 != u64::from(width) * u64::from(height) * 3 {
        return Err(PngError::Size {
            width,
            height,
            bytes,
        });
    }
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, width, height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    if let Some(text) = parameters {
        let (keyword, text) = (PARAMETERS.to_owned(), text.to_owned());
        // A zero byte ends no field of these chunks early: they would be read differently from how they were written.
        let text = text.replace('\0', "");
        match text.chars().all(|c| u32::from(c) < 256) {
            true => encoder.add_text_chunk(keyword, text),
            false => encoder.add_itxt_chunk(keyword, text),
        }
        .map_err(failed)?;
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(&image.rgb).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(file)
}

/// Reads a PNG file of any kind with at most `most_pixels`.
///
/// # Errors
/// If the bytes are no such file.
pub fn decode(bytes: &[u8], most_pixels: u64) -> Result<Decoded, PngError> {
    let failed = |error: png::DecodingError| PngError::Decode(error.to_string());
    // Four channels of 16 bits, a row before, and chunks beside the picture.
    let limit = usize::try_from(most_pixels.saturating_mul(16)).unwrap_or(usize::MAX);
    let limits = Limits {
        bytes: limit.saturating_add(1 << 20),
    };
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    decoder.set_ignore_text_chunk(true);
    let info = decoder.read_header_info().map_err(failed)?;
    let (width, height) = (info.width, info.height);
    if u64::from(width) * u64::from(height) > most_pixels {
        return Err(PngError::TooLarge {
            width,
            height,
            limit: most_pixels,
        });
    }
    let mut reader = decoder.read_info().map_err(failed)?;
    let size = reader.output_buffer_size();
    let size = size.ok_or_else(|| PngError::Decode("its size overflows".to_owned()))?;
    let mut pixels = vec![0; size];
    let frame = reader.next_frame(&mut pixels).map_err(failed)?;
    pixels.truncate(frame.buffer_size());
    let (rgb, alpha) = match frame.color_type {
        ColorType::Rgb => (pixels, None),
        ColorType::Rgba => {
            let (pixels, _) = pixels.as_chunks::<4>();
            let rgb = pixels.iter().flat_map(|&[r, g, b, _]| [r, g, b]);
            (rgb.collect(), Some(pixels.iter().map(|p| p[3]).collect()))
        }
        ColorType::Grayscale => (pixels.iter().flat_map(|&g| [g; 3]).collect(), None),
        ColorType::GrayscaleAlpha => {
            let (pixels, _) = pixels.as_chunks::<2>();
            let rgb = pixels.iter().flat_map(|&[g, _]| [g; 3]);
            (rgb.collect(), Some(pixels.iter().map(|p| p[1]).collect()))
        }
        ColorType::Indexed => {
            return Err(PngError::Decode("its palette was not applied".to_owned()));
        }
    };
    let image = Image { width, height, rgb };
    Ok(Decoded { image, alpha })
}

/// Keyword of the chunk.
pub const PARAMETERS: &str = "parameters";

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let rgb = (0..5 * 3 * 3).map(|i| (i * 37 % 256) as u8).collect();
        let (width, height) = (5, 3);
        Image { width, height, rgb }
    }

    fn read(file: &[u8]) -> (Vec<String>, Vec<String>) {
        let reader = Decoder::new(Cursor::new(file)).read_info().unwrap();
        let info = reader.info();
        let latin = info.uncompressed_latin1_text.iter();
        let wide = info.utf8_text.iter();
        (
            latin
                .map(|chunk| format!("{}={}", chunk.keyword, chunk.text))
                .collect(),
            wide.map(|chunk| format!("{}={}", chunk.keyword, chunk.get_text().unwrap()))
                .collect(),
        )
    }

    #[test]
    fn a_picture_comes_back_with_its_parameters() {
        let file = encode(&image(), Some("a café\nSteps: 5")).unwrap();
        let decoded = decode(&file, 100).unwrap();
        assert_eq!((decoded.image, decoded.alpha), (image(), None));
        assert_eq!(
            read(&file),
            (vec!["parameters=a café\nSteps: 5".into()], vec![])
        );
        let file = encode(&image(), Some("日本\0")).unwrap();
        assert_eq!(read(&file), (vec![], vec!["parameters=日本".into()]));
        assert_eq!(read(&encode(&image(), None).unwrap()), (vec![], vec![]));
    }

    #[test]
    fn every_kind_of_file_becomes_rgb() {
        let file = |color, depth, palette: Option<&[u8]>, data: &[u8]| {
            let mut file = Vec::new();
            let mut encoder = Encoder::new(&mut file, 2, 1);
            encoder.set_color(color);
            encoder.set_depth(depth);
            if let Some(palette) = palette {
                encoder.set_palette(palette.to_vec());
                encoder.set_trns(vec![9, 255]);
            }
            let mut writer = encoder.write_header().unwrap();
            writer.write_image_data(data).unwrap();
            writer.finish().unwrap();
            let Decoded { image, alpha } = decode(&file, 2).unwrap();
            (image.rgb, alpha)
        };
        let (eight, sixteen) = (BitDepth::Eight, BitDepth::Sixteen);
        let grey = file(ColorType::Grayscale, eight, None, &[1, 2]);
        assert_eq!(grey, (vec![1, 1, 1, 2, 2, 2], None));
        let grey = file(ColorType::GrayscaleAlpha, eight, None, &[1, 7, 2, 8]);
        assert_eq!(grey, (vec![1, 1, 1, 2, 2, 2], Some(vec![7, 8])));
        let deep = file(ColorType::Grayscale, sixteen, None, &[1, 200, 2, 200]);
        assert_eq!(deep.0.len(), 6);
        let rgba = file(ColorType::Rgba, eight, None, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(rgba, (vec![1, 2, 3, 5, 6, 7], Some(vec![4, 8])));
        let bits = file(
            ColorType::Indexed,
            BitDepth::One,
            Some(&[1, 2, 3, 4, 5, 6]),
            &[0x40],
        );
        assert_eq!(bits, (vec![1, 2, 3, 4, 5, 6], Some(vec![9, 255])));
    }

    #[test]
    fn hostile_files_are_refused() {
        let file = encode(&image(), None).unwrap();
        let error = decode(&file, 14).unwrap_err().to_string();
        assert!(
            error.contains("5×3 pixels, over the limit of 14"),
            "{error}"
        );
        for length in 0..file.len() {
            let _ = decode(&file[..length], 100);
        }
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut changed = file.clone();
                changed[at] ^= 1 << bit;
                let _ = decode(&changed, 100);
            }
        }
        assert!(decode(b"", 100).is_err());
        assert!(decode(b"GIF89a", 100).is_err());
        let mut short = image();
        short.rgb.pop();
        let error = encode(&short, None).unwrap_err().to_string();
        assert_eq!(error, "a picture of 5×3 pixels has 44 bytes of RGB");
    }
}
