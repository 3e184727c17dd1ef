//! Stages on ONNX Runtime: the graph built in memory, CPU kernels as custom operators.
