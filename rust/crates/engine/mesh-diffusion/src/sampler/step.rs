//! A run of a sampler.

use super::SamplerError;
use super::config::{Prediction, SamplerKind};
use super::plan::{Levels, Plan, alpha_sigma};

/// A run: a plan, the latents, and what the next step needs of the steps before.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampler {
    pub(super) plan: Plan,
    /// Steps done.
    pub(super) step: u32,
    pub(super) latents: Vec<f32>,
    /// DPM-Solver++: the picture that the step before predicted.
    pub(super) before: Option<Vec<f32>>,
}

impl Sampler {
    /// A run from pure noise: normal numbers, one per latent.
    pub fn from_noise(plan: Plan, mut noise: Vec<f32>) -> Self {
        let sigma = plan.init_noise_sigma();
        noise.iter_mut().for_each(|x| *x *= sigma);
        Sampler {
            plan,
            step: 0,
            latents: noise,
            before: None,
        }
    }

    /// A run from the latents of a picture and normal numbers, of which the plan's strength decides the shares.
    ///
    /// # Errors
    /// If the two have different lengths.
    pub fn from_image(plan: Plan, image: &[f32], noise: &[f32]) -> Result<Self, SamplerError> {
        let latents = add_noise(&plan, 0, image, noise)?;
        Ok(Sampler {
            plan,
            step: 0,
            latents,
            before: None,
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Steps done.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// Timestep of the next prediction; `None` when all steps are done.
    pub fn timestep(&self) -> Option<f32> {
        self.plan.timesteps().get(self.step as usize).copied()
    }

    /// True if the next step takes fresh noise.
    pub fn takes_noise(&self) -> bool {
        self.step < self.plan.steps() && self.plan.takes_noise(self.step)
    }

    /// The latents, after the last step those of the picture.
    pub fn latents(&self) -> &[f32] {
        &self.latents
    }

    /// The latents as the model wants them for the next prediction.
    pub fn scaled(&self) -> Vec<f32> {
        let at = self.plan.begin + self.step as usize;
        match &self.plan.levels {
            Levels::Sigmas(sigmas) if self.plan.kind != SamplerKind::DpmPlusPlus2M => {
                let sigma = sigmas[at.min(sigmas.len() - 1)];
                let divisor = (sigma * sigma + 1.0).sqrt();
                self.latents.iter().map(|x| x / divisor).collect()
            }
            _ => self.latents.clone(),
        }
    }

    /// The picture's latents that a prediction for [`Sampler::scaled`] implies: as many values as `prediction` has, those of the
    /// run if all steps are done.
    pub fn predicted(&self, prediction: &[f32]) -> Vec<f32> {
        let at = self.plan.begin + self.step as usize;
        if self.step >= self.plan.steps() {
            return self.latents.clone();
        }
        match &self.plan.levels {
            Levels::Sigmas(sigmas) if self.plan.kind == SamplerKind::DpmPlusPlus2M => {
                self.mixed_picture(alpha_sigma(sigmas[at]), prediction)
            }
            Levels::Sigmas(sigmas) => self.picture(sigmas[at], prediction),
            Levels::Alphas { steps, .. } => {
                let (alpha, _) = steps[at];
                self.mixed_picture((alpha.sqrt(), (1.0 - alpha).sqrt()), prediction)
            }
        }
    }

    /// Takes the model's prediction for [`Sampler::scaled`] at [`Sampler::timestep`], and normal numbers if
    /// [`Sampler::takes_noise`].
    ///
    /// # Errors
    /// If an array is of the wrong length or missing, a number is not finite, or all steps are done. The run is then as
    /// before.
    pub fn advance(
        &mut self,
        prediction: &[f32],
        noise: Option<&[f32]>,
    ) -> Result<(), SamplerError> {
        let (step, steps, kind) = (self.step, self.plan.steps(), self.plan.kind);
        if step >= steps {
            return Err(SamplerError::Finished { steps });
        }
        self.check("the prediction", prediction)?;
        if !prediction.iter().all(|x| x.is_finite()) {
            let array = "predictions";
            return Err(SamplerError::NotFinite { array, step });
        }
        let noise = match (self.plan.takes_noise(step), noise) {
            (true, None) => return Err(SamplerError::NoNoise { step, kind }),
            (true, Some(noise)) => self.check("the noise", noise)?,
            (false, _) => &[],
        };
        let at = self.plan.begin + step as usize;
        let mut picture = None;
        let latents = match &self.plan.levels {
            Levels::Sigmas(sigmas) => match kind {
                SamplerKind::DpmPlusPlus2M => {
                    let (latents, of) = self.dpm(sigmas, at, prediction);
                    picture = Some(of);
                    latents
                }
                SamplerKind::EulerAncestral => {
                    self.euler_ancestral(sigmas[at], sigmas[at + 1], prediction, noise)
                }
                _ => self.euler(sigmas[at], sigmas[at + 1], prediction),
            },
            Levels::Alphas { steps, scaling } => match kind {
                SamplerKind::Lcm => {
                    let timestep = self.plan.timesteps[at] * scaling;
                    self.lcm(steps[at], timestep, prediction, noise)
                }
                _ => self.ddim(steps[at], prediction),
            },
        };
        if !latents.iter().all(|x| x.is_finite()) {
            let array = "latents";
            return Err(SamplerError::NotFinite { array, step });
        }
        self.latents = latents;
        self.before = picture;
        self.step += 1;
        Ok(())
    }

    /// Sets the latents that a mask keeps to those of `image` with as much of `noise` as they have now. `kept` has one value
    /// per latent: true is kept.
    ///
    /// # Errors
    /// If an array is of the wrong length.
    pub fn keep(
        &mut self,
        image: &[f32],
        noise: &[f32],
        kept: impl Fn(usize) -> bool,
    ) -> Result<(), SamplerError> {
        self.check("the picture", image)?;
        self.check("the noise", noise)?;
        let noisy = add_noise(&self.plan, self.step, image, noise)?;
        for (at, (latent, of)) in self.latents.iter_mut().zip(noisy).enumerate() {
            if kept(at) {
                *latent = of;
            }
        }
        Ok(())
    }

    fn check<'a>(&self, array: &'static str, values: &'a [f32]) -> Result<&'a [f32], SamplerError> {
        check_length(array, values, self.latents.len())
    }

    /// New latents, and the predicted picture.
    fn dpm(&self, sigmas: &[f32], at: usize, prediction: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (alpha_s, sigma_s) = alpha_sigma(sigmas[at]);
        let (alpha_t, sigma_t) = alpha_sigma(sigmas[at + 1]);
        let picture = self.mixed_picture((alpha_s, sigma_s), prediction);
        let lambda = |(alpha, sigma): (f32, f32)| alpha.ln() - sigma.ln();
        let lambda_s = lambda((alpha_s, sigma_s));
        // Infinite at the end, where sigma is 0: its exponential is then 0, and the picture is the result.
        let h = lambda((alpha_t, sigma_t)) - lambda_s;
        let ratio = sigma_t / sigma_s;
        let factor = alpha_t * ((-h).exp() - 1.0);
        let last = at + 1 == self.plan.timesteps.len();
        let latents = match &self.before {
            Some(before) if !last => {
                let h_0 = lambda_s - lambda(alpha_sigma(sigmas[at - 1]));
                let inverse = 1.0 / (h_0 / h);
                let half = 0.5 * factor;
                let pairs = picture.iter().zip(before);
                let both = self.latents.iter().zip(pairs);
                both.map(|(x, (now, before))| {
                    ratio * x - factor * now - half * (inverse * (now - before))
                })
                .collect()
            }
            _ => self.zip(&picture, |x, now| ratio * x - factor * now),
        };
        (latents, picture)
    }

    /// The picture that a prediction implies where latents are `alpha` of it and `sigma` of noise.
    fn mixed_picture(&self, (alpha, sigma): (f32, f32), prediction: &[f32]) -> Vec<f32> {
        match self.plan.prediction {
            Prediction::Epsilon => self.zip(prediction, |x, e| (x - sigma * e) / alpha),
            Prediction::VPrediction => self.zip(prediction, |x, v| alpha * x - sigma * v),
            Prediction::Sample => prediction.to_vec(),
        }
    }

    /// The picture that a prediction of Euler's samplers implies.
    fn picture(&self, sigma: f32, prediction: &[f32]) -> Vec<f32> {
        let square = sigma * sigma + 1.0;
        match self.plan.prediction {
            Prediction::Epsilon => self.zip(prediction, |x, e| x - sigma * e),
            Prediction::VPrediction => {
                let factor = -sigma / square.sqrt();
                self.zip(prediction, |x, v| v * factor + x / square)
            }
            Prediction::Sample => prediction.to_vec(),
        }
    }

    fn euler(&self, sigma: f32, next: f32, prediction: &[f32]) -> Vec<f32> {
        let picture = self.picture(sigma, prediction);
        let distance = next - sigma;
        self.zip(&picture, |x, of| x + (x - of) / sigma * distance)
    }

    fn euler_ancestral(
        &self,
        sigma: f32,
        next: f32,
        prediction: &[f32],
        noise: &[f32],
    ) -> Vec<f32> {
        let picture = self.picture(sigma, prediction);
        let (from, to) = (sigma * sigma, next * next);
        let up = (to * (from - to) / from).sqrt();
        let down = (to - up * up).max(0.0).sqrt();
        let distance = down - sigma;
        let mut latents = self.zip(&picture, |x, of| x + (x - of) / sigma * distance);
        for (x, noise) in latents.iter_mut().zip(noise) {
            *x += noise * up;
        }
        latents
    }

    fn ddim(&self, (alpha, after): (f32, f32), prediction: &[f32]) -> Vec<f32> {
        let (root, beta_root) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let (after_root, after_beta) = (after.sqrt(), (1.0 - after).sqrt());
        let clip = self.clip();
        let step = |picture: f32, noise: f32| after_root * clip(picture) + after_beta * noise;
        match self.plan.prediction {
            Prediction::Epsilon => self.zip(prediction, |x, e| step((x - beta_root * e) / root, e)),
            Prediction::VPrediction => self.zip(prediction, |x, v| {
                step(root * x - beta_root * v, root * v + beta_root * x)
            }),
            Prediction::Sample => {
                self.zip(prediction, |x, of| step(of, (x - root * of) / beta_root))
            }
        }
    }

    fn lcm(
        &self,
        (alpha, after): (f32, f32),
        timestep: f32,
        prediction: &[f32],
        noise: &[f32],
    ) -> Vec<f32> {
        const DATA: f32 = 0.5;
        let (root, beta_root) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let square = timestep * timestep + DATA * DATA;
        let (skip, out) = (DATA * DATA / square, timestep / square.sqrt());
        let clip = self.clip();
        let mix = |x: f32, picture: f32| out * clip(picture) + skip * x;
        let mut latents = match self.plan.prediction {
            Prediction::Epsilon => self.zip(prediction, |x, e| mix(x, (x - beta_root * e) / root)),
            Prediction::VPrediction => {
                self.zip(prediction, |x, v| mix(x, root * x - beta_root * v))
            }
            Prediction::Sample => self.zip(prediction, mix),
        };
        if !noise.is_empty() {
            let (after_root, after_beta) = (after.sqrt(), (1.0 - after).sqrt());
            for (x, noise) in latents.iter_mut().zip(noise) {
                *x = after_root * *x + after_beta * noise;
            }
        }
        latents
    }

    fn clip(&self) -> impl Fn(f32) -> f32 + Copy {
        let range = self.plan.clip.unwrap_or(f32::INFINITY).abs();
        move |x: f32| x.max(-range).min(range)
    }

    fn zip(&self, with: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
        let pairs = self.latents.iter().zip(with);
        pairs.map(|(&x, &of)| f(x, of)).collect()
    }
}

/// The picture with as much noise as latents have before step `step`.
fn add_noise(
    plan: &Plan,
    step: u32,
    image: &[f32],
    noise: &[f32],
) -> Result<Vec<f32>, SamplerError> {
    check_length("the noise", noise, image.len())?;
    let (of_image, of_noise) = plan.mixture(step);
    let pairs = image.iter().zip(noise);
    Ok(pairs.map(|(x, e)| of_image * x + of_noise * e).collect())
}

fn check_length<'a>(
    array: &'static str,
    values: &'a [f32],
    expected: usize,
) -> Result<&'a [f32], SamplerError> {
    let found = values.len();
    match found == expected {
        true => Ok(values),
        false => Err(SamplerError::Length {
            array,
            found,
            expected,
        }),
    }
}
