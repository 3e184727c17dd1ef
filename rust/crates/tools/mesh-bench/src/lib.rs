//! Committed benchmarks; each prints a ratio against its anchor.
//!
//! Shared here: [`Ours`], our engine under the same exercises as [`Anchor`], llama.cpp kept loaded by a small
//! program of ours, so that both can take turns within seconds; [`round_trips`] loads relays of datagrams.

pub mod round_trips;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_api::GenerationOptions;
use mesh_engine::{LogitRows, Segment, Stage, StageInput, StageOutput};
use mesh_engine_ort::{OrtOptions, OrtStage};
use mesh_launcher::paths;
use mesh_model::Model;

/// The middle value, or the mean of the two in the middle.
///
/// # Panics
/// If `values` is empty.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

/// Ratios of a benchmark's rounds; at least one.
#[derive(Debug, Clone, Default)]
pub struct Ratios(pub Vec<f64>);

impl Ratios {
    /// The middle one.
    pub fn median(&self) -> f64 {
        median(&self.0)
    }

    /// The smallest one.
    pub fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::MAX, f64::min)
    }

    /// The largest one.
    pub fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::MIN, f64::max)
    }
}

/// Options for `tokens` tokens of an answer, always the likeliest.
pub fn greedy(tokens: u32) -> GenerationOptions {
    GenerationOptions {
        max_tokens: Some(tokens.into()),
        temperature: Some(0.0),
        ignore_eos: Some(true),
        ..GenerationOptions::default()
    }
}

/// A workload on which both engines are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exercise {
    /// So many tokens one by one, from an empty context.
    Decode(u32),
    /// A prompt of so many tokens.
    Prefill(u32),
    /// So many sequences, so many tokens each, one token of each per step.
    Parallel(u32, u32),
}

impl Exercise {
    /// Number of tokens that the exercise computes.
    pub fn tokens(self) -> u32 {
        match self {
            Exercise::Decode(tokens) | Exercise::Prefill(tokens) => tokens,
            Exercise::Parallel(sequences, tokens) => sequences * tokens,
        }
    }
}

impl std::fmt::Display for Exercise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exercise::Decode(tokens) => write!(f, "decode {tokens}"),
            Exercise::Prefill(tokens) => write!(f, "prefill {tokens}"),
            Exercise::Parallel(sequences, tokens) => {
                write!(f, "{sequences} streams, {tokens} each")
            }
        }
    }
}

/// Our engine's stage of a whole model.
pub struct Ours {
    /// The loaded stage with the whole model.
    pub stage: OrtStage,
    /// Counts tokens, so that each is another one.
    turn: u32,
}

impl Ours {
    /// Loads a whole model.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn load(model: &Model, options: OrtOptions) -> Result<Ours> {
        let library = Some(paths::ort_library()?);
        let options = OrtOptions { library, ..options };
        let stage = OrtStage::load(model, 0..model.config().layers, options)?;
        Ok(Ours { stage, turn: 0 })
    }

    /// Time that an exercise takes.
    ///
    /// # Errors
    /// If the stage fails.
    pub fn time(&mut self, exercise: Exercise) -> Result<Duration> {
        for slot in 0..self.stage.info().slots {
            self.stage.truncate(slot, 0);
        }
        match exercise {
            Exercise::Decode(tokens) => self.decode(1, tokens),
            Exercise::Parallel(sequences, tokens) => self.decode(sequences, tokens),
            Exercise::Prefill(rows) => {
                let tokens: Vec<u32> = (0..rows).map(|_| self.token()).collect();
                let start = Instant::now();
                let mut position = 0;
                for chunk in tokens.chunks(self.stage.info().max_rows as usize) {
                    self.step(&[(0, position)], chunk)?;
                    position += chunk.len() as u32;
                }
                Ok(start.elapsed())
            }
        }
    }

    fn decode(&mut self, sequences: u32, tokens: u32) -> Result<Duration> {
        let start = Instant::now();
        for position in 0..tokens {
            let at: Vec<(u32, u32)> = (0..sequences).map(|slot| (slot, position)).collect();
            let tokens: Vec<u32> = at.iter().map(|_| self.token()).collect();
            self.step(&at, &tokens)?;
        }
        Ok(start.elapsed())
    }

    /// One step of equally long segments.
    fn step(&mut self, at: &[(u32, u32)], tokens: &[u32]) -> Result<()> {
        let rows = (tokens.len() / at.len()) as u32;
        let segments: Vec<Segment> = at
            .iter()
            .map(|&(slot, position)| Segment {
                slot,
                position,
                rows,
                logits: LogitRows::Last,
            })
            .collect();
        self.stage.forward(&segments, StageInput::Tokens(tokens))?;
        Ok(())
    }

    /// Sum of -ln p over the second half of a window, and how many tokens that are: llama-perplexity's measure.
    ///
    /// # Errors
    /// If the stage fails.
    pub fn perplexity(&mut self, window: &[u32]) -> Result<(f64, usize)> {
        self.stage.truncate(0, 0);
        let first = window.len() / 2;
        let rows = |rows: usize, position: usize, logits| Segment {
            slot: 0,
            position: position as u32,
            rows: rows as u32,
            logits,
        };
        let head = rows(first, 0, LogitRows::None);
        self.stage
            .forward(&[head], StageInput::Tokens(&window[..first]))?;
        let tail = &window[first..window.len() - 1];
        let vocab = self.stage.info().shape.vocab;
        let all = rows(tail.len(), first, LogitRows::All);
        let StageOutput::Logits(logits) = self.stage.forward(&[all], StageInput::Tokens(tail))?
        else {
            bail!("a whole model gives logits");
        };
        let mut sum = 0.0;
        for (row, &next) in logits.chunks_exact(vocab).zip(&window[first + 1..]) {
            let logits = row.iter().map(|&logit| f64::from(logit));
            let peak = logits.clone().fold(f64::MIN, f64::max);
            let total: f64 = logits.map(|logit| (logit - peak).exp()).sum();
            sum -= f64::from(row[next as usize]) - peak - total.ln();
        }
        Ok((sum, tail.len()))
    }

    fn token(&mut self) -> u32 {
        let turn = self.turn.wrapping_mul(1_664_525);
        self.turn = turn.wrapping_add(1_013_904_223);
        (self.turn >> 8) % self.stage.info().shape.vocab as u32
    }
}

