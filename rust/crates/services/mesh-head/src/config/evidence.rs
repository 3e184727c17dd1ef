//! `[trust.evidence]`: requirements on the evidence of nodes.

use std::collections::BTreeMap;

use arcanum_attestor::{
    EvidencePolicy, Field, OnChange, SystemRule, TrustedKeyError, VersionError, is_store_path,
};
use mesh_tpm::PCRS;
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
    /// Refuse nodes whose evidence no TPM 2.0 vouches for with a quote.
    pub tpm: bool,
    /// Values of the TPM's registers (PCRs, SHA-256 bank) that are allowed: for the number of a register, a
    /// list of values in hexadecimal. Implies `tpm`.
    pub pcrs: BTreeMap<String, Vec<String>>,
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
            tpm: false,
            pcrs: BTreeMap::new(),
            on_change: OnChange::default(),
            watched: vec![
                Field::Os,
                Field::Architecture,
                Field::Hardware,
                Field::System,
                Field::Tpm,
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
    /// A register or a value of one.
    #[error(
        "trust.evidence.pcrs: {0}: give a number of {PCRS:?} with its values, each of 64 hexadecimal digits, as `hydramesh nodes show` prints them"
    )]
    Pcr(String),
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
            return Err(EvidenceFault::System(cut(path)));
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
            tpm: self.tpm,
            pcrs: self.pcrs()?,
            on_change: self.on_change,
            watched: self.watched.clone(),
        })
    }
}

impl EvidenceConfig {
    fn pcrs(&self) -> Result<BTreeMap<u8, Vec<String>>, EvidenceFault> {
        let fault = |text: &str| EvidenceFault::Pcr(format!("{:?}", cut(text)));
        let one = |(index, values): (&String, &Vec<String>)| {
            let number = index.parse::<u8>().ok();
            let number = number.filter(|number| PCRS.contains(number));
            let number = number.ok_or_else(|| fault(index))?;
            let is_digest = |value: &String| {
                value.len() == 64 && value.bytes().all(|byte| byte.is_ascii_hexdigit())
            };
            if values.is_empty() {
                return Err(fault(index));
            }
            if let Some(value) = values.iter().find(|value| !is_digest(value)) {
                return Err(fault(value));
            }
            let values = values.iter().map(|value| value.to_ascii_lowercase());
            Ok((number, values.collect()))
        };
        self.pcrs.iter().map(one).collect()
    }
}

fn cut(text: &str) -> String {
    text.chars().take(255).collect()
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
            ("pcrs = { \"23\" = [\"00\"] }", "\"23\": give a number"),
            ("pcrs = { \"7\" = [\"00\"] }", "\"00\": give a number"),
            ("pcrs = { \"7\" = [] }", "64 hexadecimal digits"),
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
