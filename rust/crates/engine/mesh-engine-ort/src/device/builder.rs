//! Building a graph node by node.

use ort::value::DynTensor;

use super::tensors::Precision;
use crate::onnx::{Attribute, ElementType, Initializer, NodeProto};
use crate::options::LoadError;

/// The nodes and constants of a graph; each method that adds a node returns the name of its output.
pub(super) struct GraphBuilder {
    precision: Precision,
    pub(super) nodes: Vec<NodeProto>,
    pub(super) initializers: Vec<Initializer>,
    /// Constants beside the model.
    pub(super) weights: Vec<(String, DynTensor)>,
    /// Bytes of the constants of floats.
    pub(super) bytes: u64,
}

impl GraphBuilder {
    pub(super) fn new(precision: Precision) -> Self {
        GraphBuilder {
            precision,
            nodes: Vec::new(),
            initializers: Vec::new(),
            weights: Vec::new(),
            bytes: 0,
        }
    }

    /// From f32 to the graph's precision.
    pub(super) fn narrow(&mut self, x: String) -> String {
        self.cast(x, self.precision.element())
    }

    /// From the graph's precision to f32.
    pub(super) fn widen(&mut self, x: String) -> String {
        self.cast(x, ElementType::F32)
    }

    fn cast(&mut self, x: String, to: ElementType) -> String {
        if self.precision == Precision::F32 {
            return x;
        }
        self.with("Cast", "", &[&x], vec![("to", Attribute::Int(to as i64))])
    }

    /// 0 in `shape` keeps that dimension, so that rows need not be known.
    pub(super) fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
        let shape = self.integers(shape);
        self.op("Reshape", "", &[x, &shape])
    }

    pub(super) fn op(
        &mut self,
        operator: &'static str,
        domain: &'static str,
        inputs: &[&str],
    ) -> String {
        self.with(operator, domain, inputs, Vec::new())
    }

    /// Adds a node and returns its output.
    pub(super) fn with(
        &mut self,
        operator: &'static str,
        domain: &'static str,
        inputs: &[&str],
        attributes: Vec<(&'static str, Attribute)>,
    ) -> String {
        let output = format!("{operator}.{}", self.nodes.len());
        self.node(operator, domain, inputs, &output, attributes);
        output
    }

    pub(super) fn node(
        &mut self,
        operator: &'static str,
        domain: &'static str,
        inputs: &[&str],
        output: &str,
        attributes: Vec<(&'static str, Attribute)>,
    ) {
        self.nodes.push(NodeProto {
            operator,
            domain,
            name: format!("{operator}.{}", self.nodes.len()),
            inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
            outputs: vec![output.to_owned()],
            attributes,
        });
    }

    /// A small constant of integers, inside the model.
    pub(super) fn integers(&mut self, numbers: &[i64]) -> String {
        let name = format!("integers{numbers:?}");
        if !self.initializers.iter().any(|other| other.name == name) {
            self.initializers.push(Initializer {
                name: name.clone(),
                element: ElementType::I64,
                dims: vec![numbers.len()],
                data: Some(numbers.iter().flat_map(|n| n.to_le_bytes()).collect()),
            });
        }
        name
    }

    /// A constant of the graph's precision.
    pub(super) fn numbers(
        &mut self,
        name: String,
        shape: &[usize],
        numbers: Vec<f32>,
    ) -> Result<String, LoadError> {
        self.add(self.precision, name, shape, numbers)
    }

    pub(super) fn add(
        &mut self,
        precision: Precision,
        name: String,
        shape: &[usize],
        numbers: Vec<f32>,
    ) -> Result<String, LoadError> {
        self.bytes += (numbers.len() * precision.bytes()) as u64;
        let tensor = precision.tensor(shape, numbers)?;
        self.constant(name.clone(), precision.element(), shape, tensor);
        Ok(name)
    }

    /// A constant beside the model.
    pub(super) fn constant(
        &mut self,
        name: String,
        element: ElementType,
        shape: &[usize],
        tensor: DynTensor,
    ) {
        self.initializers.push(Initializer {
            name: name.clone(),
            element,
            dims: shape.to_vec(),
            data: None,
        });
        self.weights.push((name, tensor));
    }
}
