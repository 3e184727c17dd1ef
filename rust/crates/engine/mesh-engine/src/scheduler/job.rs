//! One request on its way through the scheduler.

use std::time::Instant;

use super::slots::Salt;
use super::step::Owner;
use crate::request::{Done, Event, Finish, Request, RequestError, TokenScore, Tokens};
use crate::sampler::{self, Sampler, Scratch};
use crate::text::TextPipeline;
use crate::workload::RequestKey;
use crate::{Allowed, Constraint, ConstraintError, LogitRows, Vocabulary};

#[derive(Debug)]
pub(super) struct Job {
    pub(super) key: RequestKey,
    pub(super) id: String,
    /// Prompt and answer so far: the tokens that the KV cache must hold to continue.
    pub(super) tokens: Vec<u32>,
    /// Cached rows that it may use.
    pub(super) salt: Salt,
    /// KV rows that it may need at most.
    limit: u64,
    pub(super) deadline: Option<Instant>,
    /// Tokens found in the KV cache.
    pub(super) reused: u32,
    /// It waits because it gave its KV memory to older requests.
    pub(super) preempted: bool,
    /// Number of times that it was given a slot.
    pub(super) run: u32,
    submitted: Instant,
    output: Output,
}

#[derive(Debug)]
enum Output {
    Text(Box<Completion>),
    Scores(Vec<TokenScore>),
}

#[derive(Debug)]
struct Completion {
    sampler: Sampler,
    text: TextPipeline,
    prompt_tokens: u32,
    /// Tokens of the answer so far, those generated elsewhere included.
    generated: u32,
    max_tokens: u32,
    ignore_eos: bool,
    stop_token_ids: Vec<u32>,
    min_tokens: u32,
    constraint: Option<Box<dyn Constraint>>,
    finish: Option<Finish>,
    first_token: Option<Instant>,
}

impl Job {
    /// Checks a request for text against the context.
    pub(super) fn generate(
        key: RequestKey,
        request: Request,
        context: u32,
        vocabulary: &dyn Vocabulary,
        now: Instant,
    ) -> Result<Self, RequestError> {
        check_tokens(&request.prompt_tokens, vocabulary)?;
        check_tokens(&request.generated, vocabulary)?;
        sampler::validate(&request.params, vocabulary.size())?;
        crate::text::validate_stops(&request.stop)?;
        if request.prompt_tokens.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        let prompt_tokens = request.prompt_tokens.len() as u64;
        let generated = request.generated.len() as u64;
        let room = u64::from(context).saturating_sub(prompt_tokens);
        if room == 0 || generated > room {
            return Err(RequestError::ContextTooLong {
                tokens: prompt_tokens + generated,
                context,
            });
        }
        let max_tokens = request.max_tokens.map_or(room, |n| room.min(u64::from(n)));

        let mut text = TextPipeline::new(request.stop, &request.echo, request.text_sent);
        let mut stopped = false;
        let min_tokens = request.params.min_tokens;
        for (index, &token) in (0u32..).zip(&request.generated) {
            if index < min_tokens {
                text.push_unfiltered(vocabulary.text(token));
            } else {
                stopped = stopped || text.push(vocabulary.text(token));
            }
        }
        let mut constraint = request.grammar.map(|grammar| grammar.0.begin());
        if let Some(constraint) = &mut constraint {
            for (index, &token) in (0u32..).zip(&request.generated) {
                constraint.accept(token).map_err(under_grammar(index))?;
            }
            // While the prompt is computed.
            constraint.prepare();
        }
        let finish = if stopped {
            Some(Finish::Stop)
        } else {
            (generated >= max_tokens).then_some(Finish::Length)
        };
        let stop_token_ids = request.params.stop_token_ids.clone();
        let ends = match min_tokens {
            0 => Vec::new(),
            _ => ends(
                vocabulary,
                request.ignore_eos && constraint.is_none(),
                &stop_token_ids,
            ),
        };
        let sampler = Sampler::new(request.params, &request.prompt_tokens, &request.generated)
            .not_ending_with(ends);
        let mut tokens = request.prompt_tokens;
        tokens.extend_from_slice(&request.generated);
        Ok(Job {
            key,
            id: request.id,
            tokens,
            salt: Salt {
                value: request.cache_salt,
                goes_on: generated > 0,
            },
            limit: prompt_tokens + max_tokens,
            deadline: request.deadline,
            reused: 0,
            preempted: false,
            run: 0,
            submitted: now,
            output: Output::Text(Box::new(Completion {
                sampler,
                text,
                prompt_tokens: prompt_tokens as u32,
                generated: generated as u32,
                max_tokens: max_tokens as u32,
                ignore_eos: request.ignore_eos,
                stop_token_ids,
                min_tokens,
                constraint,
                finish,
                first_token: None,
            })),
        })
    }

