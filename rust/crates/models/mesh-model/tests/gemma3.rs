//! A real model file of another family: Gemma 3 270M, whose tokenizer is SentencePiece's with 262,144 tokens.

use mesh_model::{
    Activation, Architecture, EncodeOptions, GgmlType, Message, Model, RopeScaling, RopeStyle,
};
use mesh_testkit::paths::gemma3;

fn model() -> Model {
    Model::open(gemma3().unwrap()).unwrap()
}

#[test]
fn the_shape_is_read() {
    let model = model();
    let config = model.config();
    assert_eq!(config.architecture, Architecture::Gemma3);
    assert_eq!((config.layers, config.hidden, config.ffn), (18, 640, 2048));
    assert_eq!(
        (config.heads, config.kv_heads, config.head_dim),
        (4, 1, 256)
    );
    assert_eq!((config.vocab, config.context), (262_144, 32_768));
    assert!(config.tied_embeddings && config.qk_norm && config.post_norms && !config.qkv_bias);
    assert_eq!(config.activation, Activation::GeluTanh);
    assert_eq!(config.query_scalar, 256.0);
    // √640 is 25.298; bfloat16 has eight bits.
    assert_eq!(config.embedding_scale, 25.25);
    assert_eq!(config.norm_offset, 0.0);
    assert_eq!(config.parameters(), 268_098_176);

    let (local, global) = (config.rope_of(0), config.rope_of(5));
    assert_eq!((local.base, global.base), (10_000.0, 1_000_000.0));
    for rope in [local, global] {
        assert_eq!((rope.dim, rope.style), (256, RopeStyle::Halves));
        assert_eq!(rope.scaling, RopeScaling::None);
    }
    for layer in 0..18 {
        let window = [Some(512), None][usize::from(layer % 6 == 5)];
        assert_eq!(config.window_of(layer), window, "layer {layer}");
    }
}

#[test]
fn a_file_called_q4_k_m_has_matrices_of_four_types() {
    let model = model();
    let ty = |name: &str| model.tensors().get(name).unwrap().ty;
    assert_eq!(ty("token_embd.weight"), GgmlType::Q8_0);
    assert_eq!(ty("blk.0.ffn_up.weight"), GgmlType::Q5_0);
    assert_eq!(ty("blk.0.attn_output.weight"), GgmlType::Q4_K);
    assert_eq!(ty("blk.0.ffn_down.weight"), GgmlType::Q6_K);
}

/// The ids are llama.cpp's (Debian's 0.7.0) for the same file.
#[test]
fn text_becomes_llama_cpps_tokens() {
    let model = model();
    let tokenizer = model.tokenizer();
    for (text, expected) in GOLDEN {
        let ids = tokenizer.encode(text, EncodeOptions::default()).unwrap();
        assert_eq!(ids, *expected, "{text:?}");
        assert_eq!(tokenizer.decode(&ids), *text);
    }
}

#[test]
fn a_sequence_begins_with_its_token_and_a_turn_ends_with_its_own() {
    let model = model();
    let tokenizer = model.tokenizer();
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos_ids()),
        (Some(2), &[1, 106][..])
    );
    let ids = tokenizer
        .encode("Once upon a time", EncodeOptions::PLAIN)
        .unwrap();
    assert_eq!(ids, [2, 14946, 3324, 496, 990]);

    // The file is the base model's and brings no template.
    assert!(model.template().is_fallback());
    let prompt = model
        .template()
        .render(&[Message::new("user", "Hi!")], true)
        .unwrap();
    assert_eq!(
        prompt,
        "<bos><start_of_turn>user\nHi!<end_of_turn>\n<start_of_turn>model\n"
    );
    let ids = tokenizer
        .encode(&prompt, EncodeOptions::RENDERED_CHAT)
        .unwrap();
    assert_eq!(ids, CHAT);
}

const GOLDEN: &[(&str, &[u32])] = &[
    ("Hello world", &[9259, 1902]),
    (" Hello  World", &[26352, 138, 14447]),
    (
        "I'm 12,345.67 years old",
        &[
            236777, 236789, 236757, 236743, 236770, 236778, 236764, 236800, 236812, 236810, 236761,
            236825, 236832, 1518, 2255,
        ],
    ),
    (
        "<h1>Title</h1>\n\n\n<b>bold</b>   x\t\ty",
        &[
            184, 7396, 191, 109, 200, 15640, 209, 139, 236781, 255969, 236762,
        ],
    ),
    (
        "def f(x):\n    return x + 1\n",
        &[
            2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 900, 236743, 236770, 107,
        ],
    ),
    (
        "naïve café — “quotes” …",
        &[1789, 238527, 560, 33443, 2192, 999, 52231, 236919, 7881],
    ),
    (
        "🦀🚀 日本語 привет ﷽",
        &[248714, 242015, 33375, 238582, 36097, 236743, 253375],
    ),
    (
        "\u{1}\u{2} \u{2003}x",
        &[249732, 241247, 236743, 464, 366, 369, 236781],
    ),
];

const CHAT: [u32; 11] = [2, 105, 2364, 107, 10979, 236888, 106, 107, 105, 4368, 107];
