//! A streamed chat through the OpenAI API of a head. Text is printed as it arrives.
//!
//! ```text
//! cargo run -p mesh-client --example openai_stream -- http://127.0.0.1:8080 "Tell me a story."
//! ```

use std::error::Error;
use std::io::{Write, stdout};

use mesh_api::{ChatCompletionRequest, GenerationOptions};
use mesh_client::http::HttpClient;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(head), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: openai_stream URL PROMPT".into());
    };
    let print = |text: &str| {
        print!("{text}");
        stdout().flush()
    };
    stream(&head, &prompt, print).await?;
    println!();
    Ok(())
}

/// Asks the head's first model and hands each piece of text to `on_text`.
pub(crate) async fn stream(
    head: &str,
    prompt: &str,
    mut on_text: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<(), Box<dyn Error>> {
    let client = HttpClient::new(head, std::env::var("HYDRAMESH_API_KEY").ok())?;
    let models = client.models().await?;
    let model = models.first().ok_or("the mesh serves no model")?;
    let options = GenerationOptions {
        model: Some(model.clone()),
        max_tokens: Some(256),
        ..GenerationOptions::default()
    };
    let request = ChatCompletionRequest::question(prompt, options);
    let mut answer = client.stream(request).await?;
    while let Some(piece) = answer.next().await? {
        on_text(&piece.text)?;
    }
    Ok(())
}
