//! Small pictures of latents, without the autoencoder.
//!
//! A linear map of the channels to colours costs some thousandth of a millisecond where the decoder takes seconds. The factors were
//! found by others, who compared latents with decoded pictures:
//!
//! - Stable Diffusion 1 and 2, which share the space of latents: "keturn" in Hugging Face's forum, thread 23204, "Decoding latents to
//!   RGB without upscaling", for colours from -1 to 1.
//! - Stable Diffusion XL: Timothy Alexis Vass, "Explaining the SDXL latent space", Hugging Face's blog, for colours from 0 to 255.

use crate::config::Family;
use crate::imaging::{Image, LatentShape};

/// A linear map of latents with four channels to colours from 0 to 255.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentColours {
    /// For each channel its share of red, green and blue.
    pub factors: [[f32; 3]; 4],
    /// The colour of latents that are 0.
    pub bias: [f32; 3],
}

impl LatentColours {
    /// Those of a family.
    pub fn of(family: Family) -> Self {
        match family {
            Family::Sd1 | Family::Sd2 => LatentColours {
                factors: [
                    [0.298, 0.207, 0.208],
                    [0.187, 0.286, 0.173],
                    [-0.158, 0.189, 0.264],
                    [-0.184, -0.271, -0.473],
                ]
                .map(|row| row.map(|factor| factor * 127.5)),
                bias: [127.5; 3],
            },
            Family::Xl => LatentColours {
                factors: [
                    [60.0, 60.0, 60.0],
                    [-60.0, -5.0, 10.0],
                    [25.0, 15.0, -5.0],
                    [-70.0, -50.0, -35.0],
                ],
                bias: [150.0, 140.0, 130.0],
            },
        }
    }

    /// The picture of `latents`, a pixel for each place of a channel; `None` if they have not four channels of `shape`.
    pub fn picture(&self, latents: &[f32], shape: LatentShape) -> Option<Image> {
        let plane = shape.width * shape.height;
        if shape.channels != self.factors.len() || latents.len() != shape.len() || plane == 0 {
            return None;
        }
        let mut rgb = Vec::with_capacity(3 * plane);
        for at in 0..plane {
            for (colour, bias) in self.bias.iter().enumerate() {
                let channels = self.factors.iter().enumerate();
                let sum: f32 = channels
                    .map(|(channel, factors)| factors[colour] * latents[channel * plane + at])
                    .sum();
                // A number that is not finite becomes black.
                rgb.push((bias + sum).clamp(0.0, 255.0) as u8);
            }
        }
        Some(Image {
            width: u32::try_from(shape.width).ok()?,
            height: u32::try_from(shape.height).ok()?,
            rgb,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: LatentShape = LatentShape {
        channels: 4,
        height: 2,
        width: 3,
    };

    #[test]
    fn a_pixel_is_the_sum_of_its_channels() {
        let mut latents = vec![0.0; SHAPE.len()];
        // The last place: all of the first channel and half of the last.
        latents[5] = 1.0;
        latents[23] = 0.5;
        let xl = LatentColours::of(Family::Xl);
        let picture = xl.picture(&latents, SHAPE).unwrap();
        assert_eq!((picture.width, picture.height), (3, 2));
        assert_eq!(picture.rgb[..3], [150, 140, 130]);
        assert_eq!(picture.rgb[15..], [175, 175, 172]);
        let grey = LatentColours::of(Family::Sd1).picture(&[0.0; 24], SHAPE);
        assert_eq!(grey.unwrap().rgb, [127; 18]);
    }

    #[test]
    fn whatever_the_latents_are_there_is_a_picture_or_none() {
        let sd = LatentColours::of(Family::Sd2);
        for extreme in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38] {
            assert!(sd.picture(&[extreme; 24], SHAPE).is_some());
        }
        assert_eq!(sd.picture(&[0.0; 23], SHAPE), None);
        let sixteen = LatentShape {
            channels: 16,
            ..SHAPE
        };
        assert_eq!(sd.picture(&[0.0; 96], sixteen), None);
    }
}
