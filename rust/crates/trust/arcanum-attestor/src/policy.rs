//! The head's policy on evidence, as a pure decision.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::evidence::{Change, Evidence, Field, System, Tpm};
use crate::narinfo::TrustedKey;

/// Requirements on the evidence of nodes, and the rule for changes. The default requires nothing and records.
#[derive(Clone, Debug, Default)]
pub struct EvidencePolicy {
    /// Refuse nodes without evidence. Any other requirement implies it.
    pub required: bool,
    /// Least version of HydraMesh.
    pub min_version: Option<Version>,
    /// Ids of the operating systems that are allowed; empty allows all.
    pub os: Vec<String>,
    /// Requirement on running NixOS systems.
    pub system: SystemRule,
    /// Store paths of systems that are allowed.
    pub systems: Vec<String>,
    /// Keys of binary caches whose signature allows a system.
    pub trusted_keys: Vec<TrustedKey>,
    /// Refuse nodes whose evidence no TPM vouches for.
    pub tpm: bool,
    /// Values of registers that are allowed, in hexadecimal. Registers that are not named may have any.
    pub pcrs: BTreeMap<u8, Vec<String>>,
    /// Rule for changes of watched fields.
    pub on_change: OnChange,
    /// Fields whose changes the rule is for. Evidence that is withheld after it was sent always is one.
    pub watched: Vec<Field>,
}

/// Requirement on the running NixOS system of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SystemRule {
    /// None, also other systems than NixOS.
    #[default]
    Any,
    /// Its store path is listed.
    Listed,
    /// Its narinfo is signed by a trusted key.
    Signed,
    /// One of the two.
    Either,
}

/// Rule for changes between two evidences of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnChange {
    /// The new evidence takes the place of the old one, without a record.
    Accept,
    /// The change is recorded.
    #[default]
    Record,
    /// The node waits until an operator has approved the change.
    Approve,
    /// The node is refused for as long as the change lasts.
    Refuse,
    /// The node is expelled.
    Expel,
}

/// A version of HydraMesh: three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version([u64; 3]);

/// The version is not one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no version: give it as 0.1.0")]
pub struct VersionError(String);

/// A requirement that a node does not meet. The texts are for the node's operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// There is no evidence.
    #[error(
        "evidence: the head requires it (`trust.evidence`), and this node sends none: update HydraMesh on this node, and leave `evidence = true` in its configuration"
    )]
    Missing,
    /// HydraMesh is too old.
    #[error(
        "version: {found:?} is not {least} or later (`trust.evidence.min_version` at the head): update HydraMesh on this node"
    )]
    Version {
        /// The node's version.
        found: String,
        /// The least version.
        least: Version,
    },
    /// The operating system is not allowed.
    #[error(
        "os: {found:?} is not one of {} (`trust.evidence.os` at the head): add it there, or use another system on this node",
        .allowed.join(", ")
    )]
    Os {
        /// The node's system.
        found: String,
        /// Those that are allowed.
        allowed: Vec<String>,
    },
    /// The running NixOS system is not allowed, or there is none.
    #[error(
        "system: {found:?} is not {} (`trust.evidence.system` at the head): {}",
        .rule.wanted(),
        .rule.remedy()
    )]
    System {
        /// Its store path; empty if the node names none.
        found: String,
        /// The requirement.
        rule: SystemRule,
    },
    /// No TPM vouches for it.
    #[error(
        "tpm: no quote, and the head requires one (`trust.evidence.tpm` or `pcrs`): turn the TPM 2.0 on in this machine's firmware, let the worker use /dev/tpmrm0, and leave `tpm = \"auto\"` in its configuration"
    )]
    Tpm,
    /// A register has another value than those that are allowed.
    #[error(
        "pcrs: register {index} is {found}, which is not allowed (`trust.evidence.pcrs` at the head): add it there, or start the system that was measured before on this node"
    )]
    Pcr {
        /// The register.
        index: u8,
        /// Its value; empty if it is not quoted.
        found: String,
    },
    /// The evidence has changed, and the policy refuses that.
    #[error(
        "{}: changed from {:?} to {:?}, and the head refuses changes (`trust.evidence.on_change`): undo the change on this node, or set `record` or `approve` there",
        .0.field.name(),
        .0.before,
        .0.after
    )]
    Changed(Change),
}

