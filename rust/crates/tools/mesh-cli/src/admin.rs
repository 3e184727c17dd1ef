//! The head's admin API: its key, and the meaning of its refusals.

use std::path::PathBuf;

use mesh_client::http::{HttpClient, HttpError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::args::HeadArgs;
use crate::ask;
use crate::failure::{Exit, Failure};
use crate::input;

/// Prints an answer: with `--json` itself, with fields of any version, else what `show` makes of it.
pub(crate) fn print<T: DeserializeOwned>(
    answer: &Value,
    as_json: bool,
    show: impl FnOnce(T) -> String,
) -> Result<(), Failure> {
    if as_json {
        println!("{answer}");
    } else {
        print!("{}", show(read(answer)?));
    }
    Ok(())
}

/// An answer in its type.
pub(crate) fn read<T: DeserializeOwned>(answer: &Value) -> Result<T, Failure> {
    let broken =
        |error| Failure::failed(format!("the head's answer {answer} is not valid: {error}"));
    T::deserialize(answer).map_err(broken)
}

/// A head, asked with its admin key.
pub(crate) struct Admin {
    client: HttpClient,
    key: PathBuf,
}

impl Admin {
    pub(crate) fn new(head: &HeadArgs) -> Result<Self, Failure> {
        let path = head.admin_key();
        let key = input::key_file(&path).map_err(|failure| {
            Failure::new(Exit::Refused, failure.message).hint(
                "Run this on the head's machine as the user it runs as, or name its key with --admin-key-file \
                 (HYDRAMESH_ADMIN_KEY_FILE) or its state folder with --state-dir.",
            )
        })?;
        Ok(Self {
            client: ask::head_client(head, Some(key))?,
            key: path,
        })
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let answer = self.client.get(path).await;
        answer.map_err(|error| self.explain(error))
    }

    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let answer = self.client.post(path, body).await;
        answer.map_err(|error| self.explain(error))
    }

    fn explain(&self, error: HttpError) -> Failure {
        let HttpError::Api {
            status, message, ..
        } = &error
        else {
            return error.into();
        };
        // Messages of the admin API name the remedy themselves.
        match status {
            // It names the right that the token lacks, or the setting that keeps others out.
            403 => Failure::new(Exit::Refused, message),
            401 => Failure::new(Exit::Refused, message).hint(format!(
                "The key in {} is not this head's admin key.",
                self.key.display()
            )),
            409 => Failure::failed(message),
            404 | 503 => Failure::new(Exit::NoWorker, message),
            _ => error.into(),
        }
    }
}
