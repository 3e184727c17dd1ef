//! `hydramesh image`: a text to an image, or to another form of an image.

mod preview;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mesh_api::{CreateImageRequest, EditImageRequest, ImageStreamEvent, paths};
use mesh_client::http::{Arrived, EventStream, HttpClient};
use serde::Serialize;

use self::preview::Screen;
use crate::args::{HeadArgs, ImageArgs};
use crate::ask::{http_client, within};
use crate::failure::{Exit, Failure};
use crate::input::standard_input;
use crate::output::{plain, print_now};

pub(crate) async fn run(head: &HeadArgs, args: ImageArgs) -> Result<(), Failure> {
    let nothing = Failure::usage("nothing to make an image of").hint(
        "hydramesh image \"a lighthouse in a storm\" -o lighthouse.png, or pipe a description in.",
    );
    let prompt = match standard_input(&args.prompt, nothing)? {
        Some(text) => text.trim().to_owned(),
        None => args.prompt.join(" "),
    };
    if prompt.is_empty() {
        return Err(Failure::usage("the description is empty"));
    }
    let count = args.count.unwrap_or(1);
    if count > 1 && to_standard_output(&args) {
        let text = "several images cannot go to standard output";
        return Err(
            Failure::usage(text).hint("Name a file with -o; a number is put before its ending.")
        );
    }
    let screen = screen(&args);
    let client = http_client(head)?;
    let asked = Asked::new(&args, prompt, screen.is_some())?;
    let making = within(args.timeout, make(&client, &asked, &args, count, screen));
    let made = tokio::select! {
        made = making => made,
        _ = tokio::signal::ctrl_c() => return Err(Failure::interrupted()),
    };
    made.map_err(|limit| {
        let text = format!("no image from {} within {limit:?}", client.base());
        Failure::new(Exit::Timeout, text)
            .hint("--timeout gives it longer, --steps asks for less work.")
    })?
}

/// The terminal, if pictures are to be shown in it.
fn screen(args: &ImageArgs) -> Option<Screen> {
    let wanted = !args.no_preview && !args.json && !to_standard_output(args);
    let wanted = wanted && std::io::stdout().is_terminal();
    wanted.then(|| Screen::of(|name| std::env::var(name).ok()))?
}

/// A request to the head.
enum Asked {
    Generation(CreateImageRequest),
    Edit(EditImageRequest),
}

impl Asked {
    fn new(args: &ImageArgs, prompt: String, previews: bool) -> Result<Self, Failure> {
        let options = CreateImageRequest {
            partial_images: previews.then_some(PREVIEWS),
            ..request(args, prompt)
        };
        let Some(init) = &args.init else {
            return Ok(Self::Generation(options));
        };
        let file = |path: &Path| {
            let file = std::fs::read(path).map_err(|error| {
                Failure::usage(format!("cannot read {}: {error}", path.display()))
            })?;
            Ok::<_, Failure>(STANDARD.encode(file))
        };
        Ok(Self::Edit(EditImageRequest {
            image: file(init)?,
            mask: args.mask.as_deref().map(file).transpose()?,
            strength: args.strength,
            options,
        }))
    }

    async fn send(&self, client: &HttpClient) -> Result<EventStream<ImageStreamEvent>, Failure> {
        Ok(match self {
            Self::Generation(request) => client.events(paths::IMAGES, request).await?,
            Self::Edit(request) => client.events(paths::IMAGE_EDITS, request).await?,
        })
    }
}

/// States of an image that are shown before it is done.
const PREVIEWS: u32 = 3;

fn request(args: &ImageArgs, prompt: String) -> CreateImageRequest {
    CreateImageRequest {
        prompt,
        model: args.model.clone(),
        negative_prompt: args.negative.clone(),
        n: args.count,
        size: args.size.clone(),
        steps: args.steps,
        guidance_scale: args.guidance,
        seed: args.seed,
        sampler: args.sampler.clone(),
        scheduler: args.karras.then(|| "karras".to_owned()),
        stream: Some(true),
        progress: Some(true),
        ..CreateImageRequest::default()
    }
}

