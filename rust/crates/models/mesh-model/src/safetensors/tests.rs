//! Safetensors files made here, whole and hostile.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn error(header: &str, data: usize) -> String {
    Safetensors::from_bytes(file(header, &vec![0; data]))
        .expect_err("hostile")
        .to_string()
}

fn tensor(name: &str, dtype: &str, shape: &str, begin: &str, end: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

fn plan(name: &str, dtype: Dtype, shape: &[u64]) -> Planned {
    Planned {
        name: name.into(),
        dtype,
        shape: shape.into(),
    }
}

#[test]
fn what_was_written_is_read_back() {
    let tensors = [
        plan("half", Dtype::F16, &[3]),
        plan("wide", Dtype::F32, &[2, 2]),
        plan("brain", Dtype::BF16, &[1, 2]),
        plan("none", Dtype::F32, &[0, 7]),
        plan("scalar", Dtype::I64, &[]),
    ];
    let mut bytes = Vec::new();
    write(&mut bytes, &tensors, |tensor, out| match &*tensor.name {
        "half" => [1.0, -2.0, 0.5]
            .iter()
            .try_for_each(|x| out.write_all(&half::f16::from_f32(*x).to_le_bytes())),
        "wide" => [1f32, 2.0, 3.0, 4.0]
            .iter()
            .try_for_each(|x| out.write_all(&x.to_le_bytes())),
        "brain" => [256f32, -1.0]
            .iter()
            .try_for_each(|x| out.write_all(&half::bf16::from_f32(*x).to_le_bytes())),
        "scalar" => out.write_all(&7i64.to_le_bytes()),
        _ => Ok(()),
    })
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    std::fs::write(&path, &bytes).unwrap();
    let file = Safetensors::open(&path).unwrap();
    assert_eq!(file.path(), Some(&*path));
    assert_eq!(file.file_len(), bytes.len() as u64);
    assert_eq!(file.metadata().collect::<Vec<_>>(), [("format", "pt")]);
    let floats = |name: &str| file.tensor(name).unwrap().to_f32().unwrap();
    assert_eq!(floats("half"), [1.0, -2.0, 0.5]);
    assert_eq!(floats("wide"), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(floats("brain"), [256.0, -1.0]);
    assert_eq!(floats("none"), [0f32; 0]);
    let scalar = file.tensor("scalar").unwrap();
    assert_eq!((scalar.elements(), scalar.shape.len()), (1, 0));
    assert!(scalar.to_f32().unwrap_err().to_string().contains("I64"));
    assert!(file.tensor("other").is_none());
    for tensor in file.tensors() {
        let at = tensor.offset as usize;
        assert_eq!(
            bytes[at..at + tensor.data.len()],
            *tensor.data.read().unwrap()
        );
    }
    file.check_unchanged().unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(file.check_unchanged().is_err());
}

#[test]
fn a_header_that_lies_about_its_length_is_refused() {
    let open = |bytes: Vec<u8>| Safetensors::from_bytes(bytes).unwrap_err().to_string();
    assert!(open(vec![]).contains("it has 0 bytes"));
    assert!(open(vec![1; 7]).contains("it has 7 bytes"));
    assert!(open(u64::MAX.to_le_bytes().to_vec()).contains("said to have 18446744073709551615"));
    let mut longer = file("{}", b"");
    longer[0] = 3;
    assert!(open(longer).contains("at most 2 can be"));
    // A file long enough for a header that no model needs.
    let mut huge = vec![b' '; 17 << 20];
    huge[..8].copy_from_slice(&((17u64 << 20) - 8).to_le_bytes());
    assert!(open(huge).contains("at most 16777216"));
    let mut shorter = file("{  }", b"");
    shorter[0] = 1;
    assert!(open(shorter).contains("malformed"));
}

#[test]
fn every_lie_about_a_tensor_is_named() {
    let one = |shape: &str, begin: &str, end: &str, data: usize| {
        error(
            &format!("{{{}}}", tensor("t", "F32", shape, begin, end)),
            data,
        )
    };
    assert!(
        one("[1]", "-4", "0", 4).contains("tensor \"t\""),
        "negative"
    );
    assert!(one("[1]", "0", "4e0", 4).contains("tensor \"t\""), "float");
    assert!(one("[1]", "4", "0", 4).contains("end before they begin"));
    assert!(one("[1]", "0", "8", 4).contains("only 4 bytes of data"));
    assert!(
        one("[4611686018427387904]", "0", "0", 0).contains("overflows"),
        "huge"
    );
    assert!(one("[4294967296,4294967296]", "0", "0", 0).contains("overflows"));
    assert!(one("[1]", "0", "18446744073709551616", 4).contains("tensor \"t\""));
    assert!(one("[2]", "0", "4", 4).contains("takes 8 bytes, but its data_offsets 0..4 hold 4"));
    assert!(one("[1]", "0", "4", 5).contains("1 bytes of data at offset 4 belong to no tensor"));
    assert!(one("[1,1,1,1,1,1,1,1,1]", "0", "4", 4).contains("at most 8 dimensions"));
    assert!(one("[-1]", "0", "4", 4).contains("tensor \"t\""));
    assert!(one("\"1\"", "0", "4", 4).contains("tensor \"t\""));

    let two = |a: String, b: String, data| error(&format!("{{{a},{b}}}"), data);
    let long = tensor("a", "F32", "[2]", "0", "8");
    assert!(
        two(long.clone(), tensor("b", "F32", "[1]", "4", "8"), 8)
            .contains("\"a\" and \"b\" overlap")
    );
    assert!(two(long.clone(), tensor("b", "F32", "[1]", "12", "16"), 16).contains("at offset 8"));
    assert!(two(long.clone(), long, 8).contains("\"a\" appears twice"));
    let odd = two(
        tensor("a", "U8", "[1]", "0", "1"),
        tensor("b", "F32", "[1]", "1", "5"),
        5,
    );
    assert!(odd.contains("no multiple of the 4 bytes"), "{odd}");

    assert!(
        error(
            r#"{"t":{"dtype":"F31","shape":[],"data_offsets":[0,0]}}"#,
            0
        )
        .contains("F31")
    );
    assert!(error(r#"{"t":{"dtype":"F32","shape":[1]}}"#, 4).contains("data_offsets"));
    assert!(
        error(
            r#"{"t":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":1}}"#,
            0
        )
        .contains("`x`")
    );
    assert!(error(r#"{"":{}}"#, 0).contains("a name has 0 bytes"));
    assert!(error(&format!(r#"{{"{}":{{}}}}"#, "n".repeat(600)), 0).contains("600 bytes"));
    assert!(error(r#"{"__metadata__":{"a":1}}"#, 0).contains("malformed"));
    assert!(error("[]", 0).contains("malformed"));
    assert!(error("{}x", 0).contains("malformed"));
}

#[test]
fn a_header_made_to_exhaust_the_reader_is_refused_at_once() {
    let begun = Instant::now();
    // Nested deeper than any stack.
    let deep = format!("{{\"t\":{}", "[".repeat(8 << 20));
    assert!(error(&deep, 0).contains("malformed"));
    let deep = format!("{{\"__metadata__\":{}", "{\"a\":".repeat(2 << 20));
    assert!(error(&deep, 0).contains("malformed"));
    let many: Vec<String> = (0..70_000)
        .map(|i| tensor(&i.to_string(), "U8", "[0]", "0", "0"))
        .collect();
    assert!(error(&format!("{{{}}}", many.join(",")), 0).contains("over 65536 tensors"));
    let dims = format!("[{}1]", "1,".repeat(4 << 20));
    assert!(
        error(&format!("{{{}}}", tensor("t", "U8", &dims, "0", "1")), 1).contains("dimensions")
    );
    assert!(begun.elapsed() < Duration::from_secs(10));
}

proptest! {
    #[test]
    fn any_bytes_are_a_file_or_an_error(header in ".{0,80}", data in proptest::collection::vec(any::<u8>(), 0..16)) {
        if let Ok(file) = Safetensors::from_bytes(file(&header, &data)) {
            let covered: usize = file.tensors().map(|tensor| tensor.data.len()).sum();
            prop_assert_eq!(covered, data.len());
        }
    }

    #[test]
    fn a_changed_byte_of_a_header_is_a_file_or_an_error(at in 8usize..120, byte in any::<u8>()) {
        let mut bytes = Vec::new();
        write(&mut bytes, &[plan("a", Dtype::F32, &[2]), plan("b", Dtype::F16, &[3])], |tensor, out| {
            out.write_all(&vec![0; tensor.bytes() as usize])
        }).unwrap();
        let at = at.min(bytes.len() - 15);
        bytes[at] = byte;
        if let Ok(file) = Safetensors::from_bytes(bytes) {
            for tensor in file.tensors() {
                prop_assert_eq!(tensor.elements() * tensor.dtype.size(), tensor.data.len() as u64);
            }
        }
    }
}
