//! The little of ONNX's protobuf format that a graph of ours needs (<https://onnx.ai/onnx/repo-docs/IR.html>).
//!
//! `ort::editor` would build the graph through ONNX Runtime's own calls, but a session made that way
//! (`CreateSessionFromModel`, up to 1.24 at least) never registers the custom operators of its options.

/// A model with one graph.
pub(crate) struct Model<'a> {
    /// Domains and their versions.
    pub(crate) opsets: &'a [(&'a str, u64)],
    pub(crate) nodes: Vec<Node>,
    pub(crate) input: Value<'a>,
    pub(crate) output: Value<'a>,
}

/// A node with one input, one output and integer attributes.
pub(crate) struct Node {
    pub(crate) operator: &'static str,
    pub(crate) domain: &'static str,
    pub(crate) name: String,
    pub(crate) input: String,
    pub(crate) output: String,
    pub(crate) attributes: Vec<(&'static str, u64)>,
}

/// A tensor that goes into or comes out of the graph.
pub(crate) struct Value<'a> {
    pub(crate) name: &'a str,
    pub(crate) element: Element,
    pub(crate) dims: Vec<Dim<'a>>,
}

/// Element types by their number in `TensorProto.DataType`.
#[derive(Clone, Copy)]
pub(crate) enum Element {
    F32 = 1,
    I32 = 6,
}

/// A dimension of a tensor.
pub(crate) enum Dim<'a> {
    Named(&'a str),
    Fixed(usize),
}

impl Model<'_> {
    /// The `ModelProto`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut model = Message::default();
        model.int(1, IR_VERSION).text(2, "hydramesh");
        let mut graph = Message::default();
        for node in &self.nodes {
            graph.message(1, node.encode());
        }
        graph.text(2, "stage");
        graph.message(11, self.input.encode());
        graph.message(12, self.output.encode());
        model.message(7, graph);
        for (domain, version) in self.opsets {
            let mut opset = Message::default();
            opset.text(1, domain).int(2, *version);
            model.message(8, opset);
        }
        model.0
    }
}

impl Node {
    fn encode(&self) -> Message {
        let mut node = Message::default();
        node.text(1, &self.input)
            .text(2, &self.output)
            .text(3, &self.name)
            .text(4, self.operator);
        for (name, value) in &self.attributes {
            let mut attribute = Message::default();
            attribute
                .text(1, name)
                .int(3, *value)
                .int(20, ATTRIBUTE_INT);
            node.message(5, attribute);
        }
        node.text(7, self.domain);
        node
    }
}

impl Value<'_> {
    fn encode(&self) -> Message {
        let mut shape = Message::default();
        for dim in &self.dims {
            let mut encoded = Message::default();
            match dim {
                Dim::Fixed(size) => encoded.int(1, *size as u64),
                Dim::Named(name) => encoded.text(2, name),
            };
            shape.message(1, encoded);
        }
        let mut tensor = Message::default();
        tensor.int(1, self.element as u64).message(2, shape);
        let mut ty = Message::default();
        ty.message(1, tensor);
        let mut value = Message::default();
        value.text(1, self.name).message(2, ty);
        value
    }
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn int(&mut self, field: u64, value: u64) -> &mut Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn text(&mut self, field: u64, text: &str) -> &mut Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(&mut self, field: u64, message: Message) -> &mut Self {
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
