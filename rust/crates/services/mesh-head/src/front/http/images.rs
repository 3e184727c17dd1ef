//! `/v1/images/generations`: images gathered into one body, or sent as events when they are done; and the images that
//! are fetched from URLs.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::stream::{self, Stream};
use mesh_api::{
    Code, ImageFormat, ImageInputTokens, ImageMaking, ImageStreamEvent, ImageUsage, ImagesResponse,
    paths,
};
use mesh_base::clock::unix_seconds;
use mesh_control::affinity::estimate_tokens;
use mesh_control::fair::Origin;
use mesh_control::image::{default_card, step_units};
use mesh_control::request::AnswerError;
use mesh_curtain::Need;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout_at};

use super::answer::GRACE;
use super::error::ApiError;
use super::hold;
use super::ignored::Ignored;
use super::intake;
use super::keys::{Client, Pass};
use super::models;
use super::state::{Api, RequestId};
use crate::api::image_edits::AskedEdit;
use crate::api::images::{AskedImages, image};
use crate::api::parse;
use crate::api::preview::{RenderedPreview, render};
use crate::flight::event::{Event, FOR_ROOM, next_step, words};
use crate::flight::image as flight;
use crate::flight::task::{ImageRequest, MadeImage};
use crate::ids;
use crate::locks::lock;
use crate::mesh::Lease;
use crate::metrics::Front;

/// `POST /v1/images/generations`.
pub(super) async fn generate(
    State(api): State<Api>,
    Extension(client): Extension<Client>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    client.papers.require(Need::Image)?;
    let (body, lease) = intake::body(&api, &client, body).await?;
    let asked = intake::parsed(&api.mesh, body, AskedImages::parse).await??;
    let pass = api.enter(&client, asked.count as usize)?.holding(lease);
    answer(
        api,
        client,
        id,
        &headers,
        (asked, ImageMaking::Generation),
        pass,
    )
    .await
}

