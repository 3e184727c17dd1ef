//! `hydramesh ask`: one question, over DCF/UDP or HTTP.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER_PERMISSIVE;
use mesh_api::{ChatCompletionRequest, GenerationOptions, Message, StopTexts};
use mesh_base::addresses::with_port;
use mesh_client::dcf_udp::{Answer, DcfClient, SealedTarget};
use mesh_client::http::{Heard, HttpClient};
use serde_json::{Value, json};

use crate::args::{AskArgs, HeadArgs, SamplingArgs};
use crate::failure::{Exit, Failure};
use crate::input;
use crate::output::{Stats, Terminal, Timer, WaitLine, print_now};

pub(crate) async fn run(head: &HeadArgs, args: AskArgs, terminal: Terminal) -> Result<(), Failure> {
    let question = input::prompt(&args.question)?;
    let over_http = goes_over_http(head, &args, |name| std::env::var(name).ok())?;
    let body = task(&args, over_http, &question);
    let answer = tokio::select! {
        answer = ask(head, &args, over_http, &body) => answer?,
        _ = tokio::signal::ctrl_c() => {
            print_now("\n");
            return Err(Failure::interrupted());
        }
    };
    if args.json {
        let mut object = json!({
            "text": answer.text,
            "first_token_ms": millis(answer.stats.first_text),
            "total_ms": millis(answer.stats.total),
            "tokens": answer.stats.tokens,
            "tokens_per_second": answer.stats.tokens_per_second(),
        });
        for (key, value) in answer.more {
            object[key] = value;
        }
        print_now(&format!("{object}\n"));
    } else {
        print_now("\n");
    }
    if args.stats {
        eprintln!("{}", terminal.dim(&answer.stats.line()));
    }
    Ok(())
}

/// A whole answer, from either carrier.
struct Outcome {
    text: String,
    stats: Stats,
    /// Facts that only one carrier reports, for `--json`.
    more: Vec<(&'static str, Value)>,
}

/// True if the question goes to the head's HTTP API. Arguments override environment variables.
fn goes_over_http(
    head: &HeadArgs,
    args: &AskArgs,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<bool, Failure> {
    if args.sealed.is_some() {
        return Ok(false);
    }
    let typed = |value: &Option<String>, name| value.is_some() && *value != environment(name);
    let url = typed(&head.url, "HYDRAMESH_URL");
    let to = typed(&args.to, "HYDRAMESH_DCF");
    if args.http {
        return Ok(true);
    }
    if url && to {
        return Err(Failure::usage(
            "--to names a shim and --url a head: the question can go to one of them only",
        )
        .hint("Leave one of them out, or add --http to ask the head."));
    }
    Ok(url || (head.url.is_some() && args.to.is_none()))
}

async fn ask(
    head: &HeadArgs,
    args: &AskArgs,
    over_http: bool,
    body: &ChatCompletionRequest,
) -> Result<Outcome, Failure> {
    let line = RefCell::new(WaitLine::new());
    let mut print = |text: &str| {
        if !args.json {
            line.borrow_mut().clear();
            print_now(text);
        }
    };
    let mut wait = |what: &str| line.borrow_mut().show(what);
    let mut no_shim = None;
    if !over_http {
        let outcome = match &args.sealed {
            Some(sealed) => sealed_datagrams(head, sealed, args, body, &mut print, &mut wait).await,
            None => over_datagrams(args, body, &mut print, &mut wait).await,
        };
        match outcome {
            // A mesh needs no shim: the head may be there without one.
            Err(failure)
                if args.to.is_none()
                    && args.sealed.is_none()
                    && failure.exit == Exit::Unreachable =>
            {
                no_shim = Some(failure);
            }
            outcome => return outcome,
        }
    }
    let client = http_client(head)?;
    let asking = ask_http(&client, body, &mut print, &mut wait);
    let outcome = within(args.timeout, asking).await;
    match outcome.map_err(|limit| too_late(client.base(), limit))? {
        Err(failure) if failure.exit == Exit::Unreachable => Err(no_shim.unwrap_or(failure)),
        outcome => outcome,
    }
}

async fn over_datagrams(
    args: &AskArgs,
    body: &ChatCompletionRequest,
    print: &mut dyn FnMut(&str),
    wait: &mut dyn FnMut(&str),
) -> Result<Outcome, Failure> {
    let to = &with_port(args.to.as_deref().unwrap_or(LOCAL_SHIM), SHIM_PORT);
    let client = DcfClient::connect(to).await?;
    ask_client(client, to, args, body, print, wait).await
}

/// Opens a session at the head with the key or token, and asks in it.
async fn sealed_datagrams(
    head: &HeadArgs,
    sealed: &str,
    args: &AskArgs,
    body: &ChatCompletionRequest,
    print: &mut dyn FnMut(&str),
    wait: &mut dyn FnMut(&str),
) -> Result<Outcome, Failure> {
    let to = with_port(sealed, QUIC_PORT);
    let no_key = || {
        Failure::usage("sealed DCF needs an API key or a curtain token")
            .hint("Name its file with --api-key-file or HYDRAMESH_API_KEY_FILE.")
    };
    let credential = input::key_file(head.api_key_file.as_deref().ok_or_else(no_key)?)?;
    let root = root_digest(args.root.as_deref().unwrap_or_default())?;
    let target = SealedTarget {
        head: &to,
        root: &root,
        credential: &credential,
        tenant: "",
    };
    let client = DcfClient::sealed(target).await?;
    ask_client(client, &to, args, body, print, wait).await
}

/// The digest of the mesh root, from its text or from the file of its certificate.
fn root_digest(named: &str) -> Result<[u8; 32], Failure> {
    if let Ok(digest) = HEXLOWER_PERMISSIVE.decode(named.as_bytes())
        && let Ok(digest) = <[u8; 32]>::try_from(digest)
    {
        return Ok(digest);
    }
    let wrong = |reason: String| {
        Failure::usage(format!("--root {named}: {reason}")).hint(
            "It is the file root.crt of the head's state folder, or the 64 hex digits that `hydramesh root show` prints.",
        )
    };
    let text = std::fs::read_to_string(named).map_err(|error| wrong(error.to_string()))?;
    mesh_net::trust::root_digest(&text).map_err(|error| wrong(error.to_string()))
}

async fn ask_client(
    mut client: DcfClient,
    to: &str,
    args: &AskArgs,
    body: &ChatCompletionRequest,
    print: &mut dyn FnMut(&str),
    wait: &mut dyn FnMut(&str),
) -> Result<Outcome, Failure> {
    let mut wait = |what: &str| wait(&format!("waiting {what}"));
    let asking = client.ask_and_watch(body, SILENCE, print, &mut wait);
    let answer = within(args.timeout, asking).await;
    let answer = answer.map_err(|limit| too_late(to, limit))??;
    Ok(Outcome {
        stats: datagram_stats(&answer),
        text: answer.text,
        more: vec![("repeats", answer.repeats.into())],
    })
}

/// Waits until the limit has passed, if there is one: then the error is the limit.
pub(crate) async fn within<T>(
    limit: Option<Duration>,
    asking: impl Future<Output = T>,
) -> Result<T, Duration> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, asking).await.map_err(|_| limit),
        None => Ok(asking.await),
    }
}

