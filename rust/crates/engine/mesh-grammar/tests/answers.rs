//! Answers under grammars, with a vocabulary of bytes and some longer tokens.

use mesh_engine::{Allowed, Constraint, Vocabulary};
use mesh_grammar::{GrammarError, Grammars, Source};

/// Each byte is a token; then come some texts, then a token that ends answers.
struct Bytes {
    words: Vec<Vec<u8>>,
}

impl Bytes {
    fn new() -> Self {
        let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for text in [
            "{\"", "\":", "\", \"", "true", "null", "name", " 12", "é", "\"}",
        ] {
            words.push(text.as_bytes().to_vec());
        }
        words.push(vec![b'x'; 2000]);
        words.push(Vec::new());
        Bytes { words }
    }

    fn end(&self) -> u32 {
        self.words.len() as u32 - 1
    }
}

impl Vocabulary for Bytes {
    fn size(&self) -> usize {
        self.words.len()
    }

    fn text(&self, token: u32) -> &[u8] {
        &self.words[token as usize]
    }

    fn is_end(&self, token: u32) -> bool {
        token == self.end()
    }
}

fn grammars() -> Grammars {
    Grammars::new(&Bytes::new()).expect("a vocabulary")
}

/// Follows `text` byte by byte. Returns the bytes that were taken, and whether the answer may end there.
fn follow(constraint: &mut dyn Constraint, text: &str) -> (usize, bool) {
    for (i, byte) in text.bytes().enumerate() {
        constraint.prepare();
        let taken = match constraint.allowed().expect("in bounds") {
            Allowed::Tokens(set) => set.contains(u32::from(byte)),
            Allowed::End => false,
        };
        if !taken {
            return (i, false);
        }
        constraint.accept(u32::from(byte)).expect("it is allowed");
    }
    (text.len(), ends(constraint))
}

fn ends(constraint: &mut dyn Constraint) -> bool {
    match constraint.allowed().expect("in bounds") {
        Allowed::Tokens(set) => set.contains(Bytes::new().end()),
        Allowed::End => true,
    }
}

#[track_caller]
fn check(source: Source, whole: &[&str], not: &[&str]) {
    let grammar = grammars().compile(&source);
    let grammar = grammar.unwrap_or_else(|error| panic!("{source:?}: {error}"));
    for text in whole {
        let (taken, ends) = follow(&mut *grammar.0.begin(), text);
        assert_eq!(
            (taken, ends),
            (text.len(), true),
            "{text:?} under {source:?}"
        );
    }
    for text in not {
        let (taken, ends) = follow(&mut *grammar.0.begin(), text);
        assert!(taken < text.len() || !ends, "{text:?} under {source:?}");
    }
}

fn schema(text: &str) -> Source {
    Source::JsonSchema(text.to_owned())
}

#[test]
fn json_follows_a_schema() {
    let person = r##"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150}, "of": {"$ref": "#/$defs/kind"}},
        "required": ["name", "age"], "additionalProperties": false,
        "$defs": {"kind": {"enum": ["a", "b"]}}}"##;
    check(
        schema(person),
        &[
            r#"{"name": "Anna", "age": 7}"#,
            r#"{"name":"é","age":150,"of":"b"}"#,
        ],
        &[
            r#"{"name": "Annabel", "age": 7}"#,
            r#"{"name": "Anna", "age": 151}"#,
            r#"{"name": "Anna"}"#,
            r#"{"name": "Anna", "age": 7, "of": "c"}"#,
            r#"{"name": "Anna", "age": 7} and more"#,
        ],
    );
    check(
        Source::JsonObject,
        &["{}", r#"{"a": [1, {"b": null}]}"#],
        &["[]", "{", "1"],
    );
    // White space has an end, so that an answer has one.
    let indented = format!("{{\n{}\"a\": [\n1]}}", " ".repeat(32));
    let blanks = [
        indented.replace("{\n", "{\n "),
        "{\n\n}".to_owned(),
        "{  }".to_owned(),
    ];
    check(
        Source::JsonObject,
        &[&indented],
        &blanks.each_ref().map(String::as_str),
    );
}

#[test]
fn text_follows_regular_expressions_and_grammars_in_both_notations() {
    let regex = Source::Regex(r"[a-c]{2,3}(-\d+)?".to_owned());
    check(
        regex,
        &["ab", "abc", "abc-12"],
        &["a", "abd", "ab-", "abcc"],
    );
    let lark = "start: greeting \" \" NAME\ngreeting: \"hello\" | \"bye\"\nNAME: /[A-Z][a-z]*/";
    check(
        Source::Lark(lark.to_owned()),
        &["hello Ann", "bye X"],
        &["hello ann", "hi Ann"],
    );
    let gbnf = "# A sum.\nroot ::= term ([-+] term)*\nterm ::= num | (\"(\" root\n  \")\")\nnum ::= [0-9]{1,3} ws\nws ::= [ \\t\\n]*";
    check(
        Source::Gbnf(gbnf.to_owned()),
        &["1+22", "(1 -2)+345 ", "((7))"],
        &["1+", "1234", "(1"],
    );
    // Without recursion even terminals that share characters are exact.
    let gbnf =
        "root ::= \"a\" \"bc\" | \"ab\" \"d\" | [^a-z\\]\\x2d] . any?\nany ::= \"\\u00e9\\\"\"";
    check(
        Source::Gbnf(gbnf.to_owned()),
        &["abc", "abd", "A\n", "Axé\""],
        &["ab", "-x", "]x", "zx"],
    );
}

