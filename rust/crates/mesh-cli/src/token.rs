//! `hydramesh token`: join tokens, from the head's admin API, and over the LAN to a machine that is to join.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use mesh_probe::join::HeadAddress;
use serde_json::{Value, json};

use crate::admin::Admin;
use crate::args::{HeadArgs, TokenCommand};
use crate::failure::{Exit, Failure};
use crate::pair::{self, Announced, Code, Gift, PairError};

pub(crate) async fn run(head: &HeadArgs, command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create { ttl, json: as_json } => {
            let answer = create(head, ttl).await?;
            if as_json {
                println!("{answer}");
            } else {
                println!("{}", text(&answer)?);
            }
            Ok(())
        }
        TokenCommand::Offer {
            patience,
            listen,
            head_port,
        } => offer(head, patience, listen, head_port).await,
        TokenCommand::Fetch { code, at } => blocking(move || fetch(code, at)).await,
    }
}

async fn create(head: &HeadArgs, ttl: Option<Duration>) -> Result<Value, Failure> {
    let admin = Admin::new(head)?;
    let mut body = json!({});
    if let Some(ttl) = ttl {
        body["ttl_seconds"] = ttl.as_secs().max(1).into();
    }
    admin.post("/v1/mesh/tokens", &body).await
}

fn text(answer: &Value) -> Result<&str, Failure> {
    answer["token"]
        .as_str()
        .ok_or_else(|| Failure::failed(format!("the head's answer has no token: {answer}")))
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
    let answer = create(head, Some(patience + TIME_TO_JOIN)).await?;
    let gift = Gift {
        token: text(&answer)?.to_owned(),
        port: head_port,
    };
    blocking(move || {
        let code = Code::random()?;
        let _announced = Announced::start(listener.local_addr()?.port())?;
        println!("{code}");
        eprintln!(
            "Type this code on the machine that is to join (live image: key c; else: hydramesh token fetch)."
        );
        let who = pair::offer(&listener, &code, &gift, patience)?;
        eprintln!("{who} has taken the token.");
        Ok(())
    })
    .await
}

fn fetch(code: Option<String>, at: Option<SocketAddr>) -> Result<(), PairError> {
    let code = match code {
        Some(code) => Code::parse(&code)?,
        None => {
            let mut typed = String::new();
            std::io::stdin().take(64).read_to_string(&mut typed)?;
            Code::parse(&typed)?
        }
    };
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
