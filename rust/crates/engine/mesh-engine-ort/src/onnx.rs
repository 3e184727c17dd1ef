//! The little of ONNX's protobuf format that our graphs need (<https://onnx.ai/onnx/repo-docs/IR.html>).
//!
//! `ort::editor` would build the graph through ONNX Runtime's own calls, but a session made that way
//! (`CreateSessionFromModel`, up to 1.24 at least) never registers the custom operators of its options.

/// A model with one graph.
pub(crate) struct ModelProto<'a> {
    /// Domains and their versions.
    pub(crate) opsets: &'a [(&'a str, u64)],
    pub(crate) nodes: Vec<NodeProto>,
    /// Constant tensors of the graph.
    pub(crate) initializers: Vec<Initializer>,
    pub(crate) inputs: Vec<ValueInfo>,
    pub(crate) outputs: Vec<ValueInfo>,
}

/// A node of the graph: one operator with its inputs and outputs.
pub(crate) struct NodeProto {
    pub(crate) operator: &'static str,
    pub(crate) domain: &'static str,
    pub(crate) name: String,
    /// Names of values; an empty one is an optional input that is left out.
    pub(crate) inputs: Vec<String>,
    /// The same for outputs.
    pub(crate) outputs: Vec<String>,
    pub(crate) attributes: Vec<(&'static str, Attribute)>,
}

/// The value of an attribute.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Attribute {
    Int(i64),
    Float(f32),
}

/// A constant of the graph.
pub(crate) struct Initializer {
    pub(crate) name: String,
    pub(crate) element: ElementType,
    pub(crate) dims: Vec<usize>,
    /// Its bytes, little-endian; `None` if the session is given the tensor beside the model. A protobuf
    /// message cannot be larger than 2 GiB.
    pub(crate) data: Option<Vec<u8>>,
}

/// A tensor that goes into or comes out of the graph.
pub(crate) struct ValueInfo {
    pub(crate) name: String,
    pub(crate) element: ElementType,
    pub(crate) dims: Vec<Dim>,
}

/// Element types by their number in `TensorProto.DataType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ElementType {
    F32 = 1,
    U8 = 2,
    I32 = 6,
    I64 = 7,
    F16 = 10,
}

/// A dimension of a tensor.
pub(crate) enum Dim {
    Named(&'static str),
    Fixed(usize),
}

impl ModelProto<'_> {
    /// Encodes a `ModelProto`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut model = ProtoMessage::default();
        model.int(1, IR_VERSION).text(2, "hydramesh");
        let mut graph = ProtoMessage::default();
        for node in &self.nodes {
            graph.message(1, node.encode());
        }
        graph.text(2, "stage");
        for initializer in &self.initializers {
            graph.message(5, initializer.encode());
        }
        for input in &self.inputs {
            graph.message(11, input.encode());
        }
        for output in &self.outputs {
            graph.message(12, output.encode());
        }
        model.message(7, graph);
        for (domain, version) in self.opsets {
            let mut opset = ProtoMessage::default();
            opset.text(1, domain).int(2, *version);
            model.message(8, opset);
        }
        model.0
    }
}

impl NodeProto {
    fn encode(&self) -> ProtoMessage {
        let mut node = ProtoMessage::default();
        for input in &self.inputs {
            node.text(1, input);
        }
        for output in &self.outputs {
            node.text(2, output);
        }
        node.text(3, &self.name).text(4, self.operator);
        for (name, value) in &self.attributes {
            let mut attribute = ProtoMessage::default();
            attribute.text(1, name);
            match *value {
                // Negative numbers are two's complement of 64 bits.
                Attribute::Int(value) => attribute
                    .int(3, value.cast_unsigned())
                    .int(20, ATTRIBUTE_INT),
                Attribute::Float(value) => attribute.float(2, value).int(20, ATTRIBUTE_FLOAT),
            };
            node.message(5, attribute);
        }
        node.text(7, self.domain);
        node
    }
}

impl Initializer {
    fn encode(&self) -> ProtoMessage {
        let mut tensor = ProtoMessage::default();
        for dim in &self.dims {
            tensor.int(1, *dim as u64);
        }
        tensor.int(2, self.element as u64).text(8, &self.name);
        match &self.data {
            Some(bytes) => tensor.bytes(9, bytes),
            None => {
                let mut location = ProtoMessage::default();
                location.text(1, "location").text(2, "beside the model");
                tensor.message(13, location).int(14, LOCATION_EXTERNAL)
            }
        };
        tensor
    }
}

impl ValueInfo {
    fn encode(&self) -> ProtoMessage {
        let mut shape = ProtoMessage::default();
        for dim in &self.dims {
            let mut encoded = ProtoMessage::default();
            match dim {
                Dim::Fixed(size) => encoded.int(1, *size as u64),
                Dim::Named(name) => encoded.text(2, name),
            };
            shape.message(1, encoded);
        }
        let mut tensor = ProtoMessage::default();
        tensor.int(1, self.element as u64).message(2, shape);
        let mut ty = ProtoMessage::default();
        ty.message(1, tensor);
        let mut value = ProtoMessage::default();
        value.text(1, &self.name).message(2, ty);
        value
    }
}

/// A protobuf message under construction.
#[derive(Default)]
struct ProtoMessage(Vec<u8>);

impl ProtoMessage {
    fn int(&mut self, field: u64, value: u64) -> &mut Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.varint(field << 3 | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn text(&mut self, field: u64, text: &str) -> &mut Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(&mut self, field: u64, message: ProtoMessage) -> &mut Self {
        self.bytes(field, &message.0)
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) -> &mut Self {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// Version 10 of the format, which ONNX Runtime reads since 1.18.
const IR_VERSION: u64 = 10;
/// `AttributeProto.AttributeType.INT`.
const ATTRIBUTE_INT: u64 = 2;
/// `AttributeProto.AttributeType.FLOAT`.
const ATTRIBUTE_FLOAT: u64 = 1;
/// `TensorProto.DataLocation.EXTERNAL`.
const LOCATION_EXTERNAL: u64 = 1;
