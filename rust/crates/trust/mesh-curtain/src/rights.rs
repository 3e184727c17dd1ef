//! Rights and tiers.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Something that a token allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Right {
    /// Chat and completions with models of this name; a trailing `*` stands for any rest.
    Infer(String),
    /// Embeddings.
    Embed,
    /// Images.
    Image,
    /// Administration of the mesh, join tokens included.
    Admin,
    /// Work for other meshes.
    Federate,
    /// Join tokens: making, listing, withdrawing.
    Join,
}

/// Something that is about to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need<'a> {
    /// Text from the model of this name.
    Infer(&'a str),
    /// Embeddings.
    Embed,
    /// Images.
    Image,
    /// Administration.
    Admin,
    /// Join tokens.
    Join,
    /// A view of the whole mesh: all models, or administration.
    Overview,
}

/// Rights without repetition, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Rights(BTreeSet<Right>);

/// How far a token is trusted; each tier has an audit chain of its own. Administration needs the highest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Everybody.
    #[default]
    GrimoirePublic,
    /// The operator's own people and services.
    Goodlife,
    /// Operators.
    Master,
}

/// A text that is not a right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RightError {
    /// No right has this name.
    #[error(
        "unknown right {0:?}: use infer:MODEL (a trailing * stands for any rest), embed, image, admin, federate or join"
    )]
    Unknown(String),
    /// The model's name cannot be one.
    #[error(
        "invalid model in the right {0:?}: use 1 to {LONGEST_MODEL} bytes without blanks, commas and control characters, \
         and * at the end only"
    )]
    Model(String),
}

/// A text that is not a tier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown tier {0:?}: use grimoire-public, goodlife or master")]
pub struct TierError(String);

impl Right {
    /// True if whoever has this right has that one, too.
    pub fn covers(&self, other: &Right) -> bool {
        match (self, other) {
            (Self::Infer(own), Self::Infer(other)) => match own.strip_suffix('*') {
                Some(prefix) => other.strip_suffix('*').unwrap_or(other).starts_with(prefix),
                None => own == other,
            },
            (own, other) => own == other,
        }
    }

    fn serves(&self, need: Need<'_>) -> bool {
        match (self, need) {
            (Self::Infer(own), Need::Infer(model)) => match own.strip_suffix('*') {
                Some(prefix) => model.starts_with(prefix),
                None => own == model,
            },
            (Self::Infer(own), Need::Overview) => own == "*",
            (Self::Admin, Need::Admin | Need::Join | Need::Overview)
            | (Self::Embed, Need::Embed)
            | (Self::Image, Need::Image)
            | (Self::Join, Need::Join) => true,
            _ => false,
        }
    }
}

impl Rights {
    /// Everything that an API key without an entry may do: all models, embeddings, images.
    pub fn of_clients() -> Self {
        [Right::Infer("*".to_owned()), Right::Embed, Right::Image]
            .into_iter()
            .collect()
    }

    /// Everything.
    pub fn all() -> Self {
        let more = [Right::Admin, Right::Federate, Right::Join];
        Self::of_clients().0.into_iter().chain(more).collect()
    }

    /// The rights in order.
    pub fn iter(&self) -> impl Iterator<Item = &Right> {
        self.0.iter()
    }

    /// Number of rights.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True without any right.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True if this right is among them by itself.
    pub fn contains(&self, right: &Right) -> bool {
        self.0.contains(right)
    }

    /// The first right of `other` that none of these covers.
    pub fn first_beyond<'a>(&self, other: &'a Rights) -> Option<&'a Right> {
        let covered = |right: &Right| self.iter().any(|own| own.covers(right));
        other.iter().find(|right| !covered(right))
    }

    /// True if these suffice.
    pub fn serve(&self, need: Need<'_>) -> bool {
        self.iter().any(|right| right.serves(need))
    }
}

impl FromIterator<Right> for Rights {
    fn from_iter<I: IntoIterator<Item = Right>>(rights: I) -> Self {
        Self(rights.into_iter().collect())
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Infer(model) => return write!(f, "infer:{model}"),
            Self::Embed => "embed",
            Self::Image => "image",
            Self::Admin => "admin",
            Self::Federate => "federate",
            Self::Join => "join",
        })
    }
}

impl FromStr for Right {
    type Err = RightError;

