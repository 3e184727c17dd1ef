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
    /// In a stream, send the image as it is on its way so many times, too. Fewer come where there are as few steps, or where the
    /// worker is of an older version.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(max = 3)))]
    pub partial_images: Option<u32>,
    /// The client's own user. Has no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// An image to change as a text says. A form (`multipart/form-data`) has `image` and `mask` as files; JSON has them in base64 or as
/// `data:` URLs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EditImageRequest {
    /// The image: a PNG, JPEG or WebP file of at most 16,777,216 pixels. It is cut to the form of `size` and scaled. Where `size` is
    /// absent or `auto`, the image keeps its own size in multiples of 8, scaled down if that is more than four times the model's.
    pub image: String,
    /// A PNG or WebP file of the image's size: what is transparent is changed, all else stays as it is. Without it the transparent
    /// parts of the image are changed, or all of it if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
    /// Share of the steps that are run, and so of the image that is lost: 1 keeps nothing. 0.8 if absent, and 1 with a mask.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 0, max = 1)))]
    pub strength: Option<f32>,
    /// What to make of it, and how.
    #[serde(flatten)]
    pub options: CreateImageRequest,
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

/// The work of an image, in the form of OpenAI's count of tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ImageUsage {
    /// Tokens of the prompts, estimated from their lengths.
    pub input_tokens: u64,
    /// Work of the steps: squares of 64 by 64 pixels, times steps.
    pub output_tokens: u64,
    /// Both.
    pub total_tokens: u64,
    /// Parts of `input_tokens`.
    pub input_tokens_details: ImageInputTokens,
}

/// Parts of the input of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ImageInputTokens {
    /// Tokens of the prompts.
    pub text_tokens: u64,
    /// Squares of 64 by 64 pixels of the image to change.
    pub image_tokens: u64,
}

/// What makes images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ImageMaking {
    /// A text.
    #[default]
    Generation,
    /// A text and an image.
    Edit,
}

/// An event of a stream of images. Those of edits have types that begin with `image_edit` instead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type")]
pub enum ImageStreamEvent {
    /// A step is done.
    #[serde(rename = "image_generation.progress", alias = "image_edit.progress")]
    Progress {
        /// Index of the image.
        index: usize,
        /// Steps done.
        step: u32,
        /// Steps in all.
        steps: u32,
    },
    /// An image on its way.
    #[serde(
        rename = "image_generation.partial_image",
        alias = "image_edit.partial_image"
    )]
    PartialImage {
        /// Index of the image.
        #[serde(default)]
        index: usize,
        /// Number of this state of the image, from 0.
        partial_image_index: u32,
        /// Base64 of a PNG file of the image's size, without its details.
        b64_json: String,
        /// Time of the request, in seconds since 1970.
        #[serde(default)]
        created_at: u64,
        /// Width and height in pixels, such as `512x512`.
        #[serde(default)]
        size: String,
        /// Always `auto`.
        #[serde(default)]
        quality: String,
        /// Always `opaque`.
        #[serde(default)]
        background: String,
        /// Always `png`.
        #[serde(default)]
        output_format: String,
    },
    /// An image is done.
    #[serde(rename = "image_generation.completed", alias = "image_edit.completed")]
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
        /// Always `auto`.
        #[serde(default)]
        quality: String,
        /// Always `opaque`.
        #[serde(default)]
        background: String,
        /// Always `png`.
        #[serde(default)]
        output_format: String,
        /// Name of the model.
        #[serde(default)]
        model: String,
        /// Its work.
        #[serde(default)]
        usage: ImageUsage,
        /// The image.
        #[serde(flatten)]
        image: Image,
    },
}

impl ImageStreamEvent {
    /// Its type, as it is sent.
    pub fn name(&self, making: ImageMaking) -> &'static str {
        match (self, making) {
            (Self::Progress { .. }, ImageMaking::Generation) => "image_generation.progress",
            (Self::Progress { .. }, ImageMaking::Edit) => "image_edit.progress",
            (Self::PartialImage { .. }, ImageMaking::Generation) => {
                "image_generation.partial_image"
            }
            (Self::PartialImage { .. }, ImageMaking::Edit) => "image_edit.partial_image",
            (Self::Completed { .. }, ImageMaking::Generation) => "image_generation.completed",
            (Self::Completed { .. }, ImageMaking::Edit) => "image_edit.completed",
        }
    }

    /// Its JSON, as it is sent.
    pub fn json(&self, making: ImageMaking) -> Vec<u8> {
        let mut value = serde_json::to_value(self).expect("our own types are JSON");
        value["type"] = self.name(making).into();
        value.to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

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
            quality: "auto".into(),
            background: "opaque".into(),
            output_format: "png".into(),
            model: "m".into(),
            usage: ImageUsage::default(),
            image,
        };
        for (making, name) in [
            (ImageMaking::Generation, "image_generation.completed"),
            (ImageMaking::Edit, "image_edit.completed"),
        ] {
            let sent: Value = serde_json::from_slice(&event.json(making)).unwrap();
            assert_eq!(sent["type"], name);
            assert_eq!(sent["b64_json"], "aGk=");
            let read = serde_json::from_value::<ImageStreamEvent>(sent);
            assert_eq!(read.unwrap(), event);
        }
        let partial = json!({"type": "image_edit.partial_image", "b64_json": "aGk=", "partial_image_index": 2});
        let partial = serde_json::from_value::<ImageStreamEvent>(partial);
        let name = partial.unwrap().name(ImageMaking::Generation);
        assert_eq!(name, "image_generation.partial_image");
        let least = json!({"type": "image_generation.completed", "b64_json": "aGk="});
        assert!(serde_json::from_value::<ImageStreamEvent>(least).is_ok());
    }
}
