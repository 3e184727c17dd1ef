//! `hydramesh models pull`.

use std::ops::Range;
use std::path::PathBuf;

use clap::ValueHint;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without a quantisation or file, safetensors are taken where the repository has a whole model of them, else the usual GGUF file. What was \
begun goes on, what is there already stays; every file is checked. The last line of output is what to open.

Environment: HF_TOKEN, HF_TOKEN_FILE, HF_HOME (its token, and its cache of what was fetched before), HF_ENDPOINT, HF_HUB_OFFLINE, and \
HTTPS_PROXY.

Examples:
  hydramesh models pull Qwen/Qwen3-0.6B-GGUF:Q8_0
  hydramesh models pull HuggingFaceTB/SmolLM2-135M-Instruct --revision main
  hydramesh models pull Qwen/Qwen3-0.6B-GGUF:Q8_0 --layers 0..14    # only what a stage of these layers needs")]
pub struct PullArgs {
    /// ORGANISATION/MODEL on the hub, behind it :QUANTISATION or :FILE and @REVISION where wanted; its address; or a short name such as qwen2.5:7b
    #[arg(value_name = "NAME")]
    pub name: String,

    /// Branch, tag or commit [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,

    /// Only what these layers need, such as 0..14; the end is the first that is not wanted
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    pub layers: Option<Range<u32>>,

    /// The store's folder [default: ~/.local/share/hydramesh/models]
    #[arg(long, value_name = "DIR", env = "HYDRAMESH_STORE", value_hint = ValueHint::DirPath)]
    pub store: Option<PathBuf>,

    /// Print one JSON object when it is done
    #[arg(long)]
    pub json: bool,
}

/// `0..14`.
fn parse_layers(text: &str) -> Result<Range<u32>, String> {
    let range = text
        .split_once("..")
        .and_then(|(start, end)| Some(start.parse().ok()?..end.parse().ok()?));
    match range {
        Some(range) if !range.is_empty() => Ok(range),
        _ => Err(format!(
            "{text:?} is no range of layers; write 0..14 for the first fourteen"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_a_range_with_something_in_it() {
        assert_eq!(parse_layers("3..14"), Ok(3..14));
        for bad in [
            "", "3", "3..", "..4", "4..4", "5..4", "-1..4", "0..=4", "a..b",
        ] {
            assert!(parse_layers(bad).is_err(), "{bad:?}");
        }
    }
}
