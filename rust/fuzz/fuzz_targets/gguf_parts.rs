//! Whatever the parts of a split GGUF file say of themselves, together they are what they say or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::gguf::split::PartName;
use mesh_model::gguf::writer::{OwnedValue, Writer};
use mesh_model::{Checkpoint, GgmlType, Gguf};

/// A part's keys, if it has them, the names of its tensors, and a byte to overwrite.
type Part = (
    Option<u16>,
    Option<u16>,
    Option<i32>,
    Vec<u8>,
    Option<(u16, u8)>,
);

fuzz_target!(|input: (Vec<Part>, String)| {
    let (parts, name) = input;
    if let Some(part) = PartName::parse(&name) {
        let own = part.all().nth(part.number as usize - 1);
        assert_eq!(own.as_deref(), Some(&*name));
    }
    let count = parts.len() as u64;
    let parts = parts
        .into_iter()
        .map(|(number, count, all, tensors, fault)| {
            let mut writer = Writer::new();
            let numbers = [
                ("split.no", number.map(OwnedValue::U16)),
                ("split.count", count.map(OwnedValue::U16)),
                ("split.tensors.count", all.map(OwnedValue::I32)),
            ];
            for (key, value) in numbers {
                if let Some(value) = value {
                    writer.key(key, value);
                }
            }
            for name in tensors {
                writer.tensor(&name.to_string(), GgmlType::F32, &[1]);
            }
            let mut bytes = writer
                .to_bytes(|_, _, _| vec![0; 4])
                .expect("writing to memory does not fail");
            if let Some((at, value)) = fault {
                let at = usize::from(at) % bytes.len();
                bytes[at] = value;
            }
            bytes
        });
    let Ok(gguf) = Gguf::from_parts(parts.collect()) else {
        return;
    };
    assert_eq!(gguf.unsigned("split.count").expect("a number"), Some(count));
    let tensors = gguf.tensors();
    let declared = gguf.unsigned("split.tensors.count").expect("a number");
    assert_eq!(declared, Some(tensors.iter().len() as u64));
    for tensor in tensors.iter() {
        assert_eq!(
            tensor.ty.bytes_for(tensor.elements()),
            Some(tensor.data.len() as u64)
        );
    }
});
