//! The header of a safetensors file, each field checked against the bytes that are there.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};

use super::dtype::Dtype;
use super::error::SafetensorsError;
use crate::file::ModelFile;

/// Bytes of the header's length.
pub(super) const LENGTH_SIZE: usize = 8;

// The format allows 100 MB; a tensor takes about 100 bytes, and the largest known models have a few thousand
// a file. The limits keep the index of a hostile file to a few tens of megabytes.
const MAX_HEADER: u64 = 16 << 20;
const MAX_TENSORS: usize = 1 << 16;
const MAX_NAME: usize = 512;
const MAX_DIMS: usize = 8;
const MAX_METADATA: usize = 1 << 12;

/// The pairs of text beside the tensors.
const METADATA: &str = "__metadata__";

/// Everything before the tensors' bytes.
#[derive(Debug)]
pub(super) struct Header {
    /// Tensors in the order of their data, which they cover without gap or overlap.
    pub(super) entries: Vec<HeaderEntry>,
    pub(super) metadata: Vec<(String, String)>,
    /// Position of the data section in the file.
    pub(super) data_start: usize,
}

/// A tensor, checked: its bytes lie in the data section and are as many as its shape asks for.
#[derive(Debug)]
pub(super) struct HeaderEntry {
    pub(super) name: Box<str>,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    /// Position in the data section.
    pub(super) at: usize,
    pub(super) len: usize,
}

pub(super) fn parse(bytes: &[u8], file: u64) -> Result<Header, SafetensorsError> {
    let length = length(bytes, file)?;
    let json = &bytes[LENGTH_SIZE..][..length];
    let data = file - (LENGTH_SIZE + length) as u64;
    let mut listed = Listed::default();
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let read = deserializer.deserialize_map(ListVisitor(&mut listed));
    // Blanks may pad the header.
    let read = read.and_then(|()| deserializer.end());
    if listed.too_many {
        return Err(SafetensorsError::TooManyTensors { limit: MAX_TENSORS });
    }
    read.map_err(|error| SafetensorsError::Header {
        message: error.to_string(),
    })?;
    Ok(Header {
        entries: place(listed.tensors, data)?,
        metadata: listed.metadata,
        data_start: LENGTH_SIZE + length,
    })
}

/// Reads the header of a file, without its tensors.
pub(super) fn read(file: &ModelFile) -> Result<Vec<u8>, SafetensorsError> {
    let mut head = Vec::new();
    file.lengthen(&mut head, file.len().min(LENGTH_SIZE as u64) as usize)?;
    let length = length(&head, file.len())?;
    file.lengthen(&mut head, LENGTH_SIZE + length)?;
    Ok(head)
}

/// Length of the JSON in a file of `file` bytes that begins with `bytes`.
fn length(bytes: &[u8], file: u64) -> Result<usize, SafetensorsError> {
    let Some((length, _)) = bytes.split_first_chunk::<LENGTH_SIZE>() else {
        return Err(SafetensorsError::NoHeader { length: file });
    };
    let length = u64::from_le_bytes(*length);
    let limit = MAX_HEADER.min(file - LENGTH_SIZE as u64);
    if length > limit {
        return Err(SafetensorsError::HeaderLength {
            header: length,
            limit,
        });
    }
    Ok(length as usize)
}

/// Checks every tensor by itself, then all of them together.
fn place(
    listed: Vec<(String, Description)>,
    data: u64,
) -> Result<Vec<HeaderEntry>, SafetensorsError> {
    let mut entries = Vec::with_capacity(listed.len());
    for (name, description) in listed {
        entries.push(place_one(name, description, data)?);
    }
    // Tensors without elements lie before what begins where they do.
    entries.sort_by_key(|entry| (entry.at, entry.len));
    let mut end = 0;
    for i in 0..entries.len() {
        let entry: &HeaderEntry = &entries[i];
        if entry.at < end {
            let before = &entries[..i];
            // The one that reaches farthest is the last one with any bytes.
            let first = before.iter().rev().find(|other| other.len > 0);
            return Err(SafetensorsError::Overlap {
                first: first.map_or_else(String::new, |other| other.name.to_string()),
                second: entry.name.to_string(),
            });
        }
        check_hole(end, entry.at)?;
        end = entry.at + entry.len;
    }
    check_hole(end, data as usize)?;
    Ok(entries)
}

