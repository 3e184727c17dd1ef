//! Errors, with the part of the network in which they occurred.

use std::path::PathBuf;

use mesh_diffusion::checkpoint::ModelError;
use mesh_engine::StageError;
use tch::TchError;

use crate::options::{Device, Precision};

/// Reasons why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum LoadError {
    /// The files are not those of a model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device does not exist.
    #[error(
        "libtorch has no device {device}: it sees {count} GPUs; install a libtorch with CUDA or ROCm, or use cpu"
    )]
    NoDevice { device: Device, count: i64 },
    /// The device does not compute with the type.
    #[error("the device {device} does not compute with {precision:?}: {message}; use f32")]
    Precision {
        device: Device,
        precision: Precision,
        message: String,
    },
    /// A tiny autoencoder for latents of another kind.
    #[error(
        "{}: the tiny autoencoder has {tiny} channels of latents and the model {model}: use the one that is made for the model",
        path.display()
    )]
    TinyVae {
        path: PathBuf,
        tiny: u32,
        model: u32,
    },
    /// libtorch failed.
    #[error("loading the {module}: {message}")]
    Torch {
        module: &'static str,
        message: String,
    },
}

/// A failed operation and its place in the network.
#[derive(Debug)]
pub(crate) struct Failure {
    place: String,
    message: String,
}

pub(crate) type Outcome<T> = Result<T, Failure>;

impl From<TchError> for Failure {
    fn from(error: TchError) -> Self {
        let message = match error {
            TchError::Torch(message) => message,
            other => other.to_string(),
        };
        // The rest is the stack of libtorch's own functions.
        let first = message.lines().find(|line| !line.trim().is_empty());
        Failure {
            place: String::new(),
            message: first.unwrap_or("unknown error").trim().into(),
        }
    }
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Failure {
            place: String::new(),
            message: message.into(),
        }
    }

    pub(crate) fn message(&self) -> String {
        let Failure { place, message } = self;
        let place = if place.is_empty() {
            String::new()
        } else {
            format!("{place}: ")
        };
        match is_out_of_memory(message) {
            true => format!(
                "{place}out of memory ({message}); use a smaller picture, let the halves of guidance run in turn, or use a \
                 type of 16 bits"
            ),
            false => format!("{place}{message}"),
        }
    }
}

fn is_out_of_memory(message: &str) -> bool {
    [
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "bad_alloc",
    ]
    .iter()
    .any(|sign| message.contains(sign))
}

impl From<Failure> for StageError {
    fn from(failure: Failure) -> Self {
        StageError::Backend {
            backend: "libtorch",
            message: failure.message(),
        }
    }
}

impl From<LoadError> for StageError {
    fn from(error: LoadError) -> Self {
        StageError::Backend {
            backend: "libtorch",
            message: error.to_string(),
        }
    }
}

/// Names the place of a failure, from the inside out.
pub(crate) trait Within<T> {
    fn within(self, place: impl std::fmt::Display) -> Outcome<T>;
}

impl<T, E: Into<Failure>> Within<T> for Result<T, E> {
    fn within(self, place: impl std::fmt::Display) -> Outcome<T> {
        self.map_err(|error| {
            let mut failure = error.into();
            failure.place = match failure.place.is_empty() {
                true => place.to_string(),
                false => format!("{place}.{}", failure.place),
            };
            failure
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_block_from_the_outside_in() {
        let failed: Outcome<()> =
            Err(TchError::Torch("sizes differ\nframe #0: at::add".into()).into());
        let failure = failed
            .within("resnets.1")
            .within("up_blocks.0")
            .unwrap_err();
        assert_eq!(failure.message(), "up_blocks.0.resnets.1: sizes differ");
    }

    #[test]
    fn memory_that_ran_out_is_told_with_a_remedy() {
        let error = TchError::Torch("CUDA out of memory. Tried to allocate 2.00 GiB".into());
        let message = Failure::from(error).message();
        assert!(message.contains("use a smaller picture"), "{message}");
    }
}
