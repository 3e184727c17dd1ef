//! A stage under a scheduler: requests that are cancelled leave their slots to the next ones.

use std::sync::Arc;

use futures::StreamExt;
use futures::executor::block_on;
use futures::future::join_all;
use mesh_engine::{Engine, Event, Request, RequestStream, SchedulerConfig, Stage};

use super::{ANSWER, Known, LIMITS, PROMPT, best};
use crate::conformance::same;

impl Known<'_> {
    pub(super) fn serving(&self, stage: Box<dyn Stage>) {
        let name = &self.subject.name;
        let vocabulary = Arc::new(self.subject.model.clone());
        let engine = Engine::start("conformance", stage, vocabulary, SchedulerConfig::default());
        let engine = engine.expect("a stage of a whole model");
        let handle = engine.handle();
        let submit = |id: &str, tokens: usize| {
            let request = Request::greedy(id, self.prompt.clone(), tokens as u32);
            handle.submit(Request {
                ignore_eos: true,
                ..request
            })
        };
        // One more than there are slots.
        let all = LIMITS.context as usize - PROMPT;
        let mut long: Vec<_> = (0..=LIMITS.slots)
            .map(|_| submit("cancelled", all))
            .collect();
        let first = block_on(long[0].next());
        assert!(matches!(first, Some(Event::Tokens(_))), "{name}: {first:?}");
        drop(long);
        let answers = (0..=LIMITS.slots).map(|_| answer(submit("next", ANSWER)));
        for found in block_on(join_all(answers)) {
            self.greedy(&found);
        }
        let load = handle.load();
        let totals = load.totals;
        same(
            name,
            "requests in progress",
            (load.running, load.queued),
            (0, 0),
        );
        same(name, "KV tokens in use", load.kv_tokens_used, 0);
        same(name, "failed requests", totals.failed, 0);
        let ended = totals.finished + totals.cancelled;
        same(
            name,
            "requests that ended",
            ended,
            2 * u64::from(LIMITS.slots + 1),
        );
    }

    /// Panics unless the tokens are the greedy ones up to a near tie.
    #[track_caller]
    fn greedy(&self, found: &[u32]) {
        let differs = (0..ANSWER).find(|&i| found.get(i) != self.answer.get(i));
        let Some(at) = differs else {
            return;
        };
        let row = match at {
            0 => &self.rows[PROMPT - 1],
            at => &self.behind[at - 1],
        };
        let token = found.get(at).copied().unwrap_or_else(|| {
            let name = &self.subject.name;
            panic!("{name}: {} tokens instead of {ANSWER}", found.len())
        });
        assert_ne!(token as usize, best(row));
        self.subject.chosen("behind a scheduler", row, token);
    }
}

/// All tokens of a request.
async fn answer(stream: RequestStream) -> Vec<u32> {
    let events: Vec<Event> = stream.collect().await;
    let tokens = events.into_iter().flat_map(|event| match event {
        Event::Tokens(tokens) => tokens.tokens,
        Event::Done(_) => Vec::new(),
        Event::Failed(error) => panic!("a valid request fails: {error}"),
        Event::Scored(_) => panic!("nobody asked for scores"),
    });
    tokens.collect()
}
