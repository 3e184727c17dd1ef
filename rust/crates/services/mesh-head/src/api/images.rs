//! `/v1/images/generations`: parses the body, and writes the answer. DCF tasks of kind `image` are read alike.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_api::{Image, ImageFormat, ImageTimings};

use crate::api::fields::{Api, Fields, check, seed};
use crate::api::invalid::Invalid;
use crate::api::json;
use crate::flight::task::{ImageRequest, MadeImage};

/// A checked request for images.
#[derive(Debug, Clone, PartialEq)]
pub struct AskedImages {
    /// The first image.
    pub request: ImageRequest,
    /// Number of images.
    pub count: u32,
    /// Form of the images.
    pub format: ImageFormat,
    /// Send each image as an event.
    pub stream: bool,
    /// In a stream, send an event after each step.
    pub progress: bool,
    /// Fields that mean nothing here.
    pub ignored: Vec<String>,
}

impl AskedImages {
    /// Reads a body.
    ///
    /// # Errors
    /// [`Invalid`] names the field that is wrong or not supported.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let object = json::object(body)?;
        Self::of(Api::Images, Fields::of(&object))
    }

    /// Reads the fields of a body, of a kind of request for images.
    ///
    /// # Errors
    /// As [`AskedImages::parse`].
    pub(crate) fn of(api: Api, fields: Fields<'_>) -> Result<Self, Invalid> {
        let ignored = check(api, fields)?;
        let ignored = ignored.into_iter().map(str::to_owned).collect();
        let format = match fields.text("response_format")? {
            None | Some("b64_json") => ImageFormat::B64Json,
            Some("url") => ImageFormat::Url,
            Some(other) => {
                let text =
                    format!("'response_format' must be \"b64_json\" or \"url\", not {other:?}");
                return Err(Invalid::new("response_format", text));
            }
        };
        // It only names the client's own user.
        fields.text("user")?;
        let stream = fields.flag("stream")?;
        let previews = fields.whole("partial_images", 0..=MOST_PREVIEWS)?;
        if previews > Some(0) && !stream {
            let text =
                "'partial_images' needs 'stream': true, since a whole answer has only whole images";
            return Err(Invalid::new("partial_images", text));
        }
        Ok(Self {
            request: ImageRequest {
                previews: previews.unwrap_or(0),
                ..Self::of_fields(fields)?
            },
            count: fields.whole("n", 1..=MOST_IMAGES)?.unwrap_or(1),
            format,
            stream,
            progress: fields.flag("progress")?,
            ignored,
        })
    }

    /// Reads the fields of a body or of a DCF task that describe one image.
    ///
    /// # Errors
    /// As [`AskedImages::parse`].
    pub(crate) fn of_fields(fields: Fields<'_>) -> Result<ImageRequest, Invalid> {
        let prompt = prompt(fields, "prompt")?.ok_or_else(|| Invalid::missing("prompt"))?;
        let (sampler, karras) = sampler(fields)?;
        Ok(ImageRequest {
            model: fields.name("model")?.map(str::to_owned),
            prompt,
            negative_prompt: prompt_or_empty(fields)?,
            size: size(fields)?,
            steps: first_of(STEPS, |name| fields.whole(name, 1..=MOST_STEPS))?,
            guidance: first_of(GUIDANCE, |name| fields.number(name, 0.0..=MOST_GUIDANCE))?,
            seed: first_of(SEED, |name| seed(fields, name))?,
            sampler,
            karras,
            ..ImageRequest::default()
        })
    }
}

/// An image in the form that was asked for, but for one that is fetched from a URL.
pub(crate) fn image(made: &MadeImage, url: Option<String>) -> Image {
    Image {
        b64_json: url.is_none().then(|| STANDARD.encode(&made.png)),
        url,
        seed: Some(made.seed),
        timings: Some(ImageTimings {
            steps: made.steps,
            total_ms: u64::try_from(made.total.as_millis()).unwrap_or(u64::MAX),
            reruns: made.reruns,
            worker: made.worker.clone(),
        }),
    }
}

