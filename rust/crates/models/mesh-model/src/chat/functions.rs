//! Functions and filters that `transformers` adds to Jinja for chat templates.

use std::time::SystemTime;

use mesh_base::clock;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

use super::guard::{MARKS, SENTINELS};
use super::python;

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| {
        strftime(format, clock::unix_seconds(SystemTime::now()))
    });
    environment.add_filter("tojson", to_json);
    // Values that Python can iterate over, and values that have a length and elements.
    let has_elements = |value: &Value| {
        let kind = value.kind();
        matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::String) || value.is_undefined()
    };
    environment.add_test("iterable", move |value: &Value| {
        has_elements(value) || value.kind() == ValueKind::Iterable
    });
    environment.add_test("sequence", move |value: &Value| has_elements(value));
    // To Python, truth is a number.
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_filter("string", |value: Value| python::text(&value));
}

/// The message given to `raise_exception`, if that is what ended the template.
pub(super) fn raised(error: &minijinja::Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(raised) = error.downcast_ref::<Raised>() {
            return Some(raised.0.clone());
        }
        source = error.source();
    }
    None
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(
        ErrorKind::InvalidOperation,
        "the template raised an exception",
    )
    .with_source(Raised(message)))
}

/// JSON as Python's `json.dumps` writes it, without the HTML escapes of Jinja's own filter.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let failed =
        |error: &dyn std::fmt::Display| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(failed(&"separators are two texts")),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let style = Style {
        item,
        key,
        indent: indent.map(|width| width.min(16)),
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        depth: 0,
        empty: true,
    };
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, style);
    let written = match sort_keys {
        false => value.serialize(&mut serializer),
        true => {
            let mut sorted = serde_json::to_value(value).map_err(|error| failed(&error))?;
            sorted.sort_all_objects();
            sorted.serialize(&mut serializer)
        }
    };
    written.map_err(|error| failed(&error))?;
    String::from_utf8(bytes).map_err(|error| failed(&error))
}

/// The style of JSON.
struct Style {
    item: String,
    key: String,
    /// Blanks for each level, each item on a line of its own.
    indent: Option<usize>,
    ascii: bool,
    depth: usize,
    /// Nothing stands in the list or object yet that was begun last.
    empty: bool,
}

impl Style {
    fn begin(
        &mut self,
        writer: &mut (impl std::io::Write + ?Sized),
        bracket: u8,
    ) -> std::io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(&[bracket])
    }

    fn next(
        &mut self,
        writer: &mut (impl std::io::Write + ?Sized),
        first: bool,
    ) -> std::io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.line(writer)
    }

    fn end(
        &mut self,
        writer: &mut (impl std::io::Write + ?Sized),
        bracket: u8,
    ) -> std::io::Result<()> {
        self.depth -= 1;
        if !std::mem::take(&mut self.empty) {
            self.line(writer)?;
        }
        writer.write_all(&[bracket])
    }

    fn line(&self, writer: &mut (impl std::io::Write + ?Sized)) -> std::io::Result<()> {
        let Some(width) = self.indent else {
            return Ok(());
        };
        writer.write_all(b"\n")?;
        writer.write_all(" ".repeat(width * self.depth).as_bytes())
    }
}

impl Formatter for Style {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, b'[')
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, b']')
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, b'{')
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, b'}')
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn write_string_fragment<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> std::io::Result<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            // Marks and sentinels have to be found again.
            if c.is_ascii() || MARKS.contains(&c) || SENTINELS.contains(&c) {
                writer.write_all(c.encode_utf8(&mut [0; 4]).as_bytes())?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

/// The date `seconds` after 1970 began, in UTC, in the directives of C's `strftime` that templates use;
/// others stay as they are.
pub(super) fn strftime(format: &str, seconds: u64) -> String {
    let date = clock::date(seconds);
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    let (hour, minute, second) = date.to_hms();
    let (weekday, month_name) = (date.weekday().to_string(), date.month().to_string());
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('e') => out += &format!("{day:2}"),
            Some('B') => out += &month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += &weekday,
            Some('a') => out += &weekday[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('I') => out += &format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('j') => out += &format!("{:03}", date.ordinal()),
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('T') => out += &format!("{hour:02}:{minute:02}:{second:02}"),
            Some('D') => out += &format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('R') => out += &format!("{hour:02}:{minute:02}"),
            Some('h') => out += &month_name[..3],
            // The zone of a time without one.
            Some('Z' | 'z') => {}
            Some('f') => out += "000000",
            Some('s') => out += &seconds.to_string(),
            Some('u') => out += &date.weekday().number_from_monday().to_string(),
            Some('w') => out += &date.weekday().number_days_from_sunday().to_string(),
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            // Without zeros before it.
            Some('-') => match chars.next() {
                Some('d' | 'e') => out += &day.to_string(),
                Some('m') => out += &month.to_string(),
                Some('H') => out += &hour.to_string(),
                Some('I') => out += &((hour + 11) % 12 + 1).to_string(),
                Some('M') => out += &minute.to_string(),
                Some('S') => out += &second.to_string(),
                Some('y') => out += &(year % 100).to_string(),
                Some('j') => out += &date.ordinal().to_string(),
                Some(other) => out.extend(['%', '-', other]),
                None => out += "%-",
            },
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}
