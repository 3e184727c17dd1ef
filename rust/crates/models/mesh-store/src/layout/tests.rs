use mesh_model::Architecture;

use super::*;
use crate::testing::{gguf, safetensors};

#[test]
fn tensors_belong_to_layers_by_their_names() {
    for (name, expected) in [
        ("blk.0.attn_q.weight", Role::Layer(0)),
        ("blk.31.ffn_down.weight", Role::Layer(31)),
        ("model.layers.3.mlp.up_proj.weight", Role::Layer(3)),
        (
            "model.language_model.layers.4.mlp.up_proj.weight",
            Role::Layer(4),
        ),
        (
            "language_model.model.layers.5.mlp.up_proj.weight",
            Role::Layer(5),
        ),
        ("encoder.layer.11.output.dense.weight", Role::Layer(11)),
        ("bert.encoder.layer.2.output.dense.weight", Role::Layer(2)),
        ("token_embd.weight", Role::Embedding),
        ("model.embed_tokens.weight", Role::Embedding),
        ("language_model.model.embed_tokens.weight", Role::Embedding),
        ("output.weight", Role::Output),
        ("output_norm.weight", Role::Output),
        ("lm_head.weight", Role::Output),
        ("language_model.lm_head.weight", Role::Output),
        ("model.norm.weight", Role::Output),
        ("rope_freqs.weight", Role::Shared),
        ("norm.weight", Role::Shared),
        ("embeddings.word_embeddings.weight", Role::Shared),
        ("layers.1.weight", Role::Shared),
        ("blk.x.weight", Role::Shared),
        ("blk.03.weight", Role::Shared),
        ("blk.+3.weight", Role::Shared),
        ("blk.99999999999.weight", Role::Shared),
        ("", Role::Shared),
    ] {
        assert_eq!(role(name), expected, "{name}");
    }
}

#[test]
fn a_gguf_file_and_a_safetensors_file_tell_where_their_tensors_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = gguf(dir.path(), Architecture::Llama);
    let layout = Layout::read(&path).unwrap();
    let (file, bytes) = (Gguf::open(&path).unwrap(), std::fs::read(&path).unwrap());
    assert_eq!(layout.tensors.len(), file.tensors().iter().len());
    assert_eq!(layout.bytes, file.tensors().file_len());
    assert_eq!(layout.header, layout.tensors[0].offset);
    for place in &layout.tensors {
        let (start, end) = (place.offset as usize, (place.offset + place.bytes) as usize);
        let tensor = file.tensors().get(&place.name).unwrap();
        assert_eq!(bytes[start..end], *tensor.data.read().unwrap());
    }

    let path = dir.path().join("model.safetensors");
    std::fs::write(
        &path,
        safetensors(&["lm_head.weight", "model.norm.weight"], 10),
    )
    .unwrap();
    let layout = Layout::read(&path).unwrap();
    let places: Vec<_> = layout
        .tensors
        .iter()
        .map(|place| {
            (
                place.name.as_str(),
                place.offset - layout.header,
                place.bytes,
            )
        })
        .collect();
    assert_eq!(
        places,
        [("lm_head.weight", 0, 10), ("model.norm.weight", 10, 10)]
    );
    assert_eq!(layout.bytes, layout.header + 20);

    let path = dir.path().join("config.json");
    std::fs::write(&path, "{}").unwrap();
    assert_eq!(
        Layout::read(&path).unwrap(),
        Layout {
            bytes: 2,
            header: 2,
            tensors: Vec::new()
        }
    );
}

#[test]
fn a_hostile_safetensors_header_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let with_header = |header: &str, tensors: usize| {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(vec![0; tensors]);
        file
    };
    let tensor = |start: i64, end: i64| {
        with_header(
            &format!(r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[{start},{end}]}}}}"#),
            4,
        )
    };
    let mut huge_header = u64::MAX.to_le_bytes().to_vec();
    huge_header.extend(b"{}");
    let overlapping = with_header(
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#,
        4,
    );
    for hostile in [
        b"".to_vec(),
        b"{}".to_vec(),
        huge_header,
        with_header("{", 0),
        with_header("{}", 1),
        tensor(1, 5),
        tensor(-4, 0),
        tensor(4, 0),
        tensor(0, i64::MAX),
        overlapping,
    ] {
        std::fs::write(&path, &hostile).unwrap();
        let error = Layout::read(&path).unwrap_err();
        assert!(matches!(error, LayoutError::Safetensors { .. }), "{error}");
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
    std::fs::write(&path, tensor(0, 4)).unwrap();
    assert_eq!(Layout::read(&path).unwrap().tensors.len(), 1);
}

#[test]
fn what_is_no_regular_file_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.gguf");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(Layout::read(&pipe), Err(LayoutError::Read { .. })));
}