fn prompt(fields: Fields<'_>, name: &str) -> Result<Option<String>, Invalid> {
    let Some(text) = fields.text(name)? else {
        return Ok(None);
    };
    let bytes = text.len();
    if bytes > LONGEST_PROMPT {
        let text = format!("'{name}' has {bytes} bytes, more than the limit of {LONGEST_PROMPT}");
        return Err(Invalid::new(name, text));
    }
    if name == "prompt" && text.trim().is_empty() {
        return Err(Invalid::new(
            name,
            "'prompt' is empty: describe the image that you want",
        ));
    }
    Ok(Some(text.to_owned()))
}

fn prompt_or_empty(fields: Fields<'_>) -> Result<String, Invalid> {
    Ok(prompt(fields, "negative_prompt")?.unwrap_or_default())
}

/// Width and height in pixels; `None` for the model's own size.
fn size(fields: Fields<'_>) -> Result<Option<(u32, u32)>, Invalid> {
    let side = |name| {
        let side = fields.whole(name, SIDES)?;
        match side {
            Some(side) if !side.is_multiple_of(8) => Err(Invalid::new(
                name,
                format!("'{name}' is {side}, but must be a multiple of 8"),
            )),
            side => Ok(side),
        }
    };
    let (width, height) = (side("width")?, side("height")?);
    let text = fields.text("size")?.filter(|text| *text != "auto");
    let Some(text) = text else {
        return match (width, height) {
            (None, None) => Ok(None),
            (Some(width), Some(height)) => Ok(Some((width, height))),
            (Some(_), None) => Err(Invalid::new("height", "'width' needs 'height' beside it")),
            (None, Some(_)) => Err(Invalid::new("width", "'height' needs 'width' beside it")),
        };
    };
    let wrong = || {
        let (least, most) = (SIDES.start(), SIDES.end());
        let text = format!(
            "'size' is {text:?}, but must be \"auto\" or WIDTHxHEIGHT with multiples of 8 from {least} to {most}, such as \"512x512\""
        );
        Invalid::new("size", text)
    };
    let (one, other) = text.split_once(['x', 'X', '*']).ok_or_else(wrong)?;
    let number = |side: &str| {
        let digits = side.len() <= 5 && side.bytes().all(|byte| byte.is_ascii_digit());
        let side = digits.then(|| side.parse::<u32>().ok()).flatten();
        side.filter(|side| SIDES.contains(side) && side.is_multiple_of(8))
    };
    let sides = number(one).zip(number(other)).ok_or_else(wrong)?;
    if width.is_some_and(|width| width != sides.0) || height.is_some_and(|side| side != sides.1) {
        let text = "'size' and 'width' or 'height' differ: leave one of them out";
        return Err(Invalid::new("size", text));
    }
    Ok(Some(sides))
}

/// Name of the sampler, and whether its noise levels are those of Karras et al.
fn sampler(fields: Fields<'_>) -> Result<(Option<String>, bool), Invalid> {
    let mut known = None;
    let mut karras = false;
    for name in SAMPLER {
        let Some(text) = fields.name(name)? else {
            continue;
        };
        let Some((sampler, of_karras)) = sampler_of(text) else {
            let text = format!(
                "'{name}' is {text:?}, but the samplers here are {}; leave it out for the model's own",
                SAMPLERS.map(|(name, _)| name).join(", ")
            );
            return Err(Invalid::new(*name, text));
        };
        known = known.or(Some(sampler));
        karras |= of_karras;
    }
    for name in SCHEDULER {
        let Some(text) = fields.name(name)? else {
            continue;
        };
        match simple(text).as_str() {
            "karras" => karras = true,
            "automatic" | "normal" | "discrete" | "default" | "uniform" => {}
            _ => match sampler_of(text) {
                Some((sampler, of_karras)) => {
                    known = known.or(Some(sampler));
                    karras |= of_karras;
                }
                None => {
                    let text = format!(
                        "'{name}' is {text:?}, but must be \"karras\", \"normal\" or the class of a diffusers scheduler"
                    );
                    return Err(Invalid::new(*name, text));
                }
            },
        }
    }
    Ok((known.map(str::to_owned), karras))
}

