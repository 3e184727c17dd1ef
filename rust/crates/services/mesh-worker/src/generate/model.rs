//! A model that generates text, and the grammars that its answers follow.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use mesh_engine::SharedGrammar;
use mesh_grammar::{GrammarError, Grammars, Source};
use mesh_model::Model;
use mesh_proto::{Grammar, GrammarKind};

use crate::codec::PrepareError;

#[derive(Clone)]
pub(crate) struct LanguageModel {
    model: Model,
    /// Made for the first answer that follows one.
    grammars: Arc<OnceLock<Result<Grammars, GrammarError>>>,
}

impl LanguageModel {
    /// Compiles a grammar. Blocks for up to some tens of milliseconds.
    pub(super) fn grammar(&self, grammar: &Grammar) -> Result<SharedGrammar, PrepareError> {
        let invalid = |error: &GrammarError| PrepareError::Invalid(error.to_string());
        let source = source(grammar)?;
        let grammars = self.grammars.get_or_init(|| Grammars::new(&self.model));
        let grammars = grammars.as_ref().map_err(invalid)?;
        grammars.compile(&source).map_err(|error| invalid(&error))
    }
}

fn source(grammar: &Grammar) -> Result<Source, PrepareError> {
    let text = || grammar.text.clone();
    Ok(match grammar.kind() {
        GrammarKind::JsonObject => Source::JsonObject,
        GrammarKind::JsonSchema => Source::JsonSchema(text()),
        GrammarKind::Lark => Source::Lark(text()),
        GrammarKind::Regex => Source::Regex(text()),
        GrammarKind::Gbnf => Source::Gbnf(text()),
        GrammarKind::Unspecified => {
            let kind = grammar.kind;
            let fault =
                format!("a grammar of the kind {kind} is not known here; update the worker");
            return Err(PrepareError::Invalid(fault));
        }
    })
}

impl From<Model> for LanguageModel {
    fn from(model: Model) -> Self {
        LanguageModel {
            model,
            grammars: Arc::default(),
        }
    }
}

impl Deref for LanguageModel {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}