/// `POST /v1/images/edits`.
pub(super) async fn edit(
    State(api): State<Api>,
    Extension(client): Extension<Client>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    client.papers.require(Need::Image)?;
    let (body, mut lease) = intake::body(&api, &client, body).await?;
    // The text of JSON, its fields and the files in them; a form has no more.
    lease.set(3 * body.len() as u64)?;
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind
        .and_then(|kind| kind.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    let parse = move |body: &[u8]| AskedEdit::parse(&kind, &Bytes::copy_from_slice(body));
    let asked = intake::parsed(&api.mesh, body, parse).await??;
    let pass = api.enter(&client, asked.images.count as usize)?;
    let named = asked.images.request.model.clone();
    let named = named.map(|name| models::served_as(&api.mesh, name));
    let model = named
        .or_else(|| api.mesh.first_imager())
        .unwrap_or_default();
    let card = api.mesh.image_card(&model).unwrap_or_else(default_card);
    let read = parse::in_turn(&api.mesh.decoding, move || asked.read_files(&card)).await;
    let unread = |_| ApiError::new(Code::InternalError, "the image could not be read");
    let asked = read.map_err(unread)??;
    let pixels = asked
        .request
        .init
        .as_ref()
        .map_or(0, |init| init.pixels.len());
    lease.set(pixels as u64)?;
    answer(
        api,
        client,
        id,
        &headers,
        (asked, ImageMaking::Edit),
        pass.holding(lease),
    )
    .await
}

/// Makes the images and answers with them.
async fn answer(
    api: Api,
    client: Client,
    id: RequestId,
    headers: &HeaderMap,
    (mut asked, making): (AskedImages, ImageMaking),
    pass: Pass,
) -> Result<Response, ApiError> {
    let ignored = Ignored::new(&api, &asked.ignored)?;
    let named = asked.request.model.take();
    asked.request.model = named.map(|name| models::served_as(&api.mesh, name));
    asked.request.origin = client.origin();
    asked.request.holder = client.papers.holder();
    asked.request.id = id.0;
    let base = base_url(headers);
    let (stream, keep_alive) = (asked.stream, api.mesh.config.http.keep_alive);
    let hold = api.hold();
    let making = Making::begin(api, asked, making, base, pass)?;
    let answer = match stream {
        true => making.stream(keep_alive).await,
        false => hold::whole(making.gather(), hold).await,
    };
    answer.map(|response| ignored.named_in(response))
}

/// `GET /v1/images/files/NAME`.
pub(super) async fn file(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let name = name.strip_suffix(".png").unwrap_or(&name);
    let found = lock(&api.images).get(name, std::time::Instant::now());
    let file = found.ok_or_else(|| {
        let text = "there is no such image, or its time is over (http.image_lifetime); ask for b64_json to keep one";
        ApiError::new(Code::ImageNotFound, text)
    })?;
    let mut response = file.into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "image/png"),
        (header::CACHE_CONTROL, "private, immutable"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

/// The address by which the client reached this head, or the proxy before it.
fn base_url(headers: &HeaderMap) -> String {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let scheme = match text("x-forwarded-proto") {
        Some("https") => "https",
        _ => "http",
    };
    // As the client sent it: it goes back to nobody else.
    let host = text("host").filter(|host| {
        let may_be = |c: char| c.is_ascii_alphanumeric() || ".-:[]_".contains(c);
        !host.is_empty() && host.chars().all(may_be)
    });
    host.map_or_else(String::new, |host| format!("{scheme}://{host}"))
}

/// The images of one request, on their way.
struct Making {
    api: Api,
    created: u64,
    making: ImageMaking,
    /// Tokens of the prompts, about.
    prompt_tokens: u32,
    format: ImageFormat,
    progress: bool,
    base: String,
    origin: Origin,
    /// Dropping it cancels those that are not done.
    running: JoinSet<()>,
    events: mpsc::UnboundedReceiver<(usize, News)>,
    made: Vec<Option<(MadeImage, Lease)>>,
    /// Previews that were sent, of each image.
    previews: Vec<u32>,
    /// A preview that becomes a file, and the index of its image.
    rendering: Option<(usize, JoinHandle<Option<RenderedPreview>>)>,
    left: usize,
    waits: String,
    sent: Instant,
    keep_alive: Duration,
    /// Counts against the client's limit until the answer is over.
    _pass: Pass,
}

/// News of one image.
enum News {
    Event(Event),
    Done(Box<Result<(MadeImage, Lease), AnswerError>>),
}

impl Making {
    fn begin(
        api: Api,
        asked: AskedImages,
        making: ImageMaking,
        base: String,
        pass: Pass,
    ) -> Result<Self, ApiError> {
        // Unbounded, yet bounded by the steps.
        let (sender, events) = mpsc::unbounded_channel();
        let mut running = JoinSet::new();
        let count = asked.count as usize;
        let seed = asked.request.seed.unwrap_or_else(|| ids::unique() >> 32);
        let origin = asked.request.origin;
        let texts = asked.request.prompt.len() + asked.request.negative_prompt.len();
        // As many at a time as keep the workers busy: each takes memory.
        let turns = Arc::new(Semaphore::new(at_once(&api, &asked.request)));
        for index in 0..count {
            let id = match index {
                0 => asked.request.id.clone(),
                index => format!("{}.{index}", asked.request.id),
            };
            let request = ImageRequest {
                id,
                seed: Some(seed.wrapping_add(index as u64)),
                ..asked.request.clone()
            };
            let (mesh, sender, turns) = (api.mesh.clone(), sender.clone(), turns.clone());
            running.spawn(async move {
                let _turn = turns.acquire().await;
                let tell = |event| drop(sender.send((index, News::Event(event))));
                let made = async {
                    let mut lease = mesh.lease(origin, 0)?;
                    let made = flight::make(&mesh, Front::Http, request, &mut lease, tell).await?;
                    // The file, and the same in base64.
                    lease.set(made.png.len() as u64 / 3 * 7)?;
                    Ok::<_, AnswerError>((made, lease))
                };
                let done = Box::new(made.await);
                let _ = sender.send((index, News::Done(done)));
            });
        }
        Ok(Self {
            api,
            created: unix_seconds(SystemTime::now()),
            making,
            prompt_tokens: estimate_tokens(texts),
            format: asked.format,
            progress: asked.progress,
            base,
            origin,
            running,
            events,
            made: (0..count).map(|_| None).collect(),
            previews: vec![0; count],
            rendering: None,
            left: count,
            waits: FOR_ROOM.to_owned(),
            sent: Instant::now(),
            keep_alive: GRACE,
            _pass: pass,
        })
    }

    /// The index of the next image that is done, or of one that got on; `None` when all are done.
    ///
    /// # Errors
    /// The first failure of any of them. The others are of no use without it.
    async fn next(&mut self) -> Option<Result<Progressed, ApiError>> {
        while self.left > 0 {
            if let Some((index, rendering)) = &mut self.rendering {
                let (index, rendered) = (*index, rendering.await);
                self.rendering = None;
                // An image goes on without a preview that failed.
                if let Ok(Some(file)) = rendered {
                    return Some(Ok(Progressed::Preview { index, file }));
                }
            }
            let Some((index, news)) = self.events.recv().await else {
                let text = "a task of this request ended without an answer";
                self.left = 0;
                return Some(Err(ApiError::new(Code::InternalError, text)));
            };
            match news {
                News::Event(Event::Queued) => FOR_ROOM.clone_into(&mut self.waits),
                News::Event(Event::Waits(progress)) => self.waits = words(&progress),
                News::Event(Event::Stepped {
                    step,
                    steps,
                    preview,
                }) => {
                    self.waits = next_step(step, steps);
                    if let Some(preview) = preview {
                        let render = move || render(&preview);
                        self.rendering = Some((index, tokio::task::spawn_blocking(render)));
                    }
                    return Some(Ok(Progressed::Step { index, step, steps }));
                }
                News::Event(_) => {}
                News::Done(done) => match *done {
                    Ok(made) => {
                        self.made[index] = Some(made);
                        self.left -= 1;
                        return Some(Ok(Progressed::Done(index)));
                    }
                    Err(error) => {
                        self.running.abort_all();
                        self.left = 0;
                        return Some(Err(ApiError::from(&error)));
                    }
                },
            }
        }
        None
    }

    /// The work of an image.
    fn usage(&self, made: &MadeImage) -> ImageUsage {
        let squares = u64::from(step_units(made.width, made.height));
        let image_tokens = match self.making {
            ImageMaking::Generation => 0,
            ImageMaking::Edit => squares,
        };
        let text_tokens = u64::from(self.prompt_tokens);
        let (input, output) = (text_tokens + image_tokens, squares * u64::from(made.steps));
        ImageUsage {
            input_tokens: input,
            output_tokens: output,
            total_tokens: input + output,
            input_tokens_details: ImageInputTokens {
                text_tokens,
                image_tokens,
            },
        }
    }

    /// All images in one body.
    async fn gather(mut self) -> Result<Bytes, ApiError> {
        while let Some(progressed) = self.next().await {
            progressed?;
        }
        let mut answer = ImagesResponse {
            created: self.created,
            output_format: FORMAT.to_owned(),
            ..ImagesResponse::default()
        };
        let mut leases = Vec::new();
        for (made, lease) in std::mem::take(&mut self.made).into_iter().flatten() {
            answer.size = size_of(&made);
            answer.model.clone_from(&made.model);
            answer.data.push(self.form(made)?);
            leases.push(lease);
        }
        let body = serde_json::to_vec(&answer).expect("our own types are JSON");
        drop(answer);
        // What was counted for the images is free for the body.
        let last = leases.pop();
        drop(leases);
        Ok(match last {
            Some(lease) => hold::counted(body, lease),
            None => body.into(),
        })
    }

    /// An image as its client wants it: itself, or where it is.
    fn form(&self, made: MadeImage) -> Result<mesh_api::Image, ApiError> {
        if self.format == ImageFormat::B64Json {
            return Ok(image(&made, None));
        }
        let name = ids::secret();
        let path = paths::IMAGE_FILE.replace("{name}", &name);
        let url = format!("{}{path}.png", self.base);
        let now = std::time::Instant::now();
        let kept = lock(&self.api.images).keep(name, self.origin, made.png.clone(), now);
        kept.map_err(|error| ApiError::new(Code::Overloaded, error.to_string()))?;
        Ok(image(&made, Some(url)))
    }

    /// Answers with a stream of server-sent events, as soon as a worker works on the request or nothing was
    /// against it for a moment. Until then a failure has its own HTTP status.
    async fn stream(mut self, keep_alive: Duration) -> Result<Response, ApiError> {
        let mut frames = VecDeque::new();
        let patience = Instant::now() + GRACE;
        if let Ok(Some(progressed)) = timeout_at(patience, self.next()).await {
            let progressed = progressed?;
            self.frame_of(&progressed, &mut frames)?;
        }
        if frames.is_empty() {
            frames.push_back(self.comment());
        }
        self.keep_alive = keep_alive;
        let mut response = Body::from_stream(self.into_frames(frames)).into_response();
        let headers = response.headers_mut();
        let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, kind);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    fn into_frames(
        self,
        first: VecDeque<Bytes>,
    ) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
        stream::unfold(
            (Some(self), first),
            |(mut making, mut frames): (Option<Self>, VecDeque<Bytes>)| async move {
                loop {
                    if let Some(frame) = frames.pop_front() {
                        if let Some(this) = &mut making {
                            this.sent = Instant::now();
                        }
                        return Some((Ok(frame), (making, frames)));
                    }
                    let mut this = making.take()?;
                    let quiet = this.sent + this.keep_alive;
                    let failure = match timeout_at(quiet, this.next()).await {
                        Err(_) => {
                            frames.push_back(this.comment());
                            None
                        }
                        Ok(Some(Ok(progressed))) => this.frame_of(&progressed, &mut frames).err(),
                        Ok(Some(Err(error))) => Some(error),
                        Ok(None) => {
                            frames.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                            continue;
                        }
                    };
                    match failure {
                        Some(error) => {
                            frames.push_back(frame("error", error.body().as_bytes()));
                        }
                        None => making = Some(this),
                    }
                }
            },
        )
    }

    fn frame_of(
        &mut self,
        progressed: &Progressed,
        frames: &mut VecDeque<Bytes>,
    ) -> Result<(), ApiError> {
        let event = match *progressed {
            Progressed::Step { index, step, steps } => {
                if !self.progress {
                    return Ok(());
                }
                ImageStreamEvent::Progress { index, step, steps }
            }
            Progressed::Preview { index, ref file } => {
                let number = self.previews[index];
                self.previews[index] += 1;
                let (width, height) = file.size;
                ImageStreamEvent::PartialImage {
                    index,
                    partial_image_index: number,
                    b64_json: STANDARD.encode(&file.png),
                    created_at: self.created,
                    size: format!("{width}x{height}"),
                    quality: QUALITY.to_owned(),
                    background: BACKGROUND.to_owned(),
                    output_format: FORMAT.to_owned(),
                }
            }
            Progressed::Done(index) => {
                let Some((made, _lease)) = self.made[index].take() else {
                    return Ok(());
                };
                ImageStreamEvent::Completed {
                    index,
                    created_at: self.created,
                    size: size_of(&made),
                    quality: QUALITY.to_owned(),
                    background: BACKGROUND.to_owned(),
                    output_format: FORMAT.to_owned(),
                    model: made.model.clone(),
                    usage: self.usage(&made),
                    image: self.form(made)?,
                }
            }
        };
        let data = event.json(self.making);
        frames.push_back(frame(event.name(self.making), &data));
        Ok(())
    }

    /// A comment, which clients skip and proxies count as life.
    fn comment(&self) -> Bytes {
        format!(": waiting {}\n\n", self.waits).into()
    }
}

/// Images of one request that are made at a time.
fn at_once(api: &Api, request: &ImageRequest) -> usize {
    let model = request.model.clone().or_else(|| api.mesh.first_imager());
    let workers = model.map_or(0, |model| api.mesh.replicas(&model).workers);
    (2 * workers).clamp(1, 64)
}

/// OpenAI's words for images as they are made here.
const QUALITY: &str = "auto";
const BACKGROUND: &str = "opaque";
const FORMAT: &str = "png";

enum Progressed {
    Step { index: usize, step: u32, steps: u32 },
    Preview { index: usize, file: RenderedPreview },
    Done(usize),
}

fn size_of(made: &MadeImage) -> String {
    format!("{}x{}", made.width, made.height)
}

/// A server-sent event with this JSON.
fn frame(name: &str, json: &[u8]) -> Bytes {
    [b"event: ", name.as_bytes(), b"\ndata: ", json, b"\n\n"]
        .concat()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_begins_as_the_client_reached_this_head() {
        let base = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            base_url(&headers)
        };
        assert_eq!(base(&[("host", "attic:8080")]), "http://attic:8080");
        let proxied = [("host", "[::1]:80"), ("x-forwarded-proto", "https")];
        assert_eq!(base(&proxied), "https://[::1]:80");
        assert_eq!(base(&[("host", "a\"onclick=b")]), "");
        assert_eq!(base(&[]), "");
    }
}