fn check_hole(end: usize, next: usize) -> Result<(), SafetensorsError> {
    match next - end {
        0 => Ok(()),
        bytes => Err(SafetensorsError::Hole {
            at: end as u64,
            bytes: bytes as u64,
        }),
    }
}

fn place_one(
    tensor: String,
    description: Description,
    data: u64,
) -> Result<HeaderEntry, SafetensorsError> {
    let Description {
        dtype,
        shape: ShapeField(shape),
        data_offsets: [begin, end],
    } = description;
    let elements = shape
        .iter()
        .try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let Some(wanted) = elements.and_then(|elements| elements.checked_mul(dtype.size())) else {
        return Err(SafetensorsError::Shape {
            tensor,
            shape,
            reason: "the number of bytes overflows",
        });
    };
    if end < begin {
        return Err(SafetensorsError::Backwards { tensor, begin, end });
    }
    if end > data {
        return Err(SafetensorsError::OutsideFile {
            tensor,
            begin,
            end,
            data,
        });
    }
    if end - begin != wanted {
        return Err(SafetensorsError::Size {
            tensor,
            dtype,
            shape,
            wanted,
            begin,
            end,
            found: end - begin,
        });
    }
    if !begin.is_multiple_of(dtype.size()) {
        return Err(SafetensorsError::Misaligned {
            tensor,
            dtype,
            begin,
            size: dtype.size(),
        });
    }
    Ok(HeaderEntry {
        name: tensor.into(),
        dtype,
        shape,
        // Both lie within the file, whose length is a usize.
        at: begin as usize,
        len: wanted as usize,
    })
}

/// A tensor as the header describes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    dtype: Dtype,
    shape: ShapeField,
    data_offsets: [u64; 2],
}

/// Not more than a few numbers.
struct ShapeField(Vec<u64>);

impl<'de> Deserialize<'de> for ShapeField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = ShapeField;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMS} dimensions")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<ShapeField, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_DIMS {
                        return Err(de::Error::invalid_length(MAX_DIMS + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(ShapeField(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

#[derive(Default)]
struct Listed {
    tensors: Vec<(String, Description)>,
    metadata: Vec<(String, String)>,
    too_many: bool,
}

/// Reads the header's object entry by entry, so that a duplicate name is an error.
struct ListVisitor<'a>(&'a mut Listed);

impl<'de> Visitor<'de> for ListVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a description for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key_seed(NameSeed)? {
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(format!("{name:?} appears twice")));
            }
            if name == METADATA {
                map.next_value_seed(Metadata(&mut self.0.metadata))?;
                continue;
            }
            if self.0.tensors.len() == MAX_TENSORS {
                self.0.too_many = true;
                return Err(de::Error::custom("too many tensors"));
            }
            let description = map
                .next_value()
                .map_err(|error| de::Error::custom(format!("tensor {name:?}: {error}")))?;
            self.0.tensors.push((name, description));
        }
        Ok(())
    }
}

/// A name of reasonable length.
struct NameSeed;

impl<'de> DeserializeSeed<'de> for NameSeed {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        let name = String::deserialize(deserializer)?;
        match name.len() {
            1..=MAX_NAME => Ok(name),
            len => Err(de::Error::custom(format!(
                "a name has {len} bytes, from 1 to {MAX_NAME} can be"
            ))),
        }
    }
}

struct Metadata<'a>(&'a mut Vec<(String, String)>);

impl<'de> DeserializeSeed<'de> for Metadata<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Metadata<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{METADATA} as an object of text")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(pair) = map.next_entry()? {
            if self.0.len() == MAX_METADATA {
                return Err(de::Error::custom(format!(
                    "{METADATA} has over {MAX_METADATA} entries"
                )));
            }
            self.0.push(pair);
        }
        Ok(())
    }
}
