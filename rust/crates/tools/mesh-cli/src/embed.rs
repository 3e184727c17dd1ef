//! `hydramesh embed`: texts to vectors.

use mesh_api::{CreateEmbeddingRequest, CreateEmbeddingResponse, TextInput, Vector, paths};
use serde::Serialize;

use crate::args::{EmbedArgs, HeadArgs};
use crate::ask::{http_client, within};
use crate::failure::{Exit, Failure};
use crate::input::standard_input;
use crate::output::print_now;

pub(crate) async fn run(head: &HeadArgs, args: EmbedArgs) -> Result<(), Failure> {
    let texts = texts(&args.text)?;
    let client = http_client(head)?;
    for texts in texts.chunks(MOST_TEXTS) {
        let request = request(&args, texts);
        let asking = within(args.timeout, client.post(paths::EMBEDDINGS, &request));
        let asked = tokio::select! {
            asked = asking => asked,
            _ = tokio::signal::ctrl_c() => return Err(Failure::interrupted()),
        };
        let answer = asked.map_err(|limit| {
            let text = format!("no vectors from {} within {limit:?}", client.base());
            Failure::new(Exit::Timeout, text).hint("--timeout gives it longer.")
        })??;
        print_now(&lines(&answer, texts, args.json)?);
    }
    Ok(())
}

fn request(args: &EmbedArgs, texts: &[String]) -> CreateEmbeddingRequest {
    CreateEmbeddingRequest {
        input: TextInput::Texts(texts.to_vec()),
        model: args.model.clone(),
        dimensions: args.dimensions,
        input_type: args.input_type.clone(),
        ..CreateEmbeddingRequest::default()
    }
}

/// A text and its vector, for `--json`.
#[derive(Serialize)]
struct Line<'a> {
    embedding: &'a Vector,
    model: &'a str,
    text: &'a str,
}

/// One line per text: the numbers, or with `--json` an object with the text too.
fn lines(
    answer: &CreateEmbeddingResponse<'_>,
    texts: &[String],
    as_json: bool,
) -> Result<String, Failure> {
    let vectors = &answer.data;
    let (sent, wanted) = (vectors.len(), texts.len());
    if sent != wanted {
        let text = format!("the head sent {sent} vectors for {wanted} texts");
        return Err(Failure::failed(text));
    }
    let mut out = String::new();
    for (text, vector) in texts.iter().zip(vectors) {
        let embedding = &vector.embedding;
        if as_json {
            let model = &answer.model;
            out += &to_json(&Line {
                embedding,
                model,
                text,
            })?;
        } else if let Vector::Floats(numbers) = embedding {
            // Numbers as they are in JSON.
            let numbers: Result<Vec<String>, Failure> = numbers.iter().map(to_json).collect();
            out += &numbers?.join(" ");
        }
        out.push('\n');
    }
    Ok(out)
}

fn to_json(value: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|error| Failure::failed(error.to_string()))
}

/// The texts of the command line, or the lines of standard input if there are no words or only `-`.
fn texts(words: &[String]) -> Result<Vec<String>, Failure> {
    let nothing = Failure::usage("nothing to embed")
        .hint("hydramesh embed \"a text\" \"another\", or pipe one text per line in.");
    let texts: Vec<String> = match standard_input(words, nothing)? {
        Some(text) => {
            let lines = text.lines().filter(|line| !line.is_empty());
            lines.map(str::to_owned).collect()
        }
        None => words.to_vec(),
    };
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err(Failure::usage("a text to embed is empty"));
    }
    Ok(texts)
}

const MOST_TEXTS: usize = 1024;

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::{Value, json};

    use super::*;
    use crate::args::{Args, Command};

    fn parse(words: &[&str]) -> EmbedArgs {
        let words = ["hydramesh", "embed"].iter().chain(words);
        match Args::try_parse_from(words).expect("arguments").command {
            Command::Embed(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_was_said_is_in_the_body() {
        let texts = ["a".to_owned()];
        let body = |args: &EmbedArgs| serde_json::to_value(request(args, &texts)).unwrap();
        assert_eq!(body(&parse(&["a"])), json!({"input": ["a"]}));
        let all = parse(&[
            "--model",
            "m",
            "--dimensions",
            "64",
            "--input-type",
            "query",
            "a",
        ]);
        assert_eq!(
            body(&all),
            json!({"input": ["a"], "model": "m", "dimensions": 64, "input_type": "query"})
        );
    }

    #[test]
    fn each_text_is_a_line() {
        let answer =
            json!({"model": "m", "data": [{"embedding": [0.5, -1.0]}, {"embedding": [0.0, 2.0]}]});
        let answer = serde_json::from_value(answer).unwrap();
        let texts = ["a".to_owned(), "b".to_owned()];
        assert_eq!(
            lines(&answer, &texts, false).unwrap(),
            "0.5 -1.0\n0.0 2.0\n"
        );
        let json = lines(&answer, &texts, true).unwrap();
        let second: Value = serde_json::from_str(json.lines().nth(1).unwrap()).unwrap();
        assert_eq!(
            second,
            json!({"text": "b", "model": "m", "embedding": [0.0, 2.0]})
        );
        assert!(lines(&answer, &texts[..1], false).is_err());
    }
}
