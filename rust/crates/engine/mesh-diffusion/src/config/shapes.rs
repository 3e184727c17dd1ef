//! Names and shapes of a module's tensors.

/// A tensor of a module, as diffusers or transformers names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    /// Name within the module.
    pub name: String,
    /// Dimensions, the contiguous one last.
    pub shape: Vec<u64>,
}

/// Gathers the tensors of a module layer by layer.
#[derive(Debug, Default)]
pub(super) struct Shapes(Vec<TensorShape>);

impl Shapes {
    pub(super) fn add(&mut self, name: String, shape: &[u64]) {
        let shape = shape.into();
        self.0.push(TensorShape { name, shape });
    }

    /// A matrix and its bias.
    pub(super) fn linear(&mut self, name: &str, inputs: u64, outputs: u64) {
        self.matrix(name, inputs, outputs);
        self.add(format!("{name}.bias"), &[outputs]);
    }

    /// A matrix without bias.
    pub(super) fn matrix(&mut self, name: &str, inputs: u64, outputs: u64) {
        self.add(format!("{name}.weight"), &[outputs, inputs]);
    }

    /// A convolution with a square kernel and a bias.
    pub(super) fn conv(&mut self, name: &str, inputs: u64, outputs: u64, kernel: u64) {
        self.conv_without_bias(name, inputs, outputs, kernel);
        self.add(format!("{name}.bias"), &[outputs]);
    }

    pub(super) fn conv_without_bias(&mut self, name: &str, inputs: u64, outputs: u64, kernel: u64) {
        self.add(format!("{name}.weight"), &[outputs, inputs, kernel, kernel]);
    }

    /// Scale and shift of a norm.
    pub(super) fn norm(&mut self, name: &str, channels: u64) {
        self.add(format!("{name}.weight"), &[channels]);
        self.add(format!("{name}.bias"), &[channels]);
    }

    /// A residual block of two convolutions; `time` is the width of the timestep's embedding, where there is one.
    pub(super) fn resnet(&mut self, name: &str, inputs: u64, outputs: u64, time: Option<u64>) {
        self.norm(&format!("{name}.norm1"), inputs);
        self.conv(&format!("{name}.conv1"), inputs, outputs, 3);
        if let Some(time) = time {
            self.linear(&format!("{name}.time_emb_proj"), time, outputs);
        }
        self.norm(&format!("{name}.norm2"), outputs);
        self.conv(&format!("{name}.conv2"), outputs, outputs, 3);
        if inputs != outputs {
            self.conv(&format!("{name}.conv_shortcut"), inputs, outputs, 1);
        }
    }

    pub(super) fn done(self) -> Vec<TensorShape> {
        self.0
    }
}
