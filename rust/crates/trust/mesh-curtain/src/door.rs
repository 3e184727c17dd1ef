//! Accepting tokens.

use mesh_identity::{NodeId, PublicKey};

use crate::claims::{Claims, TokenId};
use crate::rights::{Rights, Tier};
use crate::token::{Token, TooWide, check_narrower};

/// A place at which tokens are shown.
#[derive(Clone, Copy, Debug)]
pub struct Door<'a> {
    /// Key of the mesh's issuer.
    pub issuer: &'a PublicKey,
    /// Name of the mesh.
    pub audience: &'a str,
    /// The tenant that a token has to be of; `None` for any.
    pub tenant: Option<&'a str>,
}

/// What an accepted token allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Ids of its links, from the issuer's on.
    pub ids: Vec<TokenId>,
    /// Customer or group that it was issued to.
    pub tenant: String,
    /// How far it is trusted.
    pub tier: Tier,
    /// Person or program that it is for.
    pub subject: String,
    /// What it allows.
    pub rights: Rights,
    /// End of the validity, seconds since the Unix epoch.
    pub expires: u64,
}

/// Reasons for not accepting a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It was not issued by this mesh.
    #[error("the token is of another issuer: {given:?}, and this mesh's is {expected:?}")]
    Issuer {
        /// Issuer that it names.
        given: String,
        /// Issuer of this mesh.
        expected: String,
    },
    /// A signature does not hold.
    #[error("the signature of link {0} of the token does not hold: the token was altered")]
    Signature(usize),
    /// A link does not follow from the one before it.
    #[error("link {0} of the token does not belong to the link before it")]
    Broken(usize),
    /// A link is wider than the one before it.
    #[error("link {number} of the token is too wide: {error}")]
    TooWide {
        /// Counted from 1.
        number: usize,
        /// In which respect.
        error: TooWide,
    },
    /// Its last link names a holder key.
    #[error(
        "the token {0} is for delegation only: its holder signs a narrower one with its key (`hydramesh token delegate`)"
    )]
    DelegationOnly(TokenId),
    /// It is for another mesh.
    #[error("the token is for the mesh {given:?}, and this is {expected:?}")]
    Audience {
        /// Mesh that it is for.
        given: String,
        /// This mesh.
        expected: String,
    },
    /// It is of another tenant.
    #[error("the token is of the tenant {given:?}, and this is for {expected:?}")]
    Tenant {
        /// Tenant of the token.
        given: String,
        /// Tenant that is asked for.
        expected: String,
    },
    /// Its validity has not begun.
    #[error(
        "the token {id} is not valid yet: its validity begins in {seconds} s; check the clocks"
    )]
    NotYet {
        /// Id of the token.
        id: TokenId,
        /// Time until it begins.
        seconds: u64,
    },
    /// Its validity has ended.
    #[error("the token {id} expired {seconds} s ago; ask for another")]
    Expired {
        /// Id of the token.
        id: TokenId,
        /// Time since its end.
        seconds: u64,
    },
    /// It, or one that it follows from, was revoked.
    #[error("the token {0} is revoked or was not issued here; ask for another")]
    Revoked(TokenId),
}

impl Door<'_> {
    /// Verifies a token at the time `now`, seconds since the Unix epoch. `is_revoked` is asked for every link, from the
    /// issuer's on, with its number from 0.
    ///
    /// # Errors
    /// [`Refusal`] if any link does not hold, or the token is not for this place.
    pub fn accept(
        &self,
        token: &Token,
        now: u64,
        is_revoked: impl Fn(usize, &TokenId) -> bool,
    ) -> Result<Grant, Refusal> {
        self.verify_chain(token)?;
        for (at, claims) in token.claims().enumerate() {
            let id = claims.id;
            if is_revoked(at, &id) {
                return Err(Refusal::Revoked(id));
            }
            if now < claims.not_before {
                let seconds = claims.not_before - now;
                return Err(Refusal::NotYet { id, seconds });
            }
            if now >= claims.expires {
                let seconds = now - claims.expires;
                return Err(Refusal::Expired { id, seconds });
            }
        }
        let last = token.claims().last().expect("a token has a link");
        if last.holder.is_some() {
            return Err(Refusal::DelegationOnly(last.id));
        }
        if last.audience != self.audience {
            return Err(Refusal::Audience {
                given: last.audience.clone(),
                expected: self.audience.to_owned(),
            });
        }
        if let Some(tenant) = self.tenant
            && last.tenant != tenant
        {
            return Err(Refusal::Tenant {
                given: last.tenant.clone(),
                expected: tenant.to_owned(),
            });
        }
        Ok(Grant {
            ids: token.claims().map(|claims| claims.id).collect(),
            tenant: last.tenant.clone(),
            tier: last.tier,
            subject: last.subject.clone(),
            rights: last.rights.clone(),
            expires: last.expires,
        })
    }

    /// Every link is signed by the one before it, the first by the issuer, and only narrows.
    fn verify_chain(&self, token: &Token) -> Result<(), Refusal> {
        let mut signer = self.issuer.clone();
        let mut before = None;
        for (at, link) in token.links().iter().enumerate() {
            let number = at + 1;
            let named: fn(&NodeId) -> String = match before {
                None => Claims::sanctum,
                Some(_) => Claims::holder,
            };
            let expected = named(&signer.node_id());
            if link.claims.issuer != expected {
                let given = link.claims.issuer.clone();
                return Err(Refusal::Issuer { given, expected });
            }
            if !link.is_signed_by(&signer) {
                return Err(Refusal::Signature(number));
            }
            let parent = before.map(|before: &crate::link::Link| before.digest());
            if link.claims.parent != parent {
                return Err(Refusal::Broken(number));
            }
            if let Some(before) = before {
                check_narrower(&before.claims, &link.claims)
                    .map_err(|error| Refusal::TooWide { number, error })?;
            }
            match &link.claims.holder {
                Some(holder) => signer = holder.clone(),
                None if number < token.links().len() => return Err(Refusal::Broken(number + 1)),
                None => {}
            }
            before = Some(link);
        }
        Ok(())
    }
}

impl Grant {
    /// Id of the token that was shown.
    pub fn id(&self) -> TokenId {
        *self.ids.last().expect("a token has a link")
    }

    /// Id of the token that the issuer made.
    pub fn issued_id(&self) -> TokenId {
        *self.ids.first().expect("a token has a link")
    }
}
