//! `hydramesh token inspect|delegate|holder-key`: tokens without a head.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::SystemTime;

use data_encoding::{BASE64, HEXLOWER};
use mesh_base::clock::{unix_seconds, utc_of};
use mesh_curtain::{Child, Claims, LONGEST_TEXT, PREFIX, Token};
use mesh_identity::IdentityKey;
use mesh_net::trust::JoinToken;

use crate::args::DelegateArgs;
use crate::failure::Failure;
use crate::keys::{lines, public_key};
use crate::output::plain;

/// Prints what a token says, without its secrets. Nothing is verified: only a head can do that.
pub(crate) fn inspect(path: &Path) -> Result<(), Failure> {
    let now = unix_seconds(SystemTime::now());
    print!("{}", described(text_of(path)?.trim(), now)?);
    Ok(())
}

/// Prints a narrower token.
pub(crate) fn delegate(args: DelegateArgs) -> Result<(), Failure> {
    let now = unix_seconds(SystemTime::now());
    let parent = parsed(text_of(&args.token)?.trim())?;
    let key = IdentityKey::load(&args.key).map_err(|error| Failure::usage(error.to_string()))?;
    let key = key.ok_or_else(|| {
        Failure::usage(format!(
            "the key file {} does not exist",
            args.key.display()
        ))
    })?;
    let last = parent.claims().last().expect("a token has a link").clone();
    let holder = args.holder_key.as_deref().map(public_key).transpose()?;
    let end = args
        .expires
        .map(|life| now.saturating_add(life.as_secs().max(1)));
    let child = Child {
        rights: match args.rights.is_empty() {
            true => last.rights,
            false => args.rights.into_iter().collect(),
        },
        tier: args.tier,
        subject: args.subject,
        not_before: now.max(last.not_before),
        expires: end.unwrap_or(last.expires),
        holder,
    };
    let token = parent.delegate(child, &key);
    let token = token
        .map_err(|error| Failure::failed(format!("the token cannot be narrowed so: {error}")))?;
    println!("{}", token.to_text());
    Ok(())
}

/// Makes a holder's key where there is none, and prints its public half.
pub(crate) fn holder_key(path: &Path) -> Result<(), Failure> {
    let key =
        IdentityKey::load_or_create(path).map_err(|error| Failure::failed(error.to_string()))?;
    println!("{}", BASE64.encode(key.public().as_bytes()));
    Ok(())
}

fn text_of(path: &Path) -> Result<String, Failure> {
    let failed = |error: io::Error| Failure::usage(format!("{}: {error}", path.display()));
    let mut text = String::new();
    let most = LONGEST_TEXT as u64 + 1024;
    match path == Path::new("-") {
        true => io::stdin().take(most).read_to_string(&mut text),
        false => File::open(path).and_then(|file| file.take(most).read_to_string(&mut text)),
    }
    .map_err(failed)?;
    Ok(text)
}

fn parsed(text: &str) -> Result<Token, Failure> {
    let failed = |error| Failure::failed(format!("the curtain token cannot be read: {error}"));
    Token::parse(text).map_err(failed)
}

fn described(text: &str, now: u64) -> Result<String, Failure> {
    if text.starts_with(PREFIX) {
        let token = parsed(text)?;
        let count = token.claims().count();
        let links = token.claims().enumerate();
        let links = links.map(|(at, claims)| link(at + 1, count, claims, now));
        return Ok(links.collect::<Vec<String>>().join("\n"));
    }
    let token: JoinToken = text.parse().map_err(|error| {
        Failure::failed(format!("neither a curtain token nor a join token: {error}"))
    })?;
    Ok(lines([
        (
            "kind",
            Some("join token: one or more workers join a mesh with it".to_owned()),
        ),
        ("id", Some(token.id())),
        ("mesh root", Some(HEXLOWER.encode(token.root_sha256()))),
        (
            "validity",
            Some("known to the head only: hydramesh token list".to_owned()),
        ),
    ]))
}

fn link(number: usize, count: usize, claims: &Claims, now: u64) -> String {
    let state = match (now < claims.not_before, now >= claims.expires) {
        (true, _) => "not valid yet",
        (_, true) => "expired",
        _ if claims.holder.is_some() => "for delegation only",
        _ => "within its dates; only the mesh's head knows if it is revoked",
    };
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    lines([
        (
            "kind",
            Some(format!("curtain token, link {number} of {count}")),
        ),
        ("id", Some(claims.id.to_string())),
        ("state", Some(state.to_owned())),
        ("mesh", Some(plain(&claims.audience))),
        ("tenant", Some(plain(&claims.tenant))),
        ("tier", Some(claims.tier.to_string())),
        ("rights", Some(plain(&claims.rights.to_string()))),
        ("subject", some(plain(&claims.subject))),
        ("valid from", Some(utc_of(claims.not_before))),
        ("expires", Some(utc_of(claims.expires))),
        ("issuer", Some(plain(&claims.issuer))),
        (
            "holder key",
            claims.holder.as_ref().map(|key| key.node_id().to_string()),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use mesh_curtain::{Tier, TokenId};

    use super::*;

    #[test]
    fn both_kinds_of_tokens_are_described_without_their_secrets() {
        let join = JoinToken::generate([0xab; 32]);
        let text = described(&join.to_string(), 0).unwrap();
        assert!(
            text.contains(&join.id()) && text.contains(&"ab".repeat(32)),
            "{text}"
        );
        assert!(!text.contains(&join.to_string()[50..]), "{text}");
        let key = IdentityKey::from_seed(&[1; 32]);
        let claims = Claims {
            issuer: String::new(),
            tenant: "lab".to_owned(),
            tier: Tier::Goodlife,
            subject: "anna".to_owned(),
            rights: "infer:Qwen*,embed".parse().unwrap(),
            audience: "home".to_owned(),
            not_before: 100,
            expires: 200,
            id: TokenId::random(),
            parent: None,
            holder: None,
        };
        let token = Token::issue(claims, &key).unwrap().to_text();
        let text = described(&token, 150).unwrap();
        for part in [
            "link 1 of 1",
            "lab",
            "goodlife",
            "infer:Qwen*,embed",
            "anna",
            "within its dates",
            "sanctum:",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(described(&token, 200).unwrap().contains("expired"));
        assert!(described("hydra-cap1.AAAA", 0).is_err() && described("sk-key", 0).is_err());
    }
}
