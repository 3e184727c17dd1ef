//! `hydramesh models pull`: a model from the Hugging Face hub into the store.

use std::io::IsTerminal;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mesh_hub::{Hub, HubError, HubName, PullOptions, Pulled, Watch, pull};
use mesh_store::{Places, Store, Target};
use serde_json::json;

use super::store_dir;
use crate::args::PullArgs;
use crate::failure::{Exit, Failure};
use crate::output::{bytes, duration};

pub(super) async fn run(args: PullArgs) -> Result<(), Failure> {
    let mut name = hub_name(&args.name)?;
    if let Some(revision) = &args.revision {
        let named = name.revision.replace(revision.clone());
        if named.is_some_and(|named| named != *revision) {
            return Err(Failure::usage(format!(
                "{} names a revision, and --revision another one; give one of them",
                args.name
            )));
        }
    }
    let hub = Hub::from_env()?;
    let store = Store::open(store_dir(args.store.clone())).map_err(HubError::from)?;
    let options = PullOptions {
        layers: args.layers.clone(),
    };
    let progress = Arc::new(Progress::new(&name.to_string()));
    let started = Instant::now();
    let pulled = tokio::select! {
        pulled = pull(&hub, &store, &name, &options, progress.clone()) => pulled,
        _ = tokio::signal::ctrl_c() => {
            progress.end();
            return Err(Failure::interrupted()
                .hint("What has arrived is kept; the same command goes on from there."));
        }
    };
    progress.end();
    report(&pulled?, started.elapsed(), args.json, args.layers.as_ref());
    Ok(())
}

/// A name on the hub, or a short one that means one there.
fn hub_name(text: &str) -> Result<HubName, HubError> {
    let on_the_hub = Places {
        folders: &[],
        store: None,
    };
    let short = || on_the_hub.resolve(text).map(|resolved| resolved.target);
    text.parse().or_else(|error| match short() {
        Ok(Target::Hub { id }) => id.parse(),
        _ => Err(error),
    })
}

fn report(pulled: &Pulled, took: Duration, as_json: bool, layers: Option<&Range<u32>>) {
    if as_json {
        let object = json!({
            "name": pulled.name,
            "repository": pulled.repo,
            "commit": pulled.commit,
            "fingerprint": pulled.fingerprint,
            "path": pulled.path.as_ref().map(|path| path.display().to_string()),
            "bytes": pulled.bytes,
            "present_bytes": pulled.present,
            "fetched_bytes": pulled.fetched,
            "layers": pulled.layers,
            "seconds": took.as_secs_f64(),
        });
        println!("{object}");
        return;
    }
    let fetched = match pulled.fetched {
        0 => "it was here already".to_owned(),
        fetched => format!("{} fetched in {}", bytes(fetched), duration(took)),
    };
    let (name, all) = (&pulled.name, bytes(pulled.bytes));
    if let Some(path) = &pulled.path {
        println!("{}", path.display());
        eprintln!("{name} is here, {all}; {fetched}");
    } else {
        let (layers, present) = (layers.cloned().unwrap_or_default(), bytes(pulled.present));
        let of = pulled.layers;
        eprintln!("layers {layers:?} of {of} of {name} are here, {present} of {all}; {fetched}");
    }
}

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    name: String,
    bar: Option<ProgressBar>,
    state: Mutex<State>,
}

struct State {
    phase: &'static str,
    total: u64,
    /// Bytes that were there when this began: they say nothing about the rate.
    present: u64,
    done: u64,
    started: Instant,
    line_due: Instant,
    last_note: String,
}

const LINE_EVERY: Duration = Duration::from_secs(10);
const BAR: &str = "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";

