//! The grammars of one model.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher, ParserFactory};
use lru::LruCache;
use mesh_engine::{Constraint, Grammar, SharedGrammar, Vocabulary};
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use crate::ahead::Ahead;
use crate::answer::Answer;
use crate::error::GrammarError;
use crate::source::Source;

/// Compiles grammars for the vocabulary of one model.
pub struct Grammars {
    factory: ParserFactory,
    ahead: Arc<Ahead>,
    /// Compiled ones, because clients repeat theirs.
    recent: Mutex<LruCache<Source, SharedGrammar>>,
}

struct Compiled {
    /// At the start of an answer.
    matcher: Mutex<Matcher>,
    ahead: Arc<Ahead>,
}

impl Grammars {
    /// Makes the trie of a vocabulary, which takes some tens of milliseconds.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`] if no token ends an answer, or there are too many tokens.
    pub fn new(vocabulary: &dyn Vocabulary) -> Result<Self, GrammarError> {
        let refused = |reason: String| GrammarError::Vocabulary { reason };
        let size = u32::try_from(vocabulary.size()).unwrap_or(u32::MAX);
        if size > MOST_TOKENS {
            let reason = format!("it has {size} tokens, and {MOST_TOKENS} are supported");
            return Err(refused(reason));
        }
        let ends: Vec<u32> = (0..size).filter(|&id| vocabulary.is_end(id)).collect();
        let Some(&end) = ends.first() else {
            return Err(refused("no token of it ends an answer".to_owned()));
        };
        let words: Vec<Vec<u8>> = (0..size).map(|id| word(vocabulary.text(id))).collect();
        let trie = TokTrie::from(&TokRxInfo::new(size, end), &words).with_eos_tokens(&ends);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new(
            &tokens,
            InferenceCapabilities::default(),
            &SlicedBiasComputer::general_slices(),
        );
        let mut factory = factory.map_err(|error| refused(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Grammars {
            factory,
            ahead: Arc::default(),
            recent: Mutex::new(LruCache::new(RECENT)),
        })
    }

    /// Compiles a grammar, or finds it among the recent ones. Blocks for up to some tens of milliseconds.
    ///
    /// # Errors
    /// [`GrammarError`] names the mistake, or the feature that is not supported.
    pub fn compile(&self, source: &Source) -> Result<SharedGrammar, GrammarError> {
        let recent = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grammar) = recent().get(source) {
            return Ok(grammar.clone());
        }
        let grammar = SharedGrammar(Arc::new(Compiled {
            matcher: Mutex::new(self.matcher(source)?),
            ahead: self.ahead.clone(),
        }));
        recent().put(source.clone(), grammar.clone());
        Ok(grammar)
    }

    fn matcher(&self, source: &Source) -> Result<Matcher, GrammarError> {
        let refused = |reason: String| GrammarError::Refused {
            kind: source.kind(),
            reason,
        };
        let parse = || {
            let parser = self.factory.create_parser(source.grammar()?);
            let parser = parser.map_err(|error| refused(text(&error)))?;
            let mut matcher = Matcher::new(Ok(parser));
            if let Some(error) = matcher.get_error() {
                return Err(refused(error));
            }
            if let Some(warning) = matcher.grammar_warnings().into_iter().next() {
                return Err(refused(warning));
            }
            // Some is too complex, or contradicts itself, only when it is used.
            let mut first = matcher.deep_clone();
            match first.compute_mask() {
                Ok(_) => Ok(matcher),
                Err(error) => Err(refused(match text(&error) {
                    // llguidance's word for it.
                    reason if reason.starts_with("NoExtension") => {
                        "no text satisfies it".to_owned()
                    }
                    reason => reason,
                })),
            }
        };
        std::thread::scope(|scope| {
            // The parsers of grammars call themselves for what is nested or refers to each other.
            let thread = std::thread::Builder::new().stack_size(PARSER_STACK);
            let thread = thread.spawn_scoped(scope, parse);
            let thread = thread.map_err(|error| refused(format!("no thread for it: {error}")))?;
            let panicked = |_| Err(refused("its parser panicked".to_owned()));
            thread.join().unwrap_or_else(panicked)
        })
    }
}

impl Grammar for Compiled {
    fn begin(&self) -> Box<dyn Constraint> {
        let matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(Answer::new(matcher.deep_clone(), self.ahead.clone()))
    }
}

/// The bytes of a token as the trie takes them: none if it is never chosen.
fn word(bytes: &[u8]) -> Vec<u8> {
    // A first byte of 255 marks control tokens there, and is no UTF-8.
    if bytes.len() > MOST_TOKEN_BYTES || bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
        return Vec::new();
    }
    bytes.to_vec()
}

/// An error with its causes, in one line.
pub(crate) fn text(error: &dyn std::fmt::Display) -> String {
    let text = format!("{error:#}").replace("<non-verbose/>", "");
    // A panic of the library has one.
    let text = text.split("<backtrace>").next().unwrap_or_default();
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.len() > MOST_REASON_BYTES {
        line.truncate(line.floor_char_boundary(MOST_REASON_BYTES));
        line.push('…');
    }
    line
}

/// Bounds of time and memory for one grammar: some tens of milliseconds to compile, 20 ms for a mask, 50 MiB.
fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: 25_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Enough for the deepest that [`Source::MOST_DEPTH`] and [`Source::MOST_BYTES`] let through. Pages are taken
/// when used.
const PARSER_STACK: usize = 256 << 20;

/// Number of compiled grammars that are kept.
const RECENT: NonZeroUsize = NonZeroUsize::new(16).expect("more than none");

/// Nodes of the trie have 24 bits for a token.
const MOST_TOKENS: u32 = 1 << 23;

/// Longer ones would not fit the trie; no answer needs them.
const MOST_TOKEN_BYTES: usize = 512;

const MOST_REASON_BYTES: usize = 400;
