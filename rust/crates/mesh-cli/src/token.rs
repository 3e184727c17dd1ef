//! `hydramesh token`: join tokens, from the head's admin API.

use std::path::{Path, PathBuf};

use mesh_client::http::{HttpClient, HttpError};
use serde_json::json;

use crate::args::TokenCommand;
use crate::failure::{Exit, Failure};
use crate::input;

pub(crate) async fn run(command: TokenCommand) -> Result<(), Failure> {
    let TokenCommand::Create {
        url,
        admin_key_file,
        state_dir,
        ttl,
        json: as_json,
    } = command;
    let (path, key) = admin_key(admin_key_file, &state_dir)?;
    let client = HttpClient::new(&url, Some(key))?;
    let mut body = json!({});
    if let Some(ttl) = ttl {
        body["ttl_seconds"] = ttl.as_secs().max(1).into();
    }
    let answer = match client.post("/v1/mesh/tokens", &body).await {
        Err(HttpError::Api {
            status: 401 | 403,
            message,
            ..
        }) => {
            return Err(Failure::new(Exit::Refused, message).hint(format!(
                "The key in {} is not this head's admin key.",
                path.display()
            )));
        }
        other => other?,
    };
    if as_json {
        println!("{answer}");
        return Ok(());
    }
    let token = answer["token"]
        .as_str()
        .ok_or_else(|| Failure::failed(format!("the head's answer has no token: {answer}")))?;
    println!("{token}");
    Ok(())
}

fn admin_key(file: Option<PathBuf>, state_dir: &Path) -> Result<(PathBuf, String), Failure> {
    let path = file.unwrap_or_else(|| state_dir.join("admin.key"));
    match input::key_file(&path) {
        Ok(key) => Ok((path, key)),
        Err(failure) => Err(Failure::new(Exit::Refused, failure.message).hint(
            "Run this on the head's machine as the user it runs as, or name its key with --admin-key-file \
             (HYDRAMESH_ADMIN_KEY_FILE) or its state folder with --state-dir.",
        )),
    }
}