/// llama.cpp with a model loaded (anchor/llama_anchor.c documents its commands).
pub struct Anchor(Talker);

impl Anchor {
    /// Starts llama.cpp on a model file, with the CPU build `cpu` or else the one that it chooses.
    ///
    /// # Errors
    /// If it is not in the cache or does not take the model.
    pub fn start(
        model: &Path,
        threads: usize,
        context: u32,
        sequences: u32,
        flash_attention: bool,
        cpu: Option<&str>,
    ) -> Result<Anchor> {
        let mut command = Command::new(program("llama_anchor")?);
        command
            .envs(cpu.map(|cpu| ("LLAMA_ANCHOR_CPU", cpu)))
            .arg(std::path::absolute(model)?)
            .args([
                threads.to_string(),
                context.to_string(),
                sequences.to_string(),
            ])
            .arg(u8::from(flash_attention).to_string());
        Talker::start(command, "llama.cpp").map(Anchor)
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// If llama.cpp is gone.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.0.ask(command)
    }

    /// Time that an exercise takes.
    ///
    /// # Errors
    /// If llama.cpp is gone.
    pub fn time(&mut self, exercise: Exercise) -> Result<Duration> {
        let answer = self.ask(&match exercise {
            Exercise::Decode(tokens) => format!("tg {tokens}"),
            Exercise::Prefill(tokens) => format!("pp {tokens}"),
            Exercise::Parallel(sequences, tokens) => format!("par {sequences} {tokens}"),
        })?;
        let microseconds: f64 = answer
            .parse()
            .with_context(|| format!("llama.cpp said {answer:?}"))?;
        Ok(Duration::from_secs_f64(microseconds / 1e6))
    }
}

/// A program that answers each line of its input with a line, after the line `ready`. Killed when dropped.
pub struct Talker {
    name: &'static str,
    child: Child,
    input: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Talker {
    /// Starts the program, `name` in messages, and waits until it is ready.
    ///
    /// # Errors
    /// If it does not start or says something else.
    pub fn start(mut command: Command, name: &'static str) -> Result<Talker> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let input = child.stdin.take().context("a pipe to it")?;
        let answers = BufReader::new(child.stdout.take().context("a pipe from it")?);
        let mut talker = Talker {
            name,
            child,
            input,
            answers,
        };
        let first = talker.answer()?;
        ensure!(first == "ready", "{name} said {first:?} instead of ready");
        Ok(talker)
    }

    /// Gives it a line and waits for its answer.
    ///
    /// # Errors
    /// If it has ended.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        writeln!(self.input, "{line}").with_context(|| format!("telling {}", self.name))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("{} ended: {}", self.name, self.child.wait()?);
        }
        Ok(line.trim().to_owned())
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program of llama.cpp in the cache.
///
/// # Errors
/// If it is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = paths::cache_dir().join("llama.cpp/bin").join(name);
    let name = path.display();
    ensure!(
        path.is_file(),
        "{name} is missing: run scripts/fetch_llama_cpp.sh"
    );
    Ok(path)
}
