//! Reads GBNF.

use std::collections::HashMap;
use std::iter::Peekable;
use std::str::Chars;

/// Mistakes in a grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {fault}")]
pub struct GbnfError {
    /// Line of the mistake, from 1.
    pub line: usize,
    /// The mistake.
    pub fault: String,
}

pub(super) struct Parsed {
    pub(super) rules: Vec<Expr>,
    pub(super) root: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expr {
    Literal(String),
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    Any,
    /// The rule at this index.
    Rule(usize),
    Sequence(Vec<Expr>),
    Alternatives(Vec<Expr>),
    Repeat {
        of: Box<Expr>,
        least: u32,
        most: Option<u32>,
    },
}

impl Expr {
    /// Appends the rules that it names.
    pub(super) fn rules(&self, found: &mut Vec<usize>) {
        match self {
            Expr::Literal(_) | Expr::Class { .. } | Expr::Any => {}
            Expr::Rule(rule) => found.push(*rule),
            Expr::Sequence(parts) | Expr::Alternatives(parts) => {
                parts.iter().for_each(|part| part.rules(found));
            }
            Expr::Repeat { of, .. } => of.rules(found),
        }
    }
}

pub(super) fn parse(text: &str) -> Result<Parsed, GbnfError> {
    let mut parser = Parser {
        chars: text.chars().peekable(),
        line: 1,
        names: HashMap::new(),
        rules: Vec::new(),
    };
    parser.space(true);
    while parser.chars.peek().is_some() {
        parser.rule()?;
        parser.space(true);
    }
    parser.finish()
}

struct Parser<'a> {
    chars: Peekable<Chars<'a>>,
    line: usize,
    names: HashMap<String, usize>,
    /// Bodies, and the line that first names each rule.
    rules: Vec<(Option<Expr>, usize)>,
}