impl SystemRule {
    fn wanted(self) -> &'static str {
        match self {
            Self::Any => "a system",
            Self::Listed => "a NixOS system that the head lists",
            Self::Signed => "a NixOS system with a signature that the head trusts",
            Self::Either => "a NixOS system that the head lists or whose signature it trusts",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Any => "update the head",
            Self::Listed => "add the path to `trust.evidence.systems`",
            Self::Signed => {
                "sign it (`nix store sign`) with a key of `trust.evidence.trusted_keys`, and restart the worker"
            }
            Self::Either => {
                "add the path to `trust.evidence.systems`, or sign it (`nix store sign`) with a key of `trust.evidence.trusted_keys` and restart the worker"
            }
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

impl std::str::FromStr for Version {
    type Err = VersionError;

    /// A suffix behind a dash or plus does not count.
    fn from_str(text: &str) -> Result<Self, VersionError> {
        let error = || VersionError(text.chars().take(40).collect());
        let numbers = text.split(['-', '+']).next().unwrap_or_default();
        let mut parts = numbers.split('.').map(str::parse);
        let mut version = [0; 3];
        for number in &mut version {
            *number = parts.next().ok_or_else(error)?.map_err(|_| error())?;
        }
        match parts.next() {
            None => Ok(Self(version)),
            Some(_) => Err(error()),
        }
    }
}

impl EvidencePolicy {
    /// The requirements that are not met; none if the node may be a member.
    pub fn unmet(&self, evidence: Option<&Evidence>) -> Vec<Reason> {
        let Some(evidence) = evidence else {
            let requires = self.required
                || self.min_version.is_some()
                || !self.os.is_empty()
                || self.system != SystemRule::Any
                || self.requires_tpm();
            return requires.then_some(Reason::Missing).into_iter().collect();
        };
        let mut reasons = Vec::new();
        let version = evidence.version.parse::<Version>();
        if let Some(least) = self.min_version
            && version.map_or(true, |version| version < least)
        {
            let found = evidence.version.clone();
            reasons.push(Reason::Version { found, least });
        }
        if !self.os.is_empty() && !self.os.contains(&evidence.os) {
            reasons.push(Reason::Os {
                found: evidence.os.clone(),
                allowed: self.os.clone(),
            });
        }
        let system = evidence.system.as_ref();
        let listed = system.is_some_and(|system| self.lists(system));
        let signed = system.is_some_and(|system| self.trusts(system));
        let allowed = match self.system {
            SystemRule::Any => true,
            SystemRule::Listed => listed,
            SystemRule::Signed => signed,
            SystemRule::Either => listed || signed,
        };
        if !allowed {
            reasons.push(Reason::System {
                found: system.map_or_else(String::new, |system| system.path.clone()),
                rule: self.system,
            });
        }
        match &evidence.tpm {
            None if self.requires_tpm() => reasons.push(Reason::Tpm),
            None => {}
            Some(tpm) => reasons.extend(self.unmet_pcrs(tpm)),
        }
        reasons
    }

    fn requires_tpm(&self) -> bool {
        self.tpm || !self.pcrs.is_empty()
    }

    fn unmet_pcrs(&self, tpm: &Tpm) -> impl Iterator<Item = Reason> {
        let judged = self.pcrs.iter().map(|(index, allowed)| {
            let value = tpm.pcrs.iter().find(|(known, _)| known == index);
            let found = value.map_or_else(String::new, |(_, value)| value.clone());
            let index = *index;
            (!allowed.contains(&found)).then_some(Reason::Pcr { index, found })
        });
        judged.flatten()
    }

    /// Those of the changes that the rule for changes is for. A system that is listed or signed needs no other approval.
    pub fn watched_of(&self, changes: &[Change], later: &Evidence) -> Vec<Change> {
        let vouched = later.system.as_ref();
        let vouched = vouched.is_some_and(|system| self.lists(system) || self.trusts(system));
        let watched = changes.iter().filter(|change| {
            let is_watched =
                change.field == Field::Evidence || self.watched.contains(&change.field);
            // The first quote of a node pins its TPM.
            let pins = change.field == Field::Tpm && change.before.is_empty();
            is_watched && !pins && !(change.field == Field::System && vouched)
        });
        watched.cloned().collect()
    }

    fn lists(&self, system: &System) -> bool {
        self.systems.contains(&system.path)
    }

    /// The signatures were verified when the evidence came.
    fn trusts(&self, system: &System) -> bool {
        !system.signed_by.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::evidence::tests::{read, said};
    use crate::narinfo::tests::{SYSTEM, signed};

    /// Evidence of a NixOS machine whose system has this narinfo.
    fn nixos(narinfo: &str, keys: &[TrustedKey]) -> Evidence {
        let mut said = said();
        said.os = "nixos".into();
        said.system = Some(mesh_proto::NixSystem {
            path: SYSTEM.into(),
            nar_hash: String::new(),
            narinfo: narinfo.into(),
        });
        Evidence::read(&said.encode_to_vec(), keys).unwrap()
    }

    #[test]
    fn nothing_is_required_by_default() {
        let policy = EvidencePolicy::default();
        assert_eq!(policy.unmet(None), []);
        assert_eq!(policy.unmet(Some(&read(&said()).unwrap())), []);
    }

    #[test]
    fn each_requirement_names_its_field_the_value_and_the_remedy() {
        let debian = read(&said()).unwrap();
        let policy = EvidencePolicy {
            min_version: Some("0.2.0".parse().unwrap()),
            os: vec!["nixos".into()],
            system: SystemRule::Listed,
            ..EvidencePolicy::default()
        };
        let texts: Vec<String> = policy
            .unmet(Some(&debian))
            .iter()
            .map(ToString::to_string)
            .collect();
        let wanted = [
            ["version: \"0.1.0\"", "0.2.0 or later", "update HydraMesh"],
            ["os: \"debian\"", "nixos", "add it there"],
            ["system: \"\"", "the head lists", "trust.evidence.systems"],
        ];
        assert_eq!(texts.len(), wanted.len(), "{texts:?}");
        for (text, parts) in texts.iter().zip(wanted) {
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        // A node that withholds its evidence does not get around them.
        assert_eq!(policy.unmet(None), [Reason::Missing]);
        let required = EvidencePolicy {
            required: true,
            ..EvidencePolicy::default()
        };
        assert_eq!(required.unmet(None), [Reason::Missing]);
        assert_eq!(required.unmet(Some(&debian)), []);
    }

    #[test]
    fn a_system_is_allowed_by_its_path_or_by_the_signature_of_a_trusted_key() {
        let (narinfo, key) = signed(1);
        let (forged, _) = signed(2);
        let keys = [key];
        let local = nixos("", &keys);
        let good = nixos(&narinfo, &keys);
        let bad = nixos(&forged, &keys);
        assert_eq!(good.system.as_ref().unwrap().references, 2);
        for (rule, listed, allowed) in [
            (SystemRule::Any, false, [true, true, true]),
            (SystemRule::Listed, false, [false, false, false]),
            (SystemRule::Listed, true, [true, true, true]),
            (SystemRule::Signed, true, [false, true, false]),
            (SystemRule::Either, false, [false, true, false]),
            (SystemRule::Either, true, [true, true, true]),
        ] {
            let policy = EvidencePolicy {
                system: rule,
                systems: listed.then(|| SYSTEM.to_owned()).into_iter().collect(),
                trusted_keys: keys.to_vec(),
                ..EvidencePolicy::default()
            };
            let found = [&local, &good, &bad].map(|one| policy.unmet(Some(one)).is_empty());
            assert_eq!(found, allowed, "{rule:?} {listed}");
        }
    }

    #[test]
    fn the_narinfo_must_be_that_of_the_running_system() {
        let (narinfo, key) = signed(1);
        let mut said = said();
        let other = SYSTEM.replace("attic", "barn");
        for (path, hash) in [(&*other, ""), (SYSTEM, "sha256:00")] {
            said.system = Some(mesh_proto::NixSystem {
                path: path.into(),
                nar_hash: hash.into(),
                narinfo: narinfo.clone(),
            });
            let error = Evidence::read(&said.encode_to_vec(), std::slice::from_ref(&key));
            let error = error.unwrap_err().to_string();
            assert!(error.contains("narinfo"), "{error}");
        }
    }

    #[test]
    fn a_tpm_and_values_of_its_registers_can_be_required_and_the_first_quote_is_no_change() {
        let with = |key: &str, value: &str| Evidence {
            tpm: Some(Tpm {
                manufacturer: "IFX".to_owned(),
                key: key.to_owned(),
                algorithm: "ecdsa-p256".to_owned(),
                pcrs: vec![(7, value.to_owned())],
            }),
            ..read(&said()).unwrap()
        };
        let (bare, known) = (read(&said()).unwrap(), with("000ba", "01"));
        let policy = |tpm, pcrs: &[(u8, &str)]| EvidencePolicy {
            tpm,
            pcrs: (pcrs
                .iter()
                .map(|(index, value)| (*index, vec![(*value).to_owned()])))
            .collect(),
            watched: vec![Field::Tpm],
            ..EvidencePolicy::default()
        };
        for (policy, without, within) in [
            (policy(false, &[]), true, true),
            (policy(true, &[]), false, true),
            (policy(false, &[(7, "01")]), false, true),
            (policy(false, &[(7, "02")]), false, false),
            (policy(false, &[(7, "01"), (4, "01")]), false, false),
        ] {
            assert_eq!(policy.unmet(Some(&bare)).is_empty(), without, "{policy:?}");
            assert_eq!(policy.unmet(Some(&known)).is_empty(), within, "{policy:?}");
        }
        assert_eq!(policy(true, &[]).unmet(None), [Reason::Missing]);
        let watched = |before: &Evidence, after: &Evidence| {
            let changes = before.changes_to(after);
            let watched = policy(false, &[]).watched_of(&changes, after);
            let names = |changes: &[Change]| changes.iter().map(|one| one.field.name()).collect();
            let (all, watched): (Vec<&str>, Vec<&str>) = (names(&changes), names(&watched));
            (all, watched)
        };
        assert_eq!(watched(&bare, &known), (vec!["tpm"], vec![]));
        assert_eq!(watched(&known, &bare), (vec!["tpm"], vec!["tpm"]));
        let other = with("000bb", "02");
        assert_eq!(watched(&known, &other), (vec!["tpm"], vec!["tpm"]));
        let updated = with("000ba", "02");
        assert_eq!(watched(&known, &updated), (vec!["pcrs"], vec![]));
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let version = |text: &str| text.parse::<Version>();
        assert!(version("0.10.0").unwrap() > version("0.9.9").unwrap());
        assert_eq!(version("1.2.3-rc1"), version("1.2.3"));
        for bad in ["", "1", "1.2", "1.2.3.4", "a.b.c", "1.2.-3"] {
            assert!(version(bad).is_err(), "{bad:?}");
        }
        let policy = EvidencePolicy {
            min_version: version("0.1.0").ok(),
            ..EvidencePolicy::default()
        };
        let mut unknown = said();
        unknown.version = "newest".into();
        assert_eq!(policy.unmet(Some(&read(&unknown).unwrap())).len(), 1);
    }
}
