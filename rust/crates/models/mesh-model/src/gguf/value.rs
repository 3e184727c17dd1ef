//! Metadata values, read in place.

use super::cursor::{Cursor, LENGTH_SIZE};
use super::error::GgufError;

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// All types in the order of their numbers in a file.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    /// The variants are declared in the order of their numbers.
    pub(super) fn id(self) -> u32 {
        self as u32
    }

    /// Bytes of one value, or `None` for strings and arrays.
    pub(super) fn fixed_size(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }
}

/// A metadata value, borrowed from the file.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum Value<'a> {
    /// Any of the unsigned types.
    Unsigned(u64),
    /// Any of the signed types.
    Signed(i64),
    /// Either of the float types.
    Float(f64),
    Bool(bool),
    /// Text as in the file, not checked to be UTF-8.
    String(&'a [u8]),
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    pub(super) fn read(cursor: &mut Cursor<'a>, ty: ValueType) -> Result<Self, GgufError> {
        Ok(match ty {
            ValueType::U8 => Value::Unsigned(cursor.bytes::<1>()?[0].into()),
            ValueType::U16 => Value::Unsigned(u16::from_le_bytes(cursor.bytes()?).into()),
            ValueType::U32 => Value::Unsigned(cursor.u32()?.into()),
            ValueType::U64 => Value::Unsigned(cursor.u64()?),
            ValueType::I8 => Value::Signed(i8::from_le_bytes(cursor.bytes()?).into()),
            ValueType::I16 => Value::Signed(i16::from_le_bytes(cursor.bytes()?).into()),
            ValueType::I32 => Value::Signed(i32::from_le_bytes(cursor.bytes()?).into()),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(cursor.bytes()?)),
            ValueType::F32 => Value::Float(f32::from_le_bytes(cursor.bytes()?).into()),
            ValueType::F64 => Value::Float(f64::from_le_bytes(cursor.bytes()?)),
            ValueType::Bool => Value::Bool(cursor.bytes::<1>()?[0] != 0),
            ValueType::String => Value::String(cursor.string()?),
            ValueType::Array => Value::Array(Array::read(cursor)?),
        })
    }

    /// The value, if it is a non-negative integer of any width.
    pub fn as_unsigned(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(v) => Some(v),
            Value::Signed(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    /// A short description for messages: the type and, where it is short, the value.
    pub fn describe(&self) -> String {
        match self {
            Value::Unsigned(v) => format!("the integer {v}"),
            Value::Signed(v) => format!("the integer {v}"),
            Value::Float(v) => format!("the float {v}"),
            Value::Bool(v) => format!("the bool {v}"),
            Value::String(v) if v.len() <= 64 => {
                format!("the string {:?}", String::from_utf8_lossy(v))
            }
            Value::String(v) => format!("a string of {} bytes", v.len()),
            Value::Array(a) => format!("an array of {} {:?}", a.len, a.element),
        }
    }
}

/// A metadata array, borrowed from the file. Elements are read when iterated over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Reads the array's header and steps over its elements, each of which is checked to lie within the file.
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, GgufError> {
        let id = cursor.u32()?;
        let element = ValueType::from_id(id).ok_or_else(|| cursor.unknown_type(id))?;
        let len = cursor.u64()?;
        let start = cursor.position();
        match element.fixed_size() {
            Some(size) => {
                let bytes = len.saturating_mul(size as u64);
                cursor.skip(bytes)?;
            }
            None if element == ValueType::Array => return Err(cursor.nested_array()),
            None => {
                // Each string takes at least its own length field: a lying count fails here and not after
                // hours.
                cursor.require(len.saturating_mul(LENGTH_SIZE))?;
                for _ in 0..len {
                    cursor.string()?;
                }
            }
        }
        Ok(Array {
            element,
            len: len as usize,
            bytes: cursor.since(start),
        })
    }

    /// Flags, a byte each.
    pub(crate) fn of_flags(flags: &'a [u8]) -> Self {
        Array {
            element: ValueType::Bool,
            len: flags.len(),
            bytes: flags,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if the array has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn element(&self) -> ValueType {
        self.element
    }

    /// The elements' bytes as they lie in the file.
    pub(super) fn raw(&self) -> &'a [u8] {
        self.bytes
    }

    /// Iterates over the elements.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        let element = self.element;
        (0..self.len).map_while(move |_| Value::read(&mut cursor, element).ok())
    }

    /// The elements, if they are strings.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a [u8]> + use<'a>> {
        if self.element != ValueType::String {
            return None;
        }
        let mut cursor = Cursor::new(self.bytes);
        Some((0..self.len).map_while(move |_| cursor.string().ok()))
    }

    /// The elements, if they are integers.
    pub fn integers(&self) -> Option<impl Iterator<Item = i64> + use<'a>> {
        match self.element {
            ValueType::F32
            | ValueType::F64
            | ValueType::String
            | ValueType::Array
            | ValueType::Bool => None,
            _ => Some(self.iter().map(|value| match value {
                Value::Unsigned(v) => i64::try_from(v).unwrap_or(i64::MAX),
                Value::Signed(v) => v,
                _ => 0,
            })),
        }
    }

    /// The elements, if they are floats.
    pub fn floats(&self) -> Option<impl Iterator<Item = f32> + use<'a>> {
        match self.element {
            ValueType::F32 | ValueType::F64 => Some(self.iter().map(|value| match value {
                Value::Float(v) => v as f32,
                _ => 0.0,
            })),
            _ => None,
        }
    }
}