#[test]
fn a_longer_token_is_allowed_where_its_text_is() {
    let source = schema(
        r#"{"type": "object", "properties": {"name": {"type": "boolean"}}, "required": ["name"]}"#,
    );
    let grammar = grammars().compile(&source).expect("a schema");
    let mut answer = grammar.0.begin();
    let words = Bytes::new().words;
    for text in ["{\"", "name", "\":", "true"] {
        let token = words.iter().position(|word| word == text.as_bytes());
        let token = token.expect("a token") as u32;
        let Allowed::Tokens(set) = answer.allowed().expect("in bounds") else {
            panic!("the answer ends before {text:?}");
        };
        assert!(set.contains(token), "{text:?}");
        answer.accept(token).expect("it is allowed");
    }
    // Neither a token that is too long for the trie nor one that is no text is ever allowed.
    let grammar = grammars()
        .compile(&Source::Regex("[^z]*".to_owned()))
        .expect("a regex");
    let mut answer = grammar.0.begin();
    let Allowed::Tokens(set) = answer.allowed().expect("in bounds") else {
        panic!("it may go on");
    };
    assert!(set.contains(u32::from(b'x')));
    assert!(!set.contains(Bytes::new().end() - 1) && !set.contains(255));
}

#[test]
fn an_answer_goes_on_elsewhere_after_the_same_tokens() {
    let source = schema(r#"{"type": "array", "items": {"type": "integer"}, "maxItems": 3}"#);
    let text = b"[1, 22, 3]";
    let mut first = grammars().compile(&source).expect("a schema").0.begin();
    for (i, &byte) in text.iter().enumerate() {
        let mut second = grammars().compile(&source).expect("a schema").0.begin();
        for &byte in &text[..i] {
            second
                .accept(u32::from(byte))
                .expect("it was allowed before");
        }
        assert_eq!(first.allowed(), second.allowed(), "after {i} tokens");
        first.accept(u32::from(byte)).expect("it is allowed");
    }
    assert_eq!(first.allowed(), Ok(Allowed::End));
}

#[test]
fn a_token_that_may_not_come_next_is_an_error_and_stays_one() {
    let mut answer = grammars()
        .compile(&Source::JsonObject)
        .expect("objects")
        .0
        .begin();
    answer.prepare();
    let error = answer
        .accept(u32::from(b'x'))
        .expect_err("no object begins so");
    assert!(!error.to_string().is_empty());
    assert!(answer.allowed().is_err());
}

#[test]
fn mistakes_and_what_is_not_supported_are_named() {
    let of = |source: Source| match grammars().compile(&source) {
        Ok(_) => panic!("{source:?} compiles"),
        Err(error) => error.to_string(),
    };
    for (source, names) in [
        (schema("{"), "not JSON"),
        (schema(r#"{"type": "strin"}"#), "strin"),
        (
            schema(r#"{"type": "object", "patternProperties": {"(": {}}}"#),
            "(",
        ),
        (schema(r##"{"$ref": "#/$defs/none"}"##), "none"),
        (
            schema(r#"{"type": "string", "format": "no-such"}"#),
            "no-such",
        ),
        (schema(r#"{"not": {"type": "string"}}"#), "not"),
        (
            schema(r#"{"type": "array", "uniqueItems": true}"#),
            "uniqueItems",
        ),
        (schema("false"), ""),
        (Source::Regex("(".to_owned()), "("),
        (Source::Lark("begin: \"x\"".to_owned()), "start"),
        (
            Source::Gbnf("root ::= x".to_owned()),
            "\"x\" is not defined",
        ),
        (Source::Gbnf("x ::= \"a\"".to_owned()), "\"root\""),
        (
            Source::Gbnf("root ::= \"a".to_owned()),
            "line 1: a literal has no end",
        ),
        (
            Source::Gbnf("root ::= <think>".to_owned()),
            "tokens of the model",
        ),
    ] {
        let error = of(source.clone());
        assert!(error.contains(names), "{source:?}: {error}");
        assert!(!error.contains('\n'), "{error}");
        println!("{error}");
    }
}

#[test]
fn a_vocabulary_without_an_end_is_refused() {
    struct Endless;
    impl Vocabulary for Endless {
        fn size(&self) -> usize {
            2
        }
        fn text(&self, _: u32) -> &[u8] {
            b"a"
        }
        fn is_end(&self, _: u32) -> bool {
            false
        }
    }
    let error = Grammars::new(&Endless)
        .err()
        .expect("answers would not end");
    assert!(matches!(error, GrammarError::Vocabulary { .. }));
}