/// An image that was written, for `--json`.
#[derive(Serialize)]
struct Written<'a> {
    file: &'a Path,
    seed: Option<u64>,
    size: &'a str,
    model: &'a str,
    steps: u32,
    seconds: f64,
}

async fn make(
    client: &HttpClient,
    asked: &Asked,
    args: &ImageArgs,
    count: u32,
    mut screen: Option<Screen>,
) -> Result<(), Failure> {
    let mut events = asked.send(client).await?;
    let bar = Bar::new(count);
    let mut left = count;
    while let Some(arrived) = events.next().await? {
        let event = match arrived {
            Arrived::Waits(why) => {
                bar.waits(&plain(&why));
                continue;
            }
            Arrived::Event(event) => event,
        };
        match event {
            ImageStreamEvent::Progress { step, steps, .. } => bar.stepped(step, steps),
            ImageStreamEvent::PartialImage { b64_json, .. } => {
                if let Some(screen) = &mut screen {
                    bar.hidden(|| print_now(&screen.draw(&b64_json)));
                }
            }
            ImageStreamEvent::Completed {
                index,
                size,
                model,
                image,
                ..
            } => {
                let encoded = image.b64_json.unwrap_or_default();
                if let Some(screen) = &mut screen {
                    bar.hidden(|| print_now(&screen.draw(&encoded)));
                    screen.keep();
                }
                let png = STANDARD.decode(encoded);
                let png = png.map_err(|error| {
                    Failure::failed(format!(
                        "the head sent an image that is not base64: {error}"
                    ))
                })?;
                let path = path_of(args, index, count, image.seed);
                write(&path, &png, args)?;
                left = left.saturating_sub(1);
                let timings = image.timings.unwrap_or_default();
                let written = Written {
                    file: &path,
                    seed: image.seed,
                    size: &size,
                    model: &model,
                    steps: timings.steps,
                    seconds: Duration::from_millis(timings.total_ms).as_secs_f64(),
                };
                bar.hidden(|| tell(&written, args))?;
            }
        }
    }
    if left > 0 {
        let text = format!("the head sent {left} images less than it was asked for");
        return Err(Failure::failed(text));
    }
    Ok(())
}

/// Prints where an image is. What goes to standard output is the image itself then.
fn tell(written: &Written<'_>, args: &ImageArgs) -> Result<(), Failure> {
    let seed = written
        .seed
        .map_or_else(String::new, |seed| format!(", seed {seed}"));
    let line = format!(
        "{}: {}{seed}, {} steps in {:.1} s by {}\n",
        written.file.display(),
        plain(written.size),
        written.steps,
        written.seconds,
        plain(written.model)
    );
    match (args.json, to_standard_output(args)) {
        (_, true) => eprint!("{line}"),
        (false, false) => print_now(&line),
        (true, false) => {
            let json = serde_json::to_string(written);
            let json = json.map_err(|error| Failure::failed(error.to_string()))?;
            print_now(&format!("{json}\n"));
        }
    }
    Ok(())
}

fn write(path: &Path, png: &[u8], args: &ImageArgs) -> Result<(), Failure> {
    let written = match to_standard_output(args) {
        true => {
            let mut out = std::io::stdout().lock();
            out.write_all(png).and_then(|()| out.flush())
        }
        false => std::fs::write(path, png),
    };
    written.map_err(|error| {
        let text = format!("cannot write {}: {error}", path.display());
        Failure::failed(text).hint("-o names another file.")
    })
}

fn to_standard_output(args: &ImageArgs) -> bool {
    args.output.as_deref() == Some(Path::new("-"))
}

