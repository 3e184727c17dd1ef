//! Models made to exhaust the reader: each is refused in little time, and all together take little memory.
//!
//! One test in a process of its own, so that the memory is that of nothing else.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use mesh_model::chat::{ChatTemplate, Message};
use mesh_model::safetensors::{Dtype, Safetensors};
use mesh_model::synth::{Shape, Tokens, random_model, write_folder};
use mesh_model::{Architecture, GgmlType, Gguf, Model};

/// The most memory that this process had resident, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// A file with these bytes at its beginning that is said to be so long, without taking that space.
fn sparse(path: &Path, beginning: &[u8], length: u64) {
    let mut file = File::create(path).unwrap();
    file.write_all(beginning).unwrap();
    file.set_len(length).unwrap();
}

/// Runs a case and says what came of it; panics if it took long.
fn within<T>(what: &str, limit: Duration, run: impl FnOnce() -> T) -> T {
    let (begun, before) = (Instant::now(), peak());
    let result = run();
    let (time, memory) = (begun.elapsed(), peak() - before);
    println!("{what}: {time:.1?}, {} MiB more than before", memory >> 20);
    assert!(time < limit, "{what} took {time:?}");
    result
}

#[test]
fn whatever_a_model_claims_time_and_memory_are_bounded() {
    const SECONDS: Duration = Duration::from_secs(10);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    let shape = Shape::tiny(Architecture::Llama);
    random_model(&shape, GgmlType::F16, Tokens::Bytes, &file).unwrap();
    let folder = dir.path().join("tiny");
    write_folder(&Model::open(&file).unwrap(), Dtype::BF16, 1, &folder).unwrap();
    let before = peak();
    let said = |what: &str| {
        let opened = within(what, SECONDS, || Model::open(&folder));
        opened.expect_err("hostile").to_string()
    };
    let original = |name: &str| fs::read(folder.join(name)).unwrap();

    let tokenizer = original("tokenizer.json");
    sparse(&folder.join("tokenizer.json"), b"{", 2 << 30);
    assert!(said("a tokenizer.json of 2 GiB").contains("over the limit of 67108864"));
    let mut vocab = String::from("{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{");
    for id in 0..1_000_000 {
        vocab += &format!("\"t{id}\":{id},");
    }
    fs::write(folder.join("tokenizer.json"), vocab + "\"x\":1}}}").unwrap();
    assert!(said("a tokenizer.json of a million tokens").contains("both have id 1"));
    fs::write(folder.join("tokenizer.json"), &tokenizer).unwrap();

    let weights = original("model.safetensors");
    sparse(
        &folder.join("model.safetensors"),
        &u64::MAX.to_le_bytes(),
        1 << 40,
    );
    assert!(
        said("a safetensors file of 1 TiB, all of it header")
            .contains("its header is said to have")
    );
    let header =
        br#"{"t":{"dtype":"F32","shape":[274877906943],"data_offsets":[0,1099511627772]}}"#;
    let mut beginning = (header.len() as u64).to_le_bytes().to_vec();
    beginning.extend_from_slice(header);
    let length = beginning.len() as u64 + 1_099_511_627_772;
    sparse(&folder.join("model.safetensors"), &beginning, length);
    assert!(said("a tensor of 1 TiB").contains("is missing"));
    let mut listed = String::from("{");
    for i in 0..65_536 {
        listed += &format!(
            "\"{i:0100}\":{{\"dtype\":\"U8\",\"shape\":[0,0,0,0,0,0,0,0],\"data_offsets\":[0,0]}},"
        );
    }
    listed.pop();
    let mut many = (listed.len() as u64 + 1).to_le_bytes().to_vec();
    many.extend_from_slice(listed.as_bytes());
    many.push(b'}');
    let opened = within("a header of 65,536 tensors", SECONDS, || {
        Safetensors::from_bytes(many)
    });
    assert!(opened.is_ok_and(|file| file.tensors().len() == 65_536));
    fs::write(folder.join("model.safetensors"), &weights).unwrap();

    let config = original("config.json");
    let lies = String::from_utf8(config.clone()).unwrap();
    let lies = lies.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4096");
    assert_ne!(lies.as_bytes(), config);
    fs::write(folder.join("config.json"), lies).unwrap();
    assert!(said("a config.json of 4096 layers").contains("model.layers.2."));
    fs::write(folder.join("config.json"), &config).unwrap();

    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend([u64::MAX.to_le_bytes(), u64::MAX.to_le_bytes()].concat());
    sparse(&file, &head, 1 << 40);
    let refused = within("a GGUF file of 2^64 tensors", SECONDS, || Gguf::open(&file));
    assert!(refused.unwrap_err().to_string().contains("over the limit"));

    for (what, source) in [
        (
            "a template that loops",
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        ),
        (
            "a template that calls itself",
            "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        ),
        (
            "a template that writes on",
            "{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}",
        ),
    ] {
        let template = ChatTemplate::new(source, "", "").unwrap();
        let message = Message::new("user", "x".repeat(10_000));
        let rendered = within(what, SECONDS, || template.render(&[message], true));
        println!("  {}", rendered.unwrap_err());
    }
    let more = peak() - before;
    println!("all: {} MiB", more >> 20);
    assert!(more < 640 << 20, "{} MiB", more >> 20);
    Model::open(&folder).expect("whole again");
}
