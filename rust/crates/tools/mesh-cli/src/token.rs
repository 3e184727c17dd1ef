//! `hydramesh token`: join tokens, from the head's admin API, and over the LAN to a machine that is to join.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use mesh_api::{CreateTokenRequest, Token, TokenCreated, TokenList, TokenRequest, paths};
use mesh_machine::boot::join::HeadAddress;
use serde_json::Value;

use crate::admin::{Admin, print, read};
use crate::args::{HeadArgs, TokenCommand};
use crate::curtain;
use crate::failure::{Exit, Failure};
use crate::nodes::date;
use crate::output::{plain, table};
use crate::pair::{self, Announced, Code, Gift, PairError};

pub(crate) async fn run(head: &HeadArgs, command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create {
            ttl,
            nodes,
            role,
            note,
            json,
        } => {
            let request = CreateTokenRequest {
                // Heads of earlier versions know neither.
                nodes: (nodes != 1).then_some(nodes),
                role: (role != "worker").then_some(role),
                ..wanted(ttl, &note)
            };
            let answer: Value = Admin::new(head)?.post(paths::TOKENS, &request).await?;
            print(&answer, json, |created: TokenCreated| created.token + "\n")
        }
        TokenCommand::List { all, json } => {
            let answer = Admin::new(head)?.get(paths::TOKENS).await?;
            print(&answer, json, |list: TokenList| listed(&list.tokens, all))
        }
        TokenCommand::Revoke { id, json } => {
            let answer = revoke(head, id.clone()).await?;
            let shown = |_: Value| format!("The token {} is withdrawn.\n", plain(&id));
            print(&answer, json, shown)
        }
        TokenCommand::Offer {
            patience,
            listen,
            head_port,
        } => offer(head, patience, listen, head_port).await,
        TokenCommand::Fetch { code, at } => blocking(move || fetch(code, at)).await,
        TokenCommand::Inspect { token } => curtain::inspect(&token),
        TokenCommand::Delegate(args) => curtain::delegate(args),
        TokenCommand::HolderKey { key } => curtain::holder_key(&key),
    }
}

async fn create(head: &HeadArgs, ttl: Option<Duration>, note: &str) -> Result<Value, Failure> {
    let request = wanted(ttl, note);
    Admin::new(head)?.post(paths::TOKENS, &request).await
}

fn wanted(ttl: Option<Duration>, note: &str) -> CreateTokenRequest {
    CreateTokenRequest {
        ttl_seconds: ttl.map(|ttl| ttl.as_secs().max(1)),
        note: note.to_owned(),
        ..CreateTokenRequest::default()
    }
}

async fn revoke(head: &HeadArgs, id: String) -> Result<Value, Failure> {
    let admin = Admin::new(head)?;
    admin.post(paths::REVOKE_TOKEN, &TokenRequest { id }).await
}

