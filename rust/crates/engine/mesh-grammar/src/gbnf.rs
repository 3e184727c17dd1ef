//! llama.cpp's grammar notation GBNF, as a grammar in Lark's syntax.
//!
//! The notation is described in llama.cpp's `grammars/README.md`: rules `name ::= alternatives` from `root`
//! on; literals, character classes, `.`, groups, the repetitions `* + ? {m} {m,} {m,n}`, comments from `#`.
//!
//! A rule from which no recursion can be reached is a regular language and becomes a terminal. Others become
//! rules. A lexer takes the longest match of terminals, so in a grammar with recursion the answers are a
//! subset of those that GBNF allows where two terminals that may follow each other share characters; without
//! recursion they are the same.

mod parse;

use std::fmt::Write as _;

pub use self::parse::GbnfError;
use self::parse::{Expr, Parsed};

/// Translates a grammar.
///
/// # Errors
/// [`GbnfError`] names the line and the mistake.
pub fn to_lark(text: &str) -> Result<String, GbnfError> {
    let parsed = parse::parse(text)?;
    let regular = regular(&parsed);
    let mut lark = format!("start: {}\n", name(parsed.root, &regular));
    for (rule, body) in parsed.rules.iter().enumerate() {
        let _ = write!(lark, "{}: ", name(rule, &regular));
        write(body, &regular, &mut lark);
        lark.push('\n');
    }
    Ok(lark)
}

fn name(rule: usize, regular: &[bool]) -> String {
    match regular[rule] {
        true => format!("T{rule}"),
        false => format!("r{rule}"),
    }
}

/// For each rule, whether no recursion can be reached from it.
fn regular(parsed: &Parsed) -> Vec<bool> {
    let mut uses: Vec<Vec<usize>> = Vec::new();
    for body in &parsed.rules {
        let mut used = Vec::new();
        body.rules(&mut used);
        uses.push(used);
    }
    // Rules whose used rules are all regular are regular: from the leaves up, as far as that goes.
    let mut missing: Vec<usize> = uses.iter().map(Vec::len).collect();
    let mut users = vec![Vec::new(); uses.len()];
    for (user, used) in uses.iter().enumerate() {
        for &rule in used {
            users[rule].push(user);
        }
    }
    let mut regular = vec![false; uses.len()];
    let mut ready: Vec<usize> = (0..uses.len()).filter(|&rule| missing[rule] == 0).collect();
    while let Some(rule) = ready.pop() {
        regular[rule] = true;
        for &user in &users[rule] {
            missing[user] -= 1;
            if missing[user] == 0 {
                ready.push(user);
            }
        }
    }
    regular
}

fn write(expr: &Expr, regular: &[bool], lark: &mut String) {
    match expr {
        Expr::Literal(text) => {
            // JSON's escapes are Lark's.
            lark.push_str(&serde_json::Value::from(text.as_str()).to_string());
        }
        Expr::Class { negated, ranges } => {
            lark.push_str(if *negated { "/[^" } else { "/[" });
            for &(first, last) in ranges {
                character(first, lark);
                if last != first {
                    lark.push('-');
                    character(last, lark);
                }
            }
            lark.push_str("]/");
        }
        Expr::Any => lark.push_str("/(.|\\n)/"),
        Expr::Rule(rule) => lark.push_str(&name(*rule, regular)),
        Expr::Sequence(parts) if parts.is_empty() => lark.push_str("\"\""),
        Expr::Sequence(parts) => list(parts, " ", regular, lark),
        Expr::Alternatives(parts) => {
            lark.push('(');
            list(parts, " | ", regular, lark);
            lark.push(')');
        }
        Expr::Repeat { of, least, most } => {
            lark.push('(');
            write(of, regular, lark);
            let _ = match (least, most) {
                (0, None) => write!(lark, ")*"),
                (1, None) => write!(lark, ")+"),
                (0, Some(1)) => write!(lark, ")?"),
                (least, Some(most)) => write!(lark, "){{{least},{most}}}"),
                (least, None) => write!(lark, "){{{least},}}"),
            };
        }
    }
}

fn list(parts: &[Expr], between: &str, regular: &[bool], lark: &mut String) {
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            lark.push_str(between);
        }
        write(part, regular, lark);
    }
}

/// A character of a class of a regular expression.
fn character(c: char, lark: &mut String) {
    match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | ' ' => lark.push(c),
        _ => {
            let _ = write!(lark, "\\u{{{:x}}}", u32::from(c));
        }
    }
}
