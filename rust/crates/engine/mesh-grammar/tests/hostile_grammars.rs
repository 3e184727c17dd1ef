//! Descriptions that are made to take time or memory.

use std::time::{Duration, Instant};

use mesh_engine::{Allowed, Vocabulary};
use mesh_grammar::{Grammars, Source};

struct Ascii([u8; 128]);

impl Vocabulary for Ascii {
    fn size(&self) -> usize {
        129
    }
    fn text(&self, token: u32) -> &[u8] {
        let token = token as usize;
        self.0.get(token..=token).unwrap_or(&[])
    }
    fn is_end(&self, token: u32) -> bool {
        token == 128
    }
}

/// Compiles it and takes some tokens under it, if that is possible at all.
fn attack(grammars: &Grammars, name: &str, source: &Source) {
    let started = Instant::now();
    let outcome = match grammars.compile(source) {
        Err(error) => error.to_string(),
        Ok(grammar) => {
            let mut answer = grammar.0.begin();
            let mut tokens = 0u32;
            let outcome = loop {
                if tokens == 200 {
                    break "followed".to_owned();
                }
                answer.prepare();
                let next = match answer.allowed() {
                    Err(error) => break error.to_string(),
                    Ok(Allowed::End) => break "complete".to_owned(),
                    Ok(Allowed::Tokens(set)) => (0..128).rev().find(|&token| set.contains(token)),
                };
                let Some(token) = next else {
                    break "ended".to_owned();
                };
                if let Err(error) = answer.accept(token) {
                    break error.to_string();
                }
                tokens += 1;
            };
            format!("{tokens} tokens, {outcome}")
        }
    };
    let took = started.elapsed();
    println!("{name}: {took:?}: {}", &outcome[..outcome.len().min(120)]);
    assert!(took < LIMIT, "{name} took {took:?}");
}

/// Generous for a test without optimisation on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn hostile_descriptions_end_in_bounded_time() {
    let vocabulary = Ascii(std::array::from_fn(|i| i as u8));
    let grammars = Grammars::new(&vocabulary).expect("a vocabulary");
    let schema = |text: String| Source::JsonSchema(text);
    let nested = |n: usize, open: &str, middle: &str, close: &str| {
        [open.repeat(n), middle.to_owned(), close.repeat(n)].concat()
    };
    let chain = |n: usize, key: &str| {
        let links = (0..n).map(|i| {
            format!(
                "\"d{i}\":{{\"{key}\":[{{\"$ref\":\"#/$defs/d{}\"}},{{\"type\":\"object\"}}]}}",
                i + 1
            )
        });
        let links = links.collect::<Vec<_>>().join(",");
        format!(
            "{{\"$ref\":\"#/$defs/d0\",\"$defs\":{{{links},\"d{n}\":{{\"type\":\"object\"}}}}}}"
        )
    };
    let doubling = |n: usize, key: &str| {
        let links = (0..n).map(|i| {
            let next = format!("{{\"$ref\":\"#/$defs/d{}\"}}", i + 1);
            format!("\"d{i}\":{{\"{key}\":[{next},{next}]}}")
        });
        let links = links.collect::<Vec<_>>().join(",");
        format!(
            "{{\"$ref\":\"#/$defs/d0\",\"$defs\":{{{links},\"d{n}\":{{\"type\":\"string\"}}}}}}"
        )
    };
    let wide =
        (0..5000).map(|i| format!("\"p{i}\":{{\"type\":\"string\",\"maxLength\":{}}}", i + 1));
    let wide = wide.collect::<Vec<_>>().join(",");
    let rules = |n: usize| {
        (0..n)
            .map(|i| format!("r{i}: \"a\" r{} | \"b\"\n", i + 1))
            .collect::<String>()
    };
    let tokens = |n: usize| {
        (0..n)
            .map(|i| format!("T{i}: T{0} T{0}\n", i + 1))
            .collect::<String>()
    };
    for (name, source) in [
        ("deep JSON", schema(nested(100_000, "{\"not\":", "{}", "}"))),
        ("deep items", schema(nested(60, "{\"type\":\"array\",\"items\":", "{}", "}"))),
        ("chain of anyOf", schema(chain(2000, "anyOf"))),
        ("chain of allOf", schema(chain(2000, "allOf"))),
        ("chain of oneOf", schema(chain(2000, "oneOf"))),
        ("doubling anyOf", schema(doubling(40, "anyOf"))),
        ("doubling allOf", schema(doubling(40, "allOf"))),
        ("recursive allOf", schema(r##"{"allOf":[{"$ref":"#"}]}"##.to_owned())),
        ("recursive anyOf", schema(r##"{"anyOf":[{"$ref":"#"},{"$ref":"#"}]}"##.to_owned())),
        ("wide object", schema(format!("{{\"type\":\"object\",\"properties\":{{{wide}}}}}"))),
        ("long string", schema(r#"{"type":"string","minLength":1000000,"maxLength":2000000}"#.to_owned())),
        ("long array", schema(r#"{"type":"array","items":{"type":"integer"},"minItems":1000000}"#.to_owned())),
        ("multiple", schema(r#"{"type":"integer","multipleOf":999999937,"minimum":7}"#.to_owned())),
        ("pattern", schema(r#"{"type":"string","pattern":"^(a|a|a|b)*c(a|b){1000}(d.*e){50}$"}"#.to_owned())),
        ("many patterns", schema(r#"{"type":"object","patternProperties":{"^(a|b)*a(a|b){200}$":{},"^(c|b)*a(a|b){200}$":{}}}"#.to_owned())),
        ("counting regex", Source::Regex("(a|b)*a(a|b){500}".to_owned())),
        ("nested counts", Source::Regex("((((a{1,100}){1,100}){1,100}){1,100}){1,100}".to_owned())),
        ("unicode classes", Source::Regex("(\\p{L}\\p{N}){1,500}".to_owned())),
        ("deep parentheses", Source::Regex(nested(100_000, "(", "a", ")"))),
        ("parentheses in lark", Source::Lark(format!("start: {}", nested(100_000, "(", "\"a\"", ")")))),
        ("parentheses at the limit", Source::Lark(format!("start: {}", nested(200, "(", "\"a\"", ")")))),
        ("chain of rules", Source::Lark(format!("start: r0\n{}r990: \"c\"\n", rules(990)))),
        ("doubling terminals", Source::Lark(format!("start: T0\n{}T40: \"c\"\n", tokens(40)))),
        ("chain of terminals", Source::Lark(format!("start: T0\n{}T990: \"c\"\n", tokens(990).replace(" T", " \"x\" T")))),
        ("ambiguous", Source::Lark("start: s\ns: s s | s s s | \"a\" | \"a\"?".to_owned())),
        ("left recursion", Source::Lark("start: start \"a\" | start start | \"\"".to_owned())),
        ("repeat", Source::Lark("start: ((\"a\"{1,1000}){1,1000}){1,1000}".to_owned())),
        ("gbnf depth", Source::Gbnf(format!("root ::= {}", nested(100, "(", "\"a\"", ")")))),
        ("gbnf repeat", Source::Gbnf("root ::= x{2000}\nx ::= y{2000}\ny ::= [a-z]{2000} root?".to_owned())),
        ("gbnf chain", Source::Gbnf((0..900).map(|i| format!("{} ::= \"a\" r{}?\n", if i == 0 { "root".to_owned() } else { format!("r{i}") }, if i == 899 { 0 } else { i + 1 })).collect::<String>() + "r0 ::= root")),
        ("too long", Source::Regex("a".repeat(1 << 20))),
    ] {
        attack(&grammars, name, &source);
    }
}