fn too_late(address: &str, limit: Duration) -> Failure {
    let text = format!("no whole answer from {address} within {limit:?}");
    Failure::new(Exit::Timeout, text)
        .hint("--timeout gives it longer; without it there is no limit while the mesh works on it.")
}

/// A Result does not contain its number of tokens; the Partials, about one for each token, give it.
pub(crate) fn datagram_stats(answer: &Answer) -> Stats {
    Stats {
        first_text: answer.first_text,
        total: answer.total,
        tokens: (answer.partials > 0).then_some(u64::from(answer.partials)),
    }
}

async fn ask_http(
    client: &HttpClient,
    body: &ChatCompletionRequest,
    print: &mut dyn FnMut(&str),
    wait: &mut dyn FnMut(&str),
) -> Result<Outcome, Failure> {
    let mut timer = Timer::since(Instant::now());
    let mut body = body.clone();
    name_the_model(client, &mut body.options).await?;
    let mut stream = client.stream(body).await?;
    let mut text = String::new();
    let mut more = Vec::new();
    while let Some(heard) = stream.next_or_wait().await? {
        let piece = match heard {
            Heard::Piece(piece) => *piece,
            Heard::Waits(what) => {
                wait(&what);
                continue;
            }
        };
        timer.note(&piece);
        if !piece.text.is_empty() {
            text += &piece.text;
            print(&piece.text);
        }
        if let Some(usage) = piece.usage {
            more.push(("usage", json!(usage)));
        }
        if let Some(reason) = piece.finish_reason {
            more.push(("finish_reason", reason.into()));
        }
        if let Some(timings) = piece.timings {
            more.push(("timings", json!(timings)));
        }
    }
    Ok(Outcome {
        text,
        stats: timer.stats(),
        more,
    })
}

/// The OpenAI API wants a model's name; the only or first one where the user gave none.
pub(crate) async fn name_the_model(
    client: &HttpClient,
    options: &mut GenerationOptions,
) -> Result<(), Failure> {
    if options.model.is_none() {
        let models = client.models().await?;
        let first = models.into_iter().next().ok_or_else(|| {
            Failure::new(Exit::NoWorker, "no worker serves a model now")
                .hint("`hydramesh status` shows the workers that have joined.")
        })?;
        options.model = Some(first);
    }
    Ok(())
}

pub(crate) fn http_client(head: &HeadArgs) -> Result<HttpClient, Failure> {
    let key_file = head.api_key_file.as_deref();
    let key = key_file.map(input::key_file).transpose()?;
    head_client(head, key)
}

