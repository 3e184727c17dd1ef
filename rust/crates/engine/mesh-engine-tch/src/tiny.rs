//! The tiny autoencoder (TAESD): convolutions alone, a hundredth of the work.

use mesh_diffusion::config::TinyVaeConfig;
use tch::Tensor;

use crate::error::{Outcome, Within};
use crate::load::Params;
use crate::nn::{Conv, double, number};

/// A loaded tiny autoencoder.
#[derive(Debug)]
pub(crate) struct TinyVae {
    config: TinyVaeConfig,
    encoder: Vec<Layer>,
    decoder: Vec<Layer>,
}

#[derive(Debug)]
enum Layer {
    Conv(Conv),
    Relu,
    Block(Box<[Conv; 3]>),
    Double,
}

impl TinyVae {
    pub(crate) fn new(config: &TinyVaeConfig, params: &mut Params) -> Outcome<Self> {
        let mut encoder = Vec::new();
        for (i, &count) in config.encoder.iter().enumerate() {
            let name = format!("encoder.layers.{}", encoder.len());
            encoder.push(Layer::Conv(match i {
                0 => Conv::new(params, &name)?,
                _ => Conv::halving(params, &name, 1)?,
            }));
            blocks(params, "encoder", &mut encoder, count)?;
        }
        let name = format!("encoder.layers.{}", encoder.len());
        encoder.push(Layer::Conv(Conv::new(params, &name)?));

        let mut decoder = vec![
            Layer::Conv(Conv::new(params, "decoder.layers.0")?),
            Layer::Relu,
        ];
        for (i, &count) in config.decoder.iter().enumerate() {
            blocks(params, "decoder", &mut decoder, count)?;
            if i + 1 < config.decoder.len() {
                decoder.push(Layer::Double);
            }
            let name = format!("decoder.layers.{}", decoder.len());
            decoder.push(Layer::Conv(Conv::new(params, &name)?));
        }
        Ok(TinyVae {
            config: config.clone(),
            encoder,
            decoder,
        })
    }

    /// Pictures `[batch, 3, height, width]`, about -1 to 1, of the sampler's latents.
    pub(crate) fn decode(&self, latents: &Tensor) -> Outcome<Tensor> {
        // Limits the latents softly to ±3.
        let x = latents
            .f_div(&number(self.config.scale)?)?
            .f_div(&number(3.0)?)?
            .f_tanh()?
            .f_mul(&number(3.0)?)?;
        let x = run(&self.decoder, x).within("decoder")?;
        Ok(x.f_mul(&number(2.0)?)?.f_sub(&number(1.0)?)?)
    }

    /// The sampler's latents of pictures `[batch, 3, height, width]` from -1 to 1.
    pub(crate) fn encode(&self, pictures: &Tensor) -> Outcome<Tensor> {
        let x = pictures.f_add(&number(1.0)?)?.f_div(&number(2.0)?)?;
        let x = run(&self.encoder, x).within("encoder")?;
        Ok(x.f_mul(&number(self.config.scale)?)?)
    }
}

fn blocks(params: &mut Params, side: &str, layers: &mut Vec<Layer>, count: u32) -> Outcome<()> {
    for _ in 0..count {
        let name = format!("{side}.layers.{}.conv", layers.len());
        let mut conv = |i| Conv::new(params, &format!("{name}.{i}"));
        layers.push(Layer::Block(Box::new([conv(0)?, conv(2)?, conv(4)?])));
    }
    Ok(())
}

fn run(layers: &[Layer], mut x: Tensor) -> Outcome<Tensor> {
    for (i, layer) in layers.iter().enumerate() {
        x = layer.forward(&x).within(format_args!("layers.{i}"))?;
    }
    Ok(x)
}

impl Layer {
    fn forward(&self, x: &Tensor) -> Outcome<Tensor> {
        match self {
            Layer::Conv(conv) => conv.forward(x),
            Layer::Relu => Ok(x.f_relu()?),
            Layer::Double => double(x, None),
            Layer::Block(block) => {
                let [first, second, third] = &**block;
                let hidden = first.forward(x)?.f_relu_()?;
                let hidden = second.forward(&hidden)?.f_relu_()?;
                Ok(third.forward(&hidden)?.f_add_(x)?.f_relu_()?)
            }
        }
    }
}