/// The file of image number `index`. Several have a number, or their seed, in their names.
fn path_of(args: &ImageArgs, index: usize, count: u32, seed: Option<u64>) -> PathBuf {
    let Some(path) = &args.output else {
        let name = seed.map_or_else(|| index.to_string(), |seed| seed.to_string());
        return format!("image-{name}.png").into();
    };
    if count == 1 {
        return path.clone();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let ending = path.extension().map_or_else(String::new, |ending| {
        format!(".{}", ending.to_string_lossy())
    });
    path.with_file_name(format!("{stem}-{}{ending}", index + 1))
}

/// The steps of all images, on standard error if that is a terminal.
struct Bar {
    bar: ProgressBar,
    count: u64,
}

impl Bar {
    fn new(count: u32) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            bar.set_style(style);
        }
        Self {
            bar,
            count: u64::from(count),
        }
    }

    fn waits(&self, why: &str) {
        if self.bar.position() == 0 {
            self.bar.set_message(why.to_owned());
        }
    }

    /// A step of one image is done. One alone may do a step again after a worker's death.
    fn stepped(&self, step: u32, steps: u32) {
        let steps = u64::from(steps);
        if self.bar.length() != Some(steps * self.count) {
            self.bar.set_length(steps * self.count);
            let style = "{wide_bar} {pos}/{len} steps  {elapsed}  {eta} left";
            if let Ok(style) = ProgressStyle::with_template(style) {
                self.bar.set_style(style);
            }
        }
        match self.count {
            1 => self.bar.set_position(u64::from(step)),
            _ => self.bar.inc(1),
        }
    }

    fn hidden<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::args::{Args, Command};

    fn parse(words: &[&str]) -> ImageArgs {
        let words = ["hydramesh", "image"].iter().chain(words);
        match Args::try_parse_from(words).expect("arguments").command {
            Command::Image(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_was_said_is_in_the_body() {
        let body = |words: &[&str]| {
            let args = parse(words);
            serde_json::to_value(request(&args, args.prompt.join(" "))).unwrap()
        };
        let least = json!({"prompt": "a fox", "stream": true, "progress": true});
        assert_eq!(body(&["a", "fox"]), least);
        let all = body(&[
            "--size",
            "512x768",
            "--steps",
            "7",
            "--guidance",
            "3.5",
            "--seed",
            "9",
            "--negative",
            "blurry",
            "--sampler",
            "euler",
            "--karras",
            "-n",
            "2",
            "-m",
            "sd",
            "a fox",
        ]);
        let expected = json!({
            "prompt": "a fox", "stream": true, "progress": true, "size": "512x768", "steps": 7, "guidance_scale": 3.5, "seed": 9,
            "negative_prompt": "blurry", "sampler": "euler", "scheduler": "karras", "n": 2, "model": "sd",
        });
        assert_eq!(all, expected);
    }

    #[test]
    fn an_image_to_start_from_is_an_edit() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, name).expect("a file");
            path.display().to_string()
        };
        let (init, mask) = (file("init"), file("mask"));
        let args = parse(&["--init", &init, "--mask", &mask, "--strength", "0.5", "x"]);
        let Ok(Asked::Edit(edit)) = Asked::new(&args, "x".into(), true) else {
            panic!("an edit");
        };
        let body = serde_json::to_value(edit).expect("JSON");
        let expected = json!({
            "image": "aW5pdA==", "mask": "bWFzaw==", "strength": 0.5, "prompt": "x", "stream": true, "progress": true,
            "partial_images": 3,
        });
        assert_eq!(body, expected);
        let missing = parse(&["--init", "/no/such/file", "x"]);
        assert!(Asked::new(&missing, "x".into(), false).is_err());
        for words in [["--mask", "m"], ["--strength", "0.5"]] {
            let words = ["hydramesh", "image", words[0], words[1], "x"];
            assert!(Args::try_parse_from(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn every_image_has_a_file_of_its_own() {
        let path = |words: &[&str], index, count| {
            let path = path_of(&parse(words), index, count, Some(7 + index as u64));
            path.display().to_string()
        };
        assert_eq!(path(&["x"], 0, 1), "image-7.png");
        assert_eq!(path(&["x"], 1, 2), "image-8.png");
        assert_eq!(path(&["-o", "d/fox.png", "x"], 0, 1), "d/fox.png");
        assert_eq!(path(&["-o", "d/fox.png", "x"], 1, 2), "d/fox-2.png");
        assert_eq!(path(&["-o", "fox", "x"], 0, 2), "fox-1");
    }
}
