//! Reading the JSON files of an embedding model's folder, and invalid ones.

use mesh_model::EncoderError;
use mesh_model::encoder::{Activation, EncoderConfig, Pooling, Sentences, find, is_encoder};

const MINILM: &str = r#"{"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}"#;

fn minilm() -> EncoderConfig {
    EncoderConfig::parse(MINILM.as_bytes()).unwrap()
}

fn sentences(files: &[(&str, &str)]) -> Result<Sentences, EncoderError> {
    let read = |name: &str, _| {
        let file = files.iter().find(|(known, _)| *known == name);
        Ok(file.map(|(_, text)| text.as_bytes().to_vec()))
    };
    Sentences::parse(read, &minilm())
}

#[test]
fn a_shape_is_read_as_it_stands() {
    let config = minilm();
    assert_eq!((config.layers, config.hidden, config.heads), (6, 384, 12));
    assert_eq!((config.head_dim(), config.first_position), (32, 0));
    assert_eq!(config.activation, Activation::Gelu);
}

#[test]
fn robertas_positions_begin_behind_its_padding_token() {
    let text = MINILM
        .replace("\"bert\"", "\"xlm-roberta\"")
        .replace("_id\": 0", "_id\": 1");
    let config = EncoderConfig::parse(text.as_bytes()).unwrap();
    assert_eq!(config.first_position, 2);
    let read = |_: &str, _| Ok(None);
    assert_eq!(Sentences::parse(read, &config).unwrap().max_tokens, 510);
}

#[test]
fn what_is_wrong_with_a_shape_is_named() {
    for (from, to, named) in [
        ("\"bert\"", "\"llama\"", "llama"),
        ("\"gelu\"", "\"swish\"", "swish"),
        ("384", "0", "hidden_size"),
        ("384", "400", "12 heads over a width of 400"),
        (
            "\"num_hidden_layers\": 6",
            "\"num_hidden_layers\": 999999999999",
            "num_hidden_layers",
        ),
        ("\"num_hidden_layers\": 6,", "", "num_hidden_layers"),
        (
            "\"num_hidden_layers\": 6",
            "\"num_hidden_layers\": -6",
            "config.json",
        ),
        ("1e-12", "1e300", "layer_norm_eps"),
        (
            "\"pad_token_id\": 0",
            "\"position_embedding_type\": \"relative_key\"",
            "relative_key",
        ),
        ("{\"model", "[\"model", "config.json"),
    ] {
        let text = MINILM.replace(from, to);
        let error = EncoderConfig::parse(text.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{from} -> {to}: {error}");
    }
}

#[test]
fn a_folder_is_told_by_its_config() {
    let models = tempfile::tempdir().unwrap();
    let folder = models.path().join("small");
    std::fs::create_dir(&folder).unwrap();
    let dirs = [models.path().to_path_buf()];
    assert_eq!(find("small", &dirs), None);
    for (text, is) in [
        (MINILM.to_owned(), true),
        (MINILM.replace("\"bert\"", "\"llama\""), false),
        (
            MINILM.replace("\"pad_token_id\": 0", "\"is_decoder\": true"),
            false,
        ),
        ("\u{ff}".to_owned(), false),
        (" ".repeat(5 << 20) + MINILM, false),
    ] {
        std::fs::write(folder.join("config.json"), text).unwrap();
        assert_eq!(is_encoder(&folder), is);
        assert_eq!(find("small", &dirs), is.then(|| folder.clone()));
        let path = folder.to_str().unwrap();
        assert_eq!(find(path, &[]), is.then(|| folder.clone()));
    }
    assert_eq!(find("", &dirs), None);
}

const THREE: &str = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;

#[test]
fn pooling_length_and_prompts_are_as_the_folder_says() {
    let plain = sentences(&[]).unwrap();
    assert_eq!(
        (plain.pooling, plain.normalise, plain.max_tokens),
        (Pooling::Mean, false, 512)
    );
    let said = sentences(&[
        ("modules.json", THREE),
        ("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true}"#),
        ("sentence_bert_config.json", r#"{"max_seq_length": 256, "do_lower_case": true}"#),
        ("tokenizer_config.json", r#"{"model_max_length": 1000000000000000019884624838656}"#),
        (
            "config_sentence_transformers.json",
            r#"{"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": "query"}"#,
        ),
    ])
    .unwrap();
    assert_eq!(
        (said.pooling, said.normalise, said.max_tokens),
        (Pooling::Cls, true, 256)
    );
    assert!(said.lower_case);
    assert_eq!(said.prompt(None).unwrap(), "query: ");
    assert_eq!(said.prompt(Some("document")).unwrap(), "passage: ");
    let error = said.prompt(Some("title")).unwrap_err().to_string();
    assert!(error.contains("document, query"), "{error}");
    let unlimited = [("tokenizer_config.json", r#"{"model_max_length": 1e30}"#)];
    assert_eq!(sentences(&unlimited).unwrap().max_tokens, 512);
}

#[test]
fn a_folder_that_says_something_else_is_refused_by_name() {
    let pooling = |text| [("modules.json", THREE), ("1_Pooling/config.json", text)];
    let both = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#;
    for (files, named) in [
        (&pooling(both)[..], "cls with mean"),
        (&pooling(r#"{"pooling_mode": "lasttoken"}"#), "lasttoken"),
        (&pooling(r#"{"include_prompt": false}"#), "prompts"),
        (
            &[(
                "modules.json",
                &*THREE.replace("2_N", "x").replace("Normalize\"", "Dense\""),
            )],
            "Dense",
        ),
        (
            &[("modules.json", &*THREE.replace("1_Pooling", "../../etc"))],
            "no plain folder name",
        ),
        (&[("modules.json", "{}")], "modules.json"),
        (
            &[("sentence_bert_config.json", r#"{"max_seq_length": 0}"#)],
            "max_seq_length",
        ),
        (
            &[(
                "config_sentence_transformers.json",
                r#"{"default_prompt_name": "x"}"#,
            )],
            "\"x\"",
        ),
    ] {
        let error = sentences(files).unwrap_err().to_string();
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn no_text_becomes_a_control_token() {
    let folder = mesh_testkit::paths::minilm().unwrap();
    let model = mesh_model::EncoderModel::open(folder).unwrap();
    let inner = |text: &str| {
        let tokens = model.tokenise(text, None).unwrap().tokens;
        tokens[1..tokens.len() - 1].to_vec()
    };
    // [PAD], [CLS], [SEP], [MASK].
    let control = [0, 101, 102, 103];
    let whole = model.tokenise("a", None).unwrap().tokens;
    assert_eq!((whole[0], whole[whole.len() - 1]), (101, 102));
    for text in [
        "[SEP]",
        "[CLS] a [SEP] b",
        "a[SEP]b[MASK]",
        "[PAD][PAD]",
        "[sep] [ SEP ]",
    ] {
        let tokens = inner(text);
        assert!(!tokens.is_empty(), "{text}");
        assert!(
            !tokens.iter().any(|token| control.contains(token)),
            "{text}: {tokens:?}"
        );
    }
}