    /// Checks a request for scores.
    pub(super) fn score(
        key: RequestKey,
        id: String,
        tokens: Vec<u32>,
        context: u32,
        vocabulary: &dyn Vocabulary,
        now: Instant,
    ) -> Result<Self, RequestError> {
        check_tokens(&tokens, vocabulary)?;
        if tokens.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        if tokens.len() as u64 > u64::from(context) {
            return Err(RequestError::ContextTooLong {
                tokens: tokens.len() as u64,
                context,
            });
        }
        Ok(Job {
            key,
            id,
            limit: tokens.len() as u64,
            deadline: None,
            reused: 0,
            preempted: false,
            run: 0,
            submitted: now,
            // It reuses no rows.
            salt: Salt {
                value: 0,
                goes_on: false,
            },
            output: Output::Scores(Vec::with_capacity(tokens.len() - 1)),
            tokens,
        })
    }

    /// KV rows that it is expected to need, where an answer takes `expected` tokens. Always some more than it has, as long as
    /// it may grow.
    pub(super) fn expects(&self, expected: u64) -> u64 {
        match &self.output {
            Output::Text(answer) => {
                let answered = u64::from(answer.generated) + GROWTH;
                (u64::from(answer.prompt_tokens) + expected.max(answered)).min(self.limit)
            }
            Output::Scores(_) => self.limit,
        }
    }

    pub(super) fn owner(&self) -> Owner {
        Owner {
            key: self.key,
            run: self.run,
        }
    }

    /// The tokens whose KV rows are needed next, behind the `cached` ones.
    pub(super) fn pending(&self, cached: u32) -> &[u32] {
        &self.tokens[cached as usize..]
    }

    /// Rows whose logits were taken in, or are not wanted.
    pub(super) fn settled(&self) -> u32 {
        match &self.output {
            // The token after the last one is not known yet.
            Output::Text(_) => self.tokens.len() as u32 - 1,
            Output::Scores(scores) => scores.len() as u32,
        }
    }

    /// True for a scoring job: it needs the logits of every row, so no KV row may be reused.
    pub(super) fn is_score(&self) -> bool {
        matches!(self.output, Output::Scores(_))
    }

    pub(super) fn answered(&self) -> u32 {
        match &self.output {
            Output::Text(answer) => answer.generated,
            Output::Scores(_) => 0,
        }
    }

    /// The rows that become logits when the rows `cached..cached + rows` are computed.
    pub(super) fn logit_rows(&self, cached: u32, rows: u32) -> LogitRows {
        if self.is_score() {
            LogitRows::All
        } else if (cached + rows) as usize == self.tokens.len() {
            LogitRows::Last
        } else {
            LogitRows::None
        }
    }

    /// The last event of a request that needs no (more) steps.
    pub(super) fn finished(&mut self, now: Instant) -> Option<Event> {
        match &mut self.output {
            Output::Scores(scores) => (scores.len() + 1 == self.tokens.len())
                .then(|| Event::Scored(std::mem::take(scores))),
            Output::Text(answer) => {
                let finish = answer.finish?;
                answer.text.finish();
                Some(Event::Done(Done {
                    finish,
                    prompt_tokens: answer.prompt_tokens,
                    completion_tokens: answer.generated,
                    cached_tokens: self.reused.min(answer.prompt_tokens),
                    first_token: answer.first_token.map(|at| at - self.submitted),
                    total: now - self.submitted,
                    text: answer.text.take(),
                }))
            }
        }
    }