impl Parser<'_> {
    fn finish(self) -> Result<Parsed, GbnfError> {
        let fault = |line, fault| GbnfError { line, fault };
        for (name, &rule) in &self.names {
            if let (None, line) = self.rules[rule] {
                return Err(fault(line, format!("the rule {name:?} is not defined")));
            }
        }
        let Some(&root) = self.names.get("root") else {
            let text = "the rule \"root\", with which an answer begins, is missing";
            return Err(fault(1, text.to_owned()));
        };
        let rules = self.rules.into_iter().filter_map(|(body, _)| body);
        Ok(Parsed {
            rules: rules.collect(),
            root,
        })
    }

    fn rule(&mut self) -> Result<(), GbnfError> {
        let name = self.name();
        if name.is_empty() {
            return Err(self.unexpected("the name of a rule"));
        }
        self.space(false);
        for expected in "::=".chars() {
            if !self.take(expected) {
                return Err(self.unexpected(&format!("\"::=\" behind the rule's name {name:?}")));
            }
        }
        self.space(true);
        let body = self.alternatives(0)?;
        if !matches!(self.chars.peek(), None | Some('\n')) {
            return Err(self.unexpected("the end of the rule"));
        }
        let rule = self.index(name.clone())?;
        if self.rules[rule].0.replace(body).is_some() {
            return Err(self.fault(format!("the rule {name:?} is defined twice")));
        }
        Ok(())
    }

    /// Alternatives up to a closing parenthesis, or to the end of the rule on the outermost level.
    fn alternatives(&mut self, depth: usize) -> Result<Expr, GbnfError> {
        if depth > MOST_DEPTH {
            return Err(self.fault(format!("more than {MOST_DEPTH} parentheses are open")));
        }
        let mut alternatives = vec![self.sequence(depth)?];
        while self.take('|') {
            self.space(true);
            alternatives.push(self.sequence(depth)?);
        }
        Ok(match alternatives.len() {
            1 => alternatives.swap_remove(0),
            _ => Expr::Alternatives(alternatives),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Expr, GbnfError> {
        let mut parts = Vec::new();
        while let Some(&c) = self.chars.peek() {
            let part = match c {
                '"' => Expr::Literal(self.literal()?),
                '[' => self.class()?,
                '.' => {
                    self.chars.next();
                    Expr::Any
                }
                '(' => {
                    self.chars.next();
                    self.space(true);
                    let inner = self.alternatives(depth + 1)?;
                    if !self.take(')') {
                        return Err(self.unexpected("\")\""));
                    }
                    inner
                }
                c if in_name(c) => {
                    let name = self.name();
                    Expr::Rule(self.index(name)?)
                }
                '<' | '!' => {
                    let text =
                        "tokens of the model are not supported; write their text as a literal";
                    return Err(self.fault(text.to_owned()));
                }
                _ => break,
            };
            parts.push(self.repeated(part)?);
            self.space(depth > 0);
        }
        Ok(match parts.len() {
            1 => parts.swap_remove(0),
            _ => Expr::Sequence(parts),
        })
    }

    /// `part` with the repetitions behind it.
    fn repeated(&mut self, mut part: Expr) -> Result<Expr, GbnfError> {
        let mut repetitions = 0;
        while let Some(&c) = self.chars.peek() {
            let (least, most) = match c {
                '*' => (0, None),
                '+' => (1, None),
                '?' => (0, Some(1)),
                '{' => {
                    self.chars.next();
                    self.bounds()?
                }
                _ => break,
            };
            if c != '{' {
                self.chars.next();
            }
            repetitions += 1;
            if repetitions > MOST_REPETITIONS {
                let text = format!("more than {MOST_REPETITIONS} repetitions follow each other");
                return Err(self.fault(text));
            }
            part = Expr::Repeat {
                of: Box::new(part),
                least,
                most,
            };
        }
        Ok(part)
    }

    /// What is between the braces of `{m}`, `{m,}` and `{m,n}`, and the closing one.
    fn bounds(&mut self) -> Result<(u32, Option<u32>), GbnfError> {
        self.space(false);
        let least = self.number()?;
        self.space(false);
        let mut most = Some(least);
        if self.take(',') {
            self.space(false);
            let open = self.chars.peek() == Some(&'}');
            most = if open { None } else { Some(self.number()?) };
            self.space(false);
        }
        if !self.take('}') {
            return Err(self.unexpected("\"}\" behind the bounds of a repetition"));
        }
        if most.is_some_and(|most| most < least) {
            return Err(self.fault(format!("{{{least},…}} ends below its beginning")));
        }
        Ok((least, most))
    }

    fn number(&mut self) -> Result<u32, GbnfError> {
        let mut digits = String::new();
        while let Some(digit) = self.chars.next_if(char::is_ascii_digit) {
            digits.push(digit);
        }
        match digits.parse() {
            Ok(number) if number <= MOST_TIMES => Ok(number),
            _ if digits.is_empty() => Err(self.unexpected("a number")),
            _ => Err(self.fault(format!(
                "{digits} repetitions are over the limit of {MOST_TIMES}"
            ))),
        }
    }

    fn literal(&mut self) -> Result<String, GbnfError> {
        self.chars.next();
        let mut text = String::new();
        loop {
            match self.chars.next() {
                Some('"') => return Ok(text),
                Some('\\') => text.push(self.escape()?),
                None | Some('\n') => return Err(self.fault("a literal has no end".to_owned())),
                Some(c) => text.push(c),
            }
        }
    }

    fn class(&mut self) -> Result<Expr, GbnfError> {
        self.chars.next();
        let negated = self.take('^');
        let mut ranges = Vec::new();
        while !self.take(']') {
            let first = self.class_character()?;
            let mut last = first;
            if self.take('-') {
                if self.chars.peek() == Some(&']') {
                    // A dash at the end is one.
                    ranges.push(('-', '-'));
                } else {
                    last = self.class_character()?;
                }
            }
            if last < first {
                return Err(self.fault(format!("the range {first:?} to {last:?} is empty")));
            }
            ranges.push((first, last));
        }
        if ranges.is_empty() {
            return Err(self.fault("a character class is empty".to_owned()));
        }
        Ok(Expr::Class { negated, ranges })
    }

    fn class_character(&mut self) -> Result<char, GbnfError> {
        match self.chars.next() {
            Some('\\') => self.escape(),
            None | Some('\n') => Err(self.fault("a character class has no end".to_owned())),
            Some(c) => Ok(c),
        }
    }

    /// The character behind a backslash.
    fn escape(&mut self) -> Result<char, GbnfError> {
        let digits = match self.chars.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^')) => return Ok(c),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c) => return Err(self.fault(format!("the escape \\{c} is unknown"))),
            None => return Err(self.fault("an escape has no end".to_owned())),
        };
        let mut code = 0u32;
        for _ in 0..digits {
            let digit = self.chars.next().and_then(|c| c.to_digit(16));
            let Some(digit) = digit else {
                return Err(self.fault(format!("an escape needs {digits} hexadecimal digits")));
            };
            code = code << 4 | digit;
        }
        let unknown = || self.fault(format!("U+{code:X} is not a character"));
        char::from_u32(code).ok_or_else(unknown)
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.chars.next_if(|&c| in_name(c)) {
            name.push(c);
        }
        name
    }

    /// The index of the rule called `name`.
    fn index(&mut self, name: String) -> Result<usize, GbnfError> {
        let next = self.rules.len();
        let index = *self.names.entry(name).or_insert(next);
        if index == next {
            if next == MOST_RULES {
                return Err(self.fault(format!("there are more than {MOST_RULES} rules")));
            }
            self.rules.push((None, self.line));
        }
        Ok(index)
    }

    /// Skips blanks and comments, and line ends if `lines`.
    fn space(&mut self, lines: bool) {
        while let Some(&c) = self.chars.peek() {
            match c {
                ' ' | '\t' | '\r' => {}
                '\n' if lines => self.line += 1,
                '#' => {
                    while self.chars.next_if(|&c| c != '\n').is_some() {}
                    continue;
                }
                _ => return,
            }
            self.chars.next();
        }
    }

    fn take(&mut self, c: char) -> bool {
        self.chars.next_if_eq(&c).is_some()
    }

    fn unexpected(&mut self, expected: &str) -> GbnfError {
        let found = match self.chars.peek() {
            None => "the end".to_owned(),
            Some('\n') => "the end of the line".to_owned(),
            Some(c) => format!("{c:?}"),
        };
        self.fault(format!("expected {expected}, found {found}"))
    }

    fn fault(&self, fault: String) -> GbnfError {
        GbnfError {
            line: self.line,
            fault,
        }
    }
}

fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

const MOST_DEPTH: usize = 64;
const MOST_REPETITIONS: usize = 8;
const MOST_RULES: usize = 1000;
/// As in llama.cpp.
const MOST_TIMES: u32 = 2000;