/// The tokens as a table: the open ones, or all that the head remembers.
fn listed(tokens: &[Token], all: bool) -> String {
    let rows: Vec<Vec<String>> = tokens
        .iter()
        .filter(|token| all || token.state == "open")
        .map(|token| {
            let state = plain(&token.state);
            vec![
                plain(&token.id),
                match (&token.used_by, token.uses.len()) {
                    (_, 2..) => format!("{state} by {} nodes", token.uses.len()),
                    (Some(used), _) => format!("{state} by {}", plain(&used.name)),
                    (None, _) => state,
                },
                span(token.age_seconds),
                match token.state == "open" {
                    true => format!("in {}", span(token.expires_in_seconds)),
                    false => date(Some(token.expires_at)),
                },
                token.uses_left.to_string(),
                plain(&token.note),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "No token is open. `hydramesh token create` makes one.\n".to_owned();
    }
    table(&["ID", "STATE", "AGE", "ENDS", "USES LEFT", "NOTE"], &rows)
}

/// A span of time in its largest unit.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

async fn offer(
    head: &HeadArgs,
    patience: Duration,
    listen: SocketAddr,
    head_port: u16,
) -> Result<(), Failure> {
    if patience > LONGEST_OFFER {
        return Err(Failure::usage("an offer stands for at most 15m"));
    }
    // Before the token, which would be left over.
    let listener = TcpListener::bind(listen).map_err(|error| {
        Failure::failed(format!("listening on {listen}: {error}"))
            .hint("Another offer may be open; --listen takes another address.")
    })?;
    let answer = create(head, Some(patience + TIME_TO_JOIN), "offered by a code").await?;
    let created: TokenCreated = read(&answer)?;
    let gift = Gift {
        token: created.token,
        port: head_port,
    };
    let offered = blocking(move || {
        let code = Code::random();
        let _announced = Announced::start(listener.local_addr()?.port())?;
        println!("{code}");
        eprintln!(
            "Type this code on the machine that is to join (live image: key c; else: hydramesh token fetch)."
        );
        let who = pair::offer(&listener, &code, &gift, patience)?;
        eprintln!("{who} has taken the token.");
        Ok(())
    })
    .await;
    // No machine has the token of an offer that failed, so it can be withdrawn. An older head keeps it until
    // it ends.
    if offered.is_err() {
        let _ = revoke(head, created.id).await;
    }
    offered
}

fn fetch(code: Option<String>, at: Option<SocketAddr>) -> Result<(), PairError> {
    let code = match code {
        Some(code) => code,
        None => std::io::read_to_string(std::io::stdin().take(64))?,
    };
    let code = Code::parse(&code)?;
    let offers = match at {
        Some(address) => vec![vec![address]],
        None => pair::find(LONGEST_SEARCH)?,
    };
    let (address, gift) = pair::fetch_any(&offers, &code)?;
    let head = HeadAddress {
        host: address.ip().to_canonical().to_string(),
        port: gift.port,
    };
    println!("head={head}\ntoken={}", gift.token);
    Ok(())
}

async fn blocking(
    work: impl FnOnce() -> Result<(), PairError> + Send + 'static,
) -> Result<(), Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::failed(error.to_string()))?
        .map_err(|error| {
            let exit = match error {
                PairError::WrongCode | PairError::TooManyMisses => Exit::Refused,
                PairError::Expired => Exit::Timeout,
                PairError::NotFound => Exit::Unreachable,
                PairError::NoCode => Exit::Usage,
                _ => Exit::Failed,
            };
            Failure::new(exit, error.to_string())
        })
}

const LONGEST_OFFER: Duration = Duration::from_secs(15 * 60);
/// Remaining life of a token that is taken at the last moment.
const TIME_TO_JOIN: Duration = Duration::from_secs(60 * 60);
const LONGEST_SEARCH: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn open_tokens_are_listed_with_age_and_end_and_without_a_secret() {
        let token = |id: &str, state: &str, used_by: Value| {
            json!({"id": id, "note": "for the barn", "state": state, "age_seconds": 7_300, "expires_in_seconds": 90,
                "expires_at": 1_795_910_400, "uses_left": u32::from(state == "open"), "used_by": used_by})
        };
        let answer = json!({"tokens": [
            token("aa11", "open", Value::Null),
            token("bb22", "used", json!({"name": "attic"})),
            token("cc33", "expired", Value::Null),
        ]});
        let answer: TokenList = read(&answer).unwrap();
        let open = listed(&answer.tokens, false);
        for part in ["aa11", "2 h", "in 90 s", "for the barn", "USES LEFT"] {
            assert!(open.contains(part), "{part} is not in\n{open}");
        }
        assert!(!open.contains("bb22") && !open.contains("cc33"), "{open}");
        let all = listed(&answer.tokens, true);
        for part in ["aa11", "used by attic", "cc33", "2026-11-29"] {
            assert!(all.contains(part), "{part} is not in\n{all}");
        }
        assert!(listed(&[], true).contains("token create"));
    }
}
