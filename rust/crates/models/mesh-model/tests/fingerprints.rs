//! Fingerprints are names on the wire and on disk: the same files have the same one in every release.

use mesh_model::safetensors::Dtype;
use mesh_model::synth::{Shape, Tokens, random_model, write_folder, write_llama2c};
use mesh_model::{Architecture, EncoderModel, GgmlType, Model};
use mesh_testkit::paths::{gemma3, minilm, smollm2, stories};

fn fingerprint(path: &std::path::Path) -> String {
    let model = Model::open(path).unwrap();
    model.fingerprint().unwrap().to_owned()
}

#[test]
fn fingerprints_of_known_models_do_not_change() {
    let found = [smollm2(), gemma3()].map(|path| fingerprint(&path.unwrap()));
    assert_eq!(
        found,
        [
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ]
    );
    let encoder = EncoderModel::open(minilm().unwrap()).unwrap();
    assert_eq!(
        encoder.fingerprint("weights"),
        "001ef99e8a5a795271fe2bc71ee14926d948413d107a546779a3a1f3aeb93cf9"
    );
}

#[test]
fn fingerprints_of_made_folders_do_not_change() {
    let dir = tempfile::tempdir().unwrap();
    let stories = std::fs::read(stories().unwrap()).unwrap();
    write_llama2c(&stories, &dir.path().join("stories")).unwrap();
    let mut found = vec![fingerprint(&dir.path().join("stories"))];
    for (architecture, shards) in Architecture::ALL.into_iter().zip([1, 2, 3, 1]) {
        let file = dir.path().join("tiny.gguf");
        let shape = Shape::tiny(architecture);
        random_model(&shape, GgmlType::F16, Tokens::Bytes, &file).unwrap();
        let folder = dir.path().join(architecture.name());
        let model = Model::open(&file).unwrap();
        write_folder(&model, Dtype::BF16, shards, &folder).unwrap();
        found.push(fingerprint(&file));
        found.push(fingerprint(&folder));
    }
    assert_eq!(
        found,
        [
            "f3e8c5b9c601f0111a67ab8fda0cd0c74a9bc3fed7b167880f3147a138857141",
            "14d44f9971cc18457ac58f9403fe7423fa40ce6e3e0e6edb8abe1c8e6cfbfa93",
            "1b0d0d86e6199c1f0589356f6532d844a6cbd6bb9a77e8d6eed20b1a6622b4f5",
            "c69826eda607f13ada7d33d3442fd00ebde009ba314fdaa9a6f3e84ed815d8ed",
            "4d90c2417be3a0895b0aad72696b1b6bbf0f15b2c91fd0173e02c205b7a8fe0b",
            "5445bfbaca99cf3463f6ff219656985c372c9e28107cfca14a39f8b7502487fe",
            "79591fd3554b1a291a51c95d0904c7a067a80af6752569bfab49cc33c418e15d",
            "5924f2c657b80df775b405d01e18345b582eb5ea2b8f29a2e5746804b685b23a",
            "e593e0762183aa28b7cde83712b2014a345d760165b52c3cead54af5a16b5403",
        ]
    );
}