/// The sampler that a name of any server means, and whether it asks for the noise levels of Karras et al.
fn sampler_of(name: &str) -> Option<(&'static str, bool)> {
    let name = simple(name);
    let bare = name.strip_suffix("karras");
    let plain = bare.unwrap_or(&name);
    let known = SAMPLERS.iter().find(|(sampler, others)| {
        simple(sampler) == plain || others.split_ascii_whitespace().any(|other| other == plain)
    });
    known.map(|(sampler, _)| (*sampler, bare.is_some()))
}

/// Letters in lower case, and digits.
fn simple(name: &str) -> String {
    let kept = name.chars().filter(char::is_ascii_alphanumeric);
    kept.map(|c| c.to_ascii_lowercase()).collect()
}

/// The value of the first of several names of a field that is there.
pub(crate) fn first_of<T>(
    names: &[&str],
    read: impl Fn(&str) -> Result<Option<T>, Invalid>,
) -> Result<Option<T>, Invalid> {
    let mut first = None;
    for name in names {
        let value = read(name)?;
        first = first.or(value);
    }
    Ok(first)
}

/// The samplers, each with the other names that servers give it, in lower-case letters and digits.
const SAMPLERS: [(&str, &str); 5] = [
    (
        "dpmpp_2m",
        "dpm2m kdpmpp2m dpmsolvermultistep dpmsolvermultistepscheduler dpmsolver",
    ),
    ("euler", "keuler eulerdiscretescheduler"),
    (
        "euler_a",
        "keulera keulerancestral eulerancestral eulerancestraldiscretescheduler",
    ),
    ("ddim", "ddimscheduler"),
    ("lcm", "lcmscheduler"),
];

/// Names of one field, the first of which counts.
const STEPS: &[&str] = &[
    "steps",
    "num_inference_steps",
    "inference_steps",
    "sample_steps",
];
const GUIDANCE: &[&str] = &["guidance_scale", "guidance", "cfg_scale"];
const SEED: &[&str] = &["seed", "random_seed", "sampling_seed"];
const SAMPLER: &[&str] = &[
    "sampler",
    "sampler_name",
    "sample_method",
    "sampling_method",
];
const SCHEDULER: &[&str] = &["scheduler", "schedule"];

