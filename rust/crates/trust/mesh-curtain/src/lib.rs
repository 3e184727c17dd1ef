//! Curtain tokens: what a client may do, for how long, signed so that nobody can add to it.
//!
//! A [`Token`] is a chain of CBOR Web Tokens (RFC 8392) in COSE_Sign1 (RFC 9052), signed with ML-DSA-65 (RFC 9964). The
//! mesh's issuer, called Sanctum, signs the first link. A link that names a holder key is for delegation only: the holder
//! signs the next link, which can only narrow. The last link names no key, so that the recipient of a chain cannot use
//! the wider links before it.
//!
//! - [`Claims`] are the contents of a link, with [`Right`]s and a [`Tier`];
//! - [`Token::issue`] and [`Token::delegate`] sign, [`Token::parse`] reads;
//! - [`Door`] accepts a token at a place, or gives a [`Refusal`]; a [`Grant`] is what an accepted token allows;
//! - [`Ledger`] is the issuer's record of tokens and revocations.
//!
//! Issuing, delegating and accepting apply the same rules. Decoding is strict: each token has one encoding, and any other
//! is refused. Nothing here reads a clock, a file or a socket.

#![forbid(unsafe_code)]

mod claims;
mod door;
mod ledger;
mod link;
mod rights;
mod token;

pub use claims::{Claims, ClaimsError, TokenId, TokenIdError};
pub use door::{Door, Grant, Refusal};
pub use ledger::{Ledger, LedgerError, Record, Revoked};
pub use link::LinkError;
pub use rights::{Need, Right, RightError, Rights, Tier, TierError};
pub use token::{
    Child, DelegationError, LONGEST_TEXT, LONGEST_TOKEN, MOST_LINKS, PREFIX, Token, TokenError,
    TooWide,
};
