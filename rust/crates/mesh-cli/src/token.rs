//! `hydramesh token`: join tokens, from the head's admin API.

use serde_json::json;

use crate::admin::Admin;
use crate::args::{HeadArgs, TokenCommand};
use crate::failure::Failure;

pub(crate) async fn run(head: &HeadArgs, command: TokenCommand) -> Result<(), Failure> {
    let TokenCommand::Create { ttl, json: as_json } = command;
    let admin = Admin::new(head)?;
    let mut body = json!({});
    if let Some(ttl) = ttl {
        body["ttl_seconds"] = ttl.as_secs().max(1).into();
    }
    let answer = admin.post("/v1/mesh/tokens", &body).await?;
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