/// As many as the OpenAI API makes.
const MOST_IMAGES: u32 = 10;
/// As many as the OpenAI API sends.
const MOST_PREVIEWS: u32 = 3;
/// No sampler gains by more.
const MOST_STEPS: u32 = 150;
const MOST_GUIDANCE: f64 = 50.0;
/// Pixels of a side. The largest image has 4 Mi pixels.
const SIDES: std::ops::RangeInclusive<u32> = 64..=2048;
/// Bytes of a prompt.
const LONGEST_PROMPT: usize = 32 << 10;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;

    fn parse(more: Value) -> Result<AskedImages, Invalid> {
        let mut body = json!({"prompt": "a lighthouse"});
        let map = body.as_object_mut().unwrap();
        map.extend(more.as_object().unwrap().clone());
        AskedImages::parse(body.to_string().as_bytes())
    }

    #[test]
    fn a_prompt_alone_leaves_all_to_the_model() {
        let asked = parse(json!({})).unwrap();
        let request = ImageRequest {
            prompt: "a lighthouse".into(),
            ..ImageRequest::default()
        };
        assert_eq!(asked.request, request);
        assert_eq!((asked.count, asked.format), (1, ImageFormat::B64Json));
        assert!(!asked.stream && !asked.progress && asked.ignored.is_empty());
    }

    #[test]
    fn what_servers_call_the_same_is_the_same() {
        for (body, steps, guidance) in [
            (json!({"steps": 7, "guidance_scale": 3.5}), 7, 3.5),
            (json!({"num_inference_steps": 7.0, "guidance": 3.5}), 7, 3.5),
            (json!({"sample_steps": 7, "cfg_scale": 3.5}), 7, 3.5),
            (
                json!({"steps": 7, "inference_steps": 9, "cfg_scale": 3.5}),
                7,
                3.5,
            ),
        ] {
            let request = parse(body.clone()).unwrap().request;
            assert_eq!(
                (request.steps, request.guidance),
                (Some(steps), Some(guidance)),
                "{body}"
            );
        }
        for (body, sampler, karras) in [
            (json!({"sampler_name": "DPM++ 2M Karras"}), "dpmpp_2m", true),
            (json!({"sampler": "dpmpp_2m"}), "dpmpp_2m", false),
            (
                json!({"sample_method": "euler_a", "schedule": "karras"}),
                "euler_a",
                true,
            ),
            (json!({"sampler": "Euler a"}), "euler_a", false),
            (
                json!({"scheduler": "EulerAncestralDiscreteScheduler"}),
                "euler_a",
                false,
            ),
            (json!({"scheduler": "DDIMScheduler"}), "ddim", false),
            (
                json!({"sampler": "LCM", "scheduler": "normal"}),
                "lcm",
                false,
            ),
            (json!({"sampler": "k_euler"}), "euler", false),
        ] {
            let request = parse(body.clone()).unwrap().request;
            assert_eq!(request.sampler.as_deref(), Some(sampler), "{body}");
            assert_eq!(request.karras, karras, "{body}");
        }
        let own = parse(json!({"scheduler": "karras"})).unwrap().request;
        assert_eq!((own.sampler, own.karras), (None, true));
    }

    #[test]
    fn sizes_come_in_two_forms() {
        for body in [
            json!({"size": "512x768"}),
            json!({"width": 512, "height": 768}),
            json!({"size": "512X768", "width": 512}),
        ] {
            assert_eq!(parse(body).unwrap().request.size, Some((512, 768)));
        }
        assert_eq!(parse(json!({"size": "auto"})).unwrap().request.size, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"prompt": null}), "prompt"),
            (json!({"prompt": " "}), "prompt"),
            (json!({"prompt": 5}), "prompt"),
            (json!({"prompt": "x".repeat(40_000)}), "prompt"),
            (json!({"negative_prompt": 5}), "negative_prompt"),
            (json!({"size": "512"}), "size"),
            (json!({"size": "513x512"}), "size"),
            (json!({"size": "4096x512"}), "size"),
            (json!({"size": "+512x512"}), "size"),
            (json!({"size": 512}), "size"),
            (json!({"size": "512x512", "width": 256}), "size"),
            (json!({"width": 512}), "height"),
            (json!({"width": 60, "height": 512}), "width"),
            (json!({"width": 68, "height": 512}), "width"),
            (json!({"n": 0}), "n"),
            (json!({"n": 11}), "n"),
            (json!({"steps": 0}), "steps"),
            (json!({"num_inference_steps": 151}), "num_inference_steps"),
            (json!({"cfg_scale": -1}), "cfg_scale"),
            (json!({"seed": "x"}), "seed"),
            (json!({"sampler": "heun"}), "sampler"),
            (json!({"scheduler": "exponential"}), "scheduler"),
            (json!({"response_format": "jpeg"}), "response_format"),
            (json!({"stream": 1}), "stream"),
            (
                json!({"stream": true, "partial_images": 4}),
                "partial_images",
            ),
            (json!({"partial_images": 1}), "partial_images"),
            (json!({"image": "AAAA"}), "image"),
            (json!({"model": 5}), "model"),
        ] {
            let invalid = parse(body.clone()).expect_err(&body.to_string());
            assert_eq!(invalid.param, param, "{body}");
        }
    }

    #[test]
    fn an_image_is_base64_or_a_url() {
        let made = MadeImage {
            png: vec![1, 2, 3].into(),
            seed: 7,
            steps: 4,
            total: Duration::from_millis(1500),
            ..MadeImage::default()
        };
        let inside = image(&made, None);
        assert_eq!(inside.b64_json.as_deref(), Some("AQID"));
        let outside = image(&made, Some("http://h/x.png".into()));
        assert_eq!((outside.b64_json, outside.seed), (None, Some(7)));
        assert_eq!(outside.timings.unwrap().total_ms, 1500);
    }
}
