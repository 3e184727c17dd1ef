//! The tiers of trails.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Levels of rights. Each has a trail of its own, so that the records of one can be shown without those of
/// the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Requests of clients without special rights.
    GrimoirePublic,
    /// Requests of clients of this tier.
    Goodlife,
    /// Administration, nodes, tokens and models, and requests of this tier.
    Master,
}

impl Tier {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::GrimoirePublic, Self::Goodlife, Self::Master];

    /// Its name, which is that of its folder.
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
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut tiers = Self::ALL.into_iter();
        let tier = tiers.find(|tier| tier.as_str() == text);
        tier.ok_or_else(|| format!("{text:?} is not a tier: grimoire-public, goodlife or master"))
    }
}