impl Progress {
    fn new(name: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(5));
            bar.set_style(
                ProgressStyle::with_template("{msg} {spinner}").expect("a fixed template"),
            );
            bar.set_message(format!("asking the hub for {name}"));
            bar
        });
        let now = Instant::now();
        Self {
            name: name.to_owned(),
            bar,
            state: Mutex::new(State {
                phase: "fetching",
                total: 0,
                present: 0,
                done: 0,
                started: now,
                line_due: now + LINE_EVERY,
                last_note: String::new(),
            }),
        }
    }

    fn begin(&self, phase: &'static str, present: u64, total: u64) {
        let now = Instant::now();
        let mut state = self.state.lock().expect("nobody panics with it");
        state.phase = phase;
        (state.total, state.present, state.done) = (total, present, present);
        (state.started, state.line_due) = (now, now + LINE_EVERY);
        drop(state);
        let here = match present {
            0 => String::new(),
            present => format!(", of which {} are here", bytes(present)),
        };
        match &self.bar {
            None if total > present => eprintln!("{phase} {}: {}{here}", self.name, bytes(total)),
            None => {}
            Some(bar) => {
                bar.set_style(ProgressStyle::with_template(BAR).expect("a fixed template"));
                bar.set_message(format!("{phase} {}", self.name));
                bar.set_length(total);
                bar.reset();
                bar.set_position(present);
                bar.reset_eta();
            }
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
            return;
        }
        let mut state = self.state.lock().expect("nobody panics with it");
        state.done += bytes;
        let now = Instant::now();
        if now >= state.line_due {
            state.line_due = now + LINE_EVERY;
            eprintln!("{}", state.line(now));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl State {
    /// `fetching: 12.0 MB of 98.4 MB, 1.2 MB/s, 72 s left`.
    fn line(&self, now: Instant) -> String {
        let took = (now - self.started).as_secs_f64().max(1e-3);
        let rate = (self.done - self.present) as f64 / took;
        let left = self.total.saturating_sub(self.done) as f64 / rate.max(1.0);
        format!(
            "{}: {} of {}, {}/s, {left:.0} s left",
            self.phase,
            bytes(self.done),
            bytes(self.total),
            bytes(rate as u64)
        )
    }
}

impl Watch for Progress {
    fn planned(&self, missing: u64, present: u64) {
        self.begin("fetching", present, missing + present);
    }

    fn arrived(&self, bytes: u64) {
        self.advance(bytes);
    }

    fn waiting(&self, reason: &str, pause: Duration) {
        let mut state = self.state.lock().expect("nobody panics with it");
        // Several connections hit the same error at once, and a wait for another process repeats its reason
        // often.
        if state.last_note == reason {
            return;
        }
        reason.clone_into(&mut state.last_note);
        drop(state);
        let line = format!("{reason}; again in {}", duration(pause));
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    fn checking(&self, bytes: u64) {
        self.begin("checking", 0, bytes);
    }

    fn checked(&self, bytes: u64) {
        self.advance(bytes);
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        let message = error.to_string();
        match error {
            HubError::Name { .. }
            | HubError::Setting { .. }
            | HubError::Choice { .. }
            | HubError::NoRevision { .. }
            | HubError::NoFile { .. } => Failure::usage(message),
            HubError::Unreachable { .. } | HubError::Offline { .. } | HubError::Tls { .. } => {
                Failure::new(Exit::Unreachable, message)
            }
            HubError::NotFound { .. } => Failure::new(Exit::NoWorker, message),
            HubError::RateLimited { .. } => Failure::new(Exit::Timeout, message),
            refused if refused.is_refusal() => Failure::new(Exit::Refused, message),
            _ => Failure::failed(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_bytes_rate_and_the_time_that_is_left() {
        let started = Instant::now();
        let state = State {
            phase: "fetching",
            total: 100_000_000,
            present: 20_000_000,
            done: 40_000_000,
            started,
            line_due: started,
            last_note: String::new(),
        };
        assert_eq!(
            state.line(started + Duration::from_secs(10)),
            "fetching: 40.0 MB of 100.0 MB, 2.0 MB/s, 30 s left"
        );
    }
}
