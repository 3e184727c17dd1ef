//! `[trust.evidence]`: requirements on the evidence of nodes.

use arcanum_attestor::{
    EvidencePolicy, Field, OnChange, SystemRule, TrustedKeyError, VersionError, is_store_path,
};
use serde::{Deserialize, Serialize};

/// `[trust.evidence]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvidenceConfig {
    /// Refuse nodes that send no evidence.
    pub required: bool,
    /// Least version of HydraMesh of a node, such as `0.1.0`.
    pub min_version: Option<String>,
    /// Ids of operating systems (`ID` in /etc/os-release) that are allowed; empty allows all.
    pub os: Vec<String>,
    /// Requirement on the running NixOS system: `any`, `listed` in `systems`, `signed` by one of `trusted_keys`, or `either`.
    pub system: SystemRule,
    /// Store paths of NixOS systems that are allowed.
    pub systems: Vec<String>,
    /// Public keys of binary caches whose signature allows a system, such as `cache.example.org-1:BASE64`.
    pub trusted_keys: Vec<String>,
    /// Effect of a change of a watched field: `accept`, `record`, `approve` (the node waits for an operator), `refuse` or
    /// `expel`.
    pub on_change: OnChange,
    /// Fields that `on_change` is for; changes of the others are recorded.
    pub watched: Vec<Field>,
}

impl Default for EvidenceConfig {
    fn default() -> Self {
        Self {
            required: false,
            min_version: None,
            os: Vec::new(),
            system: SystemRule::default(),
            systems: Vec::new(),
            trusted_keys: Vec::new(),
            on_change: OnChange::default(),
            watched: vec![
                Field::Os,
                Field::Architecture,
                Field::Hardware,
                Field::System,
            ],
        }
    }
}

/// A mistake in `[trust.evidence]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvidenceFault {
    /// The least version.
    #[error("trust.evidence.min_version: {0}")]
    Version(String),
    /// A key.
    #[error("trust.evidence.trusted_keys: {0}")]
    Key(String),
    /// A path.
    #[error(
        "trust.evidence.systems: {0:?} is no store path of a system: give what `readlink /run/current-system` prints"
    )]
    System(String),
    /// A rule that no system could meet.
    #[error(
        "trust.evidence.system = {rule:?} refuses every node while {list} is empty: fill it, or set \"any\""
    )]
    Unmeetable {
        /// The rule.
        rule: &'static str,
        /// The empty list.
        list: &'static str,
    },
}

impl EvidenceConfig {
    /// The policy.
    ///
    /// # Errors
    /// [`EvidenceFault`] names the key.
    pub fn policy(&self) -> Result<EvidencePolicy, EvidenceFault> {
        let min_version = self.min_version.as_deref().map(str::parse).transpose();
        let keys = self.trusted_keys.iter().map(|key| key.parse());
        if let Some(path) = self.systems.iter().find(|path| !is_store_path(path)) {
            return Err(EvidenceFault::System(path.chars().take(255).collect()));
        }
        let unmeetable = match self.system {
            SystemRule::Listed if self.systems.is_empty() => Some(("listed", "systems")),
            SystemRule::Signed if self.trusted_keys.is_empty() => Some(("signed", "trusted_keys")),
            SystemRule::Either if self.systems.is_empty() && self.trusted_keys.is_empty() => {
                Some(("either", "systems and trusted_keys"))
            }
            _ => None,
        };
        if let Some((rule, list)) = unmeetable {
            return Err(EvidenceFault::Unmeetable { rule, list });
        }
        Ok(EvidencePolicy {
            required: self.required,
            min_version: min_version
                .map_err(|error: VersionError| EvidenceFault::Version(error.to_string()))?,
            os: self.os.clone(),
            system: self.system,
            systems: self.systems.clone(),
            trusted_keys: keys
                .collect::<Result<_, _>>()
                .map_err(|error: TrustedKeyError| EvidenceFault::Key(error.to_string()))?,
            on_change: self.on_change,
            watched: self.watched.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Unsound};

    #[test]
    fn mistakes_in_the_policy_are_named_by_their_key() {
        let check = |text: &str| {
            let text = format!("[trust.evidence]\n{text}");
            toml_of(&text).check()
        };
        let good = "required = true\nmin_version = \"0.1.0\"\nos = [\"nixos\"]\nsystem = \"signed\"\n\
            trusted_keys = [\"cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=\"]\n\
            on_change = \"approve\"\nwatched = [\"os\", \"kernel\"]";
        assert_eq!(check(good), Ok(()));
        assert_eq!(check(""), Ok(()));
        for (text, part) in [
            ("min_version = \"new\"", "min_version"),
            ("trusted_keys = [\"x\"]", "trusted_keys"),
            ("systems = [\"/etc\"]", "readlink /run/current-system"),
            ("system = \"listed\"", "systems is empty"),
            ("system = \"signed\"", "trusted_keys is empty"),
            ("system = \"either\"", "refuses every node"),
        ] {
            match check(text) {
                Err(Unsound::Evidence(fault)) => {
                    assert!(fault.to_string().contains(part), "{fault}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    fn toml_of(text: &str) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("head.toml");
        std::fs::write(&path, text).unwrap();
        let loader = mesh_service::config::Loader::new("head");
        loader.file(&path).load().unwrap().value
    }
}
