//! Images.

use serde::{Deserialize, Serialize};

/// Images to make of a text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CreateImageRequest {
    /// Description of the image. At most 32,768 bytes; the model reads 75 tokens or a multiple of them.
    #[cfg_attr(feature = "schema", schemars(length(min = 1)))]
    pub prompt: String,
    /// The head's default model for images if absent. At most 512 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Description of what the image is to be unlike. At most 32,768 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    /// Number of images. Image number i, from 0, has the seed `seed` + i.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 10)))]
    pub n: Option<u32>,
    /// Width and height in pixels, such as `512x512`, or `auto` for the model's own size. Both are multiples of 8 from 64 to 2,048.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Width in pixels, instead of `size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 64, max = 2048)))]
    pub width: Option<u32>,
    /// Height in pixels, instead of `size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 64, max = 2048)))]
    pub height: Option<u32>,
    /// Denoising steps. The model's own number if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 150)))]
    pub steps: Option<u32>,
    /// Weight of the prompt. The model's own if absent; 1 leaves the negative prompt out and takes half the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 0, max = 50)))]
    pub guidance_scale: Option<f32>,
    /// The same seed gives the same image on workers of the same kind. Random if absent; the answer names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::integer"))]
    pub seed: Option<u64>,
    /// How noise is taken away: `dpmpp_2m`, `euler`, `euler_a`, `ddim` or `lcm`, also by the names that other servers give them. A name
    /// that ends in `karras` sets `scheduler`, too. The model's own if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampler: Option<String>,
    /// Noise levels: `karras`, or `normal`. The class name of a diffusers scheduler is a sampler.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<String>,
    /// Form of the images: base64 in the answer, or URLs at which this head has them for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ImageFormat>,
    /// Send each image as an event when it is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// In a stream, send an event after each step, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<bool>,
    /// The client's own user. Has no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Form of images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ImageFormat {
    /// Base64 of a PNG file.
    #[default]
    B64Json,
    /// A URL that needs no key and that nobody can guess. It ends after `http.image_lifetime`, or earlier when the client has more
    /// images than the memory for them holds.
    Url,
}

/// Images made of a text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ImagesResponse {
    /// Time of the request, in seconds since 1970.
    pub created: u64,
    /// The images, in the order of their seeds.
    pub data: Vec<Image>,
    /// Name of the model.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub model: String,
    /// Width and height in pixels, such as `512x512`.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub size: String,
    /// Always `png`.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub output_format: String,
}

/// An image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Image {
    /// Base64 of the PNG file, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b64_json: Option<String>,
    /// Where the PNG file is, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Seed of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How it came about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<ImageTimings>,
}

/// How an image came about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ImageTimings {
    /// Denoising steps.
    pub steps: u32,
    /// From the request to the image, in milliseconds.
    pub total_ms: u64,
    /// Times that another worker went on with it.
    pub reruns: u32,
    /// Name of the worker that finished it.
    pub worker: String,
}

/// An event of a stream of images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type")]
pub enum ImageStreamEvent {
    /// A step is done.
    #[serde(rename = "image_generation.progress")]
    Progress {
        /// Index of the image.
        index: usize,
        /// Steps done.
        step: u32,
        /// Steps in all.
        steps: u32,
    },
    /// An image is done.
    #[serde(rename = "image_generation.completed")]
    Completed {
        /// Index of the image.
        #[serde(default)]
        index: usize,
        /// Time of the request, in seconds since 1970.
        #[serde(default)]
        created_at: u64,
        /// Width and height in pixels, such as `512x512`.
        #[serde(default)]
        size: String,
        /// Always `png`.
        #[serde(default)]
        output_format: String,
        /// Name of the model.
        #[serde(default)]
        model: String,
        /// The image.
        #[serde(flatten)]
        image: Image,
    },
}

impl ImageStreamEvent {
    /// Its type, as it is sent.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Progress { .. } => "image_generation.progress",
            Self::Completed { .. } => "image_generation.completed",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_of_other_servers_are_read() {
        let sent = json!({"created": 5, "data": [{"url": "http://x/y.png", "revised_prompt": "z"}], "size": null});
        let read: ImagesResponse = serde_json::from_value(sent).unwrap();
        assert_eq!(read.data[0].url.as_deref(), Some("http://x/y.png"));
        assert_eq!(read.size, "");
    }

    #[test]
    fn events_have_openais_names() {
        let image = Image {
            b64_json: Some("aGk=".into()),
            ..Image::default()
        };
        let event = ImageStreamEvent::Completed {
            index: 1,
            created_at: 5,
            size: "64x64".into(),
            output_format: "png".into(),
            model: "m".into(),
            image,
        };
        let sent = serde_json::to_value(&event).unwrap();
        assert_eq!(sent["type"], event.name());
        assert_eq!(sent["b64_json"], "aGk=");
        assert_eq!(
            serde_json::from_value::<ImageStreamEvent>(sent).unwrap(),
            event
        );
        let least = json!({"type": "image_generation.completed", "b64_json": "aGk="});
        assert!(serde_json::from_value::<ImageStreamEvent>(least).is_ok());
    }
}