    fn from_str(text: &str) -> Result<Self, RightError> {
        if let Some(model) = text.strip_prefix("infer:") {
            let name = model.strip_suffix('*').unwrap_or(model);
            let is_bad = |c: char| c == '*' || c == ',' || c.is_control() || c.is_whitespace();
            if model.is_empty() || model.len() > LONGEST_MODEL || name.contains(is_bad) {
                return Err(RightError::Model(shown(text)));
            }
            return Ok(Self::Infer(model.to_owned()));
        }
        Ok(match text {
            "embed" => Self::Embed,
            "image" => Self::Image,
            "admin" => Self::Admin,
            "federate" => Self::Federate,
            "join" => Self::Join,
            _ => return Err(RightError::Unknown(shown(text))),
        })
    }
}

/// `infer:a,embed`
impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, right) in self.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{right}")?;
        }
        Ok(())
    }
}

impl FromStr for Rights {
    type Err = RightError;

    fn from_str(text: &str) -> Result<Self, RightError> {
        text.split(',').map(str::parse).collect()
    }
}

impl From<Rights> for String {
    fn from(rights: Rights) -> Self {
        rights.to_string()
    }
}

impl TryFrom<String> for Rights {
    type Error = RightError;

    fn try_from(text: String) -> Result<Self, RightError> {
        text.parse()
    }
}

impl fmt::Display for Need<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Infer(model) => return write!(f, "infer:{model}"),
            Self::Embed => "embed",
            Self::Image => "image",
            Self::Admin => "admin",
            Self::Join => "join",
            Self::Overview => "infer:*",
        })
    }
}

impl Tier {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GrimoirePublic => "grimoire-public",
            Self::Goodlife => "goodlife",
            Self::Master => "master",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Tier {
    type Err = TierError;

    fn from_str(text: &str) -> Result<Self, TierError> {
        let tiers = [Self::GrimoirePublic, Self::Goodlife, Self::Master];
        let found = tiers.into_iter().find(|tier| tier.as_str() == text);
        found.ok_or_else(|| TierError(shown(text)))
    }
}

/// The beginning of a text from outside, for a message.
pub(crate) fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Maximum bytes of a model's name, with the `*`.
const LONGEST_MODEL: usize = 128;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rights(text: &str) -> Rights {
        text.parse().unwrap()
    }

    #[test]
    fn rights_are_read_as_they_are_written() {
        let all = rights("infer:Qwen3*,infer:tiny,embed,image,admin,federate,join");
        assert_eq!(rights(&all.to_string()), all);
        assert_eq!(all.len(), 7);
        for bad in [
            "",
            "infer",
            "infer:",
            "infer:a*b",
            "infer:**",
            "infer:a b",
            "infer:a,b",
            "Embed",
            "root",
        ] {
            assert!(bad.parse::<Right>().is_err(), "{bad}");
        }
        let long = format!("infer:{}", "x".repeat(LONGEST_MODEL + 1));
        assert!(long.parse::<Right>().is_err());
        assert_eq!("goodlife".parse(), Ok(Tier::Goodlife));
        assert!("gold".parse::<Tier>().is_err());
    }

    #[test]
    fn a_right_serves_what_it_names_and_no_more() {
        let few = rights("infer:Qwen*,embed");
        assert!(few.serve(Need::Infer("Qwen3-0.6B")) && few.serve(Need::Embed));
        for need in [
            Need::Infer("qwen"),
            Need::Infer("SmolLM2"),
            Need::Image,
            Need::Admin,
            Need::Join,
            Need::Overview,
        ] {
            assert!(!few.serve(need), "{need}");
        }
        assert!(!rights("infer:tiny").serve(Need::Infer("tiny-2")));
        assert!(rights("infer:*").serve(Need::Overview));
        let admin = rights("admin");
        assert!(admin.serve(Need::Join) && admin.serve(Need::Overview) && admin.serve(Need::Admin));
        assert!(!admin.serve(Need::Infer("tiny")) && !rights("join").serve(Need::Admin));
    }

    proptest! {
        #[test]
        fn what_a_covered_pattern_serves_the_covering_one_serves(
            own in "[ab]{0,3}\\*?", other in "[ab]{0,3}\\*?", model in "[ab]{1,5}",
        ) {
            let (own, other) = (Right::Infer(own), Right::Infer(other));
            if own.covers(&other) && other.serves(Need::Infer(&model)) {
                prop_assert!(own.serves(Need::Infer(&model)));
            }
        }
    }
}