    /// Takes in the logits of row `position` of this job: a score, or the answer's next token.
    pub(super) fn take_logits(
        &mut self,
        position: u32,
        logits: &[f32],
        vocabulary: &dyn Vocabulary,
        scratch: &mut Scratch,
        now: Instant,
    ) -> Result<Option<Tokens>, RequestError> {
        match &mut self.output {
            Output::Scores(scores) => {
                // Rows computed again after a loss have been scored. Nothing follows the last token.
                let next = self.tokens.get(position as usize + 1);
                if let Some(&next) = next.filter(|_| position as usize == scores.len()) {
                    let bad = RequestError::BadLogits {
                        index: position + 1,
                    };
                    scores.push(sampler::score(logits, next).ok_or(bad)?);
                }
                Ok(None)
            }
            // A row that was computed twice, before a preemption and after it, has had its say.
            Output::Text(_) if position as usize + 1 != self.tokens.len() => Ok(None),
            Output::Text(answer) => {
                let tokens = answer.next_token(logits, vocabulary, scratch, now)?;
                self.tokens.extend(tokens.iter().flat_map(|t| &t.tokens));
                Ok(tokens)
            }
        }
    }
}

impl Completion {
    fn next_token(
        &mut self,
        logits: &[f32],
        vocabulary: &dyn Vocabulary,
        scratch: &mut Scratch,
        now: Instant,
    ) -> Result<Option<Tokens>, RequestError> {
        let index = self.generated;
        let allowed = match &mut self.constraint {
            None => None,
            Some(constraint) => match constraint.allowed().map_err(under_grammar(index))? {
                Allowed::Tokens(set) => Some(set),
                Allowed::End => {
                    self.finish = Some(Finish::Stop);
                    return Ok(None);
                }
            },
        };
        let choice = self.sampler.choose_among(logits, index, allowed, scratch);
        if choice.is_none() && allowed.is_some() && index < self.min_tokens {
            // The least length keeps tokens from ending the answer, and the grammar all others.
            self.finish = Some(Finish::Stop);
            return Ok(None);
        }
        let choice = choice.ok_or(RequestError::BadLogits { index })?;
        self.first_token.get_or_insert(now);
        // A grammar has such a token only where the answer may end.
        let ends = !self.ignore_eos || self.constraint.is_some();
        let is_end = ends && vocabulary.is_end(choice.token);
        if is_end || self.stop_token_ids.contains(&choice.token) {
            self.finish = Some(Finish::Stop);
            return Ok(None);
        }
        self.generated += 1;
        self.sampler.accept(choice.token);
        if let Some(constraint) = &mut self.constraint {
            constraint
                .accept(choice.token)
                .map_err(under_grammar(index))?;
            // While the next step is computed.
            constraint.prepare();
        }
        let text = vocabulary.text(choice.token);
        if index < self.min_tokens {
            self.text.push_unfiltered(text);
        } else if self.text.push(text) {
            self.finish = Some(Finish::Stop);
        }
        if self.finish.is_none() && self.generated >= self.max_tokens {
            self.finish = Some(Finish::Length);
        }
        Ok(Some(Tokens {
            index,
            tokens: vec![choice.token],
            text: self.text.take(),
            logprobs: choice.logprobs.into_iter().collect(),
        }))
    }
}

fn under_grammar(index: u32) -> impl Fn(ConstraintError) -> RequestError {
    move |error| RequestError::Grammar {
        index,
        reason: error.0,
    }
}

/// Tokens that an answer longer than expected is expected to grow by. A preempted request goes on when all in progress have
/// room for as many.
const GROWTH: u64 = 64;

fn ends(vocabulary: &dyn Vocabulary, ignore_eos: bool, stop_token_ids: &[u32]) -> Vec<u32> {
    let mut ends = stop_token_ids.to_vec();
    if !ignore_eos {
        ends.extend((0..vocabulary.size() as u32).filter(|&token| vocabulary.is_end(token)));
    }
    ends
}

fn check_tokens(tokens: &[u32], vocabulary: &dyn Vocabulary) -> Result<(), RequestError> {
    let vocab = vocabulary.size();
    match tokens.iter().find(|&&token| token as usize >= vocab) {
        Some(&token) => Err(RequestError::NoSuchToken { token, vocab }),
        None => Ok(()),
    }
}
