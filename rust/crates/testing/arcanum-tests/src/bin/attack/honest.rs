//! Clients with a key of their own that ask one short question after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use arcanum_tests::gaps::Gaps;
use arcanum_tests::{ChatQuestion, StreamedAnswer, Undisturbed, question};
use mesh_testkit::client::http::HttpClient;
use tokio::task::JoinHandle;

/// Tokens of each answer.
const TOKENS: u32 = 16;
/// An answer that takes longer did not come.
const LIMIT: Duration = Duration::from_secs(60);

/// The questions that honest clients ask.
pub(crate) fn asks() -> Vec<ChatQuestion> {
    (0..24)
        .map(|number| ChatQuestion::greedy(question(number * 7), TOKENS))
        .collect()
}

/// Running honest clients.
#[derive(Debug)]
pub(crate) struct Honest {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<RequestOutcome>>>,
}

/// Outcome of one request.
#[derive(Debug)]
struct RequestOutcome {
    ask: ChatQuestion,
    asked: Instant,
    ended: Instant,
    answer: Result<StreamedAnswer>,
}

/// Results of all requests of a phase.
#[derive(Debug, Default)]
pub(crate) struct HonestResults {
    /// Number of right answers.
    pub(crate) right: usize,
    /// Errors of the others, with the second of the phase in which each ended.
    pub(crate) wrong: Vec<(f64, String)>,
    /// Times to the first token, of right answers.
    pub(crate) first_token: Gaps,
    /// Number of reruns over all requests.
    pub(crate) reruns: u64,
}

impl Honest {
    /// So many clients, each with connections of its own, that pause for `think` between two requests.
    pub(crate) fn start(
        clients: usize,
        address: &str,
        key: &str,
        model: &str,
        think: Duration,
    ) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let asks: Vec<ChatQuestion> = asks().into_iter().map(|ask| ask.of(model)).collect();
        let clients = (0..clients)
            .map(|number| {
                let http = HttpClient::new(address, Some(key.to_owned()))?;
                let (asks, over) = (asks.clone(), Arc::clone(&over));
                Ok(tokio::spawn(one(http, asks, number * 3, think, over)))
            })
            .collect::<Result<_>>()?;
        Ok(Self { over, clients })
    }

    /// Ends them, and compares every answer with the undisturbed one.
    pub(crate) async fn end(
        self,
        begun: Instant,
        undisturbed: &Undisturbed,
    ) -> Result<HonestResults> {
        self.over.store(true, Ordering::Relaxed);
        let mut served = HonestResults::default();
        for client in self.clients {
            for outcome in client.await? {
                let checked = outcome.answer.and_then(|answer| {
                    undisturbed.check(&outcome.ask, &answer)?;
                    let first = answer.arrivals.first();
                    let first = first.ok_or_else(|| anyhow!("no token"))?;
                    Ok((*first - outcome.asked, answer.transcript.reruns))
                });
                match checked {
                    Ok((first, reruns)) => {
                        served.right += 1;
                        served.first_token.add(first);
                        served.reruns += reruns;
                    }
                    Err(error) => {
                        let at = (outcome.ended - begun).as_secs_f64();
                        served.wrong.push((at, format!("{error:#}")));
                    }
                }
            }
        }
        served.wrong.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(served)
    }
}

impl HonestResults {
    pub(crate) fn all(&self) -> usize {
        self.right + self.wrong.len()
    }

    /// Failures grouped by kind: the count, the first second, and the words.
    pub(crate) fn wrong_by_kind(&self) -> Vec<(usize, f64, String)> {
        let mut kinds: Vec<(usize, f64, String)> = Vec::new();
        for (at, words) in &self.wrong {
            // Numbers and the right answer differ from case to case.
            let (words, _) = words.split_once(", undisturbed").unwrap_or((words, ""));
            let kind: String = words
                .chars()
                .map(|c| if c.is_ascii_digit() { '#' } else { c })
                .take(160)
                .collect();
            match kinds.iter_mut().find(|(_, _, known)| *known == kind) {
                Some(found) => found.0 += 1,
                None => kinds.push((1, *at, kind)),
            }
        }
        kinds
    }
}

async fn one(
    http: HttpClient,
    asks: Vec<ChatQuestion>,
    first: usize,
    think: Duration,
    over: Arc<AtomicBool>,
) -> Vec<RequestOutcome> {
    let mut outcomes = Vec::new();
    for ask in asks.iter().cycle().skip(first) {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        let answer = tokio::time::timeout(LIMIT, ask.ask(&http)).await;
        let answer = answer.unwrap_or_else(|_| Err(anyhow!("no end within {LIMIT:?}")));
        let failed = answer.is_err();
        outcomes.push(RequestOutcome {
            ask: ask.clone(),
            asked,
            ended: Instant::now(),
            answer,
        });
        // A failure at once is not to become a flood of our own.
        tokio::time::sleep(if failed {
            think.max(FAILED_PAUSE)
        } else {
            think
        })
        .await;
    }
    outcomes
}

const FAILED_PAUSE: Duration = Duration::from_millis(500);