/// A client of the head with this key.
pub(crate) fn head_client(head: &HeadArgs, key: Option<String>) -> Result<HttpClient, Failure> {
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|error| Failure::failed(format!("{}: {error}", path.display())))
    };
    let authorities = head.ca_file.as_ref().map(read).transpose()?;
    let client = HttpClient::trusting(head.url(), key, authorities.as_deref())?;
    Ok(client)
}

/// The sampling parameters that were given, under the names that both carriers know.
pub(crate) fn sampling(args: &SamplingArgs) -> GenerationOptions {
    GenerationOptions {
        model: args.model.clone(),
        max_tokens: args.max_tokens.map(i64::from),
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        ..GenerationOptions::default()
    }
}

fn task(args: &AskArgs, over_http: bool, question: &str) -> ChatCompletionRequest {
    let system = args.system.iter().map(|text| Message::new("system", text));
    ChatCompletionRequest {
        messages: system.chain([Message::new("user", question)]).collect(),
        options: GenerationOptions {
            stop: (!args.stop.is_empty()).then(|| StopTexts::Many(args.stop.clone())),
            // With --json, too: the pieces tell when the first text came.
            stream: (!over_http).then_some(true),
            ..sampling(&args.sampling)
        },
        ..ChatCompletionRequest::default()
    }
}

/// Host of a shim by default.
const LOCAL_SHIM: &str = "127.0.0.1";
const SHIM_PORT: u16 = 9999;
/// A head's QUIC port.
const QUIC_PORT: u16 = 7780;

/// Longest silence over UDP. A mesh that works on a task says so every few seconds.
const SILENCE: Duration = Duration::from_secs(60);

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e5).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;

    fn parse(words: &[&str]) -> AskArgs {
        let args = Args::try_parse_from([&["hydramesh", "ask"], words].concat()).expect("sound");
        match args.command {
            Command::Ask(args) => args,
            _ => unreachable!("ask was asked for"),
        }
    }

    #[test]
    fn sealed_dcf_needs_the_root_as_a_digest_or_a_file() {
        let parse = |words: &[&str]| {
            Args::try_parse_from([&["hydramesh", "ask", "hi", "--sealed", "attic"], words].concat())
        };
        let digest = "5d".repeat(32);
        assert!(parse(&["--root", &digest]).is_ok());
        assert!(parse(&["--root", &digest, "--http"]).is_err());
        if std::env::var_os("HYDRAMESH_ROOT").is_none() {
            assert!(parse(&[]).is_err());
        }
        assert_eq!(root_digest(&digest).expect("a digest"), [0x5d; 32]);
        let failure = root_digest("/nonexistent/root.crt").expect_err("no file");
        assert!(failure.message.contains("/nonexistent/root.crt"));
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(&file, "no certificate").expect("written");
        let named = file.path().to_str().expect("UTF-8");
        assert!(root_digest(named).is_err());
    }

    #[test]
    fn a_question_goes_where_it_is_sent() {
        let goes = |words: &str, environment: &[(&str, &str)]| {
            let words = ["hydramesh", "ask", "hi"]
                .into_iter()
                .chain(words.split_whitespace());
            let mut parsed = Args::try_parse_from(words).expect("sound");
            let Command::Ask(mut args) = parsed.command else {
                unreachable!("ask was asked for");
            };
            let value = |name: &str| {
                let found = environment.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            // As the parser would have found them there.
            parsed.head.url = parsed.head.url.or(value("HYDRAMESH_URL"));
            args.to = args.to.or(value("HYDRAMESH_DCF"));
            goes_over_http(&parsed.head, &args, value).map_err(|failure| failure.exit)
        };
        assert_eq!(goes("", &[]), Ok(false));
        assert_eq!(goes("--url http://a", &[]), Ok(true));
        assert_eq!(goes("--to a:9999", &[]), Ok(false));
        assert_eq!(goes("--http --to a:9999", &[]), Ok(true));
        assert_eq!(goes("--to a:9999 --url http://a", &[]), Err(Exit::Usage));
        let both = [("HYDRAMESH_URL", "http://e"), ("HYDRAMESH_DCF", "e:9999")];
        assert_eq!(goes("", &both[..1]), Ok(true));
        assert_eq!(goes("", &both), Ok(false));
        assert_eq!(goes("--url http://a", &both), Ok(true));
        assert_eq!(goes("--to a:9999", &both), Ok(false));
    }

    #[test]
    fn only_what_was_given_is_sent() {
        let args = parse(&[
            "Why?",
            "--seed",
            "7",
            "--stop",
            "\n",
            "--system",
            "Be brief.",
        ]);
        assert_eq!(
            serde_json::to_value(task(&args, false, "Why?")).expect("JSON"),
            json!({
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Why?"},
                ],
                "seed": 7,
                "stop": ["\n"],
                "stream": true,
            })
        );
    }
}
