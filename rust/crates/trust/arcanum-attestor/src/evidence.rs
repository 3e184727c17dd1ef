//! Evidence as the head keeps it: bounded, checked text, and the differences between two of a node.

use mesh_net::trust::Vouched;
use mesh_proto::NixSystem;
use mesh_tpm::{QuoteError, Verified};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use crate::narinfo::{self, NarinfoError};
use crate::text::cut;

/// A node's statement about itself. Unknown parts are empty. Every text is one short line without control characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evidence {
    /// Version of HydraMesh.
    pub version: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Id of the operating system, as in /etc/os-release.
    pub os: String,
    /// Version of the operating system.
    pub os_version: String,
    /// Processor architecture.
    pub architecture: String,
    /// The processor's model.
    pub processor: String,
    /// Hardware threads.
    pub threads: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Graphics cards.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
    /// Id of the running boot.
    pub boot: String,
    /// Names and fingerprints of the models that it serves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<(String, String)>,
    /// The running NixOS system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<System>,
    /// Its TPM, by a quote that was verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Tpm>,
}

/// A TPM that signed a quote for this evidence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tpm {
    /// Its manufacturer, by the node's word.
    pub manufacturer: String,
    /// Name of the attestation key, in hexadecimal.
    pub key: String,
    /// Algorithm of that key.
    pub algorithm: String,
    /// Numbers and values, in hexadecimal, of the quoted registers of the SHA-256 bank.
    pub pcrs: Vec<(u8, String)>,
}

/// The running NixOS system of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct System {
    /// Its store path.
    pub path: String,
    /// Hash of the path, as its narinfo states it; else as the node computed it.
    pub nar_hash: String,
    /// Number of its direct references, by its narinfo.
    pub references: u32,
    /// Names of the trusted keys whose signature over the narinfo holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub signed_by: Vec<String>,
}

/// Reasons for refusing evidence whatever the policy says.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvidenceError {
    /// It is no evidence.
    #[error("it cannot be read: {0}")]
    Encoding(String),
    /// It is of a later version.
    #[error("it has form {0}, and this head knows form {FORM}: update the head")]
    Form(u32),
    /// A text is too long or not one line of text.
    #[error("its field `{0}` is not one line of at most {1} bytes without control characters")]
    Text(&'static str, usize),
    /// A list is too long.
    #[error("its field `{0}` has {1} entries, and {2} are the most")]
    Count(&'static str, usize, usize),
    /// The store path of the running system is not one.
    #[error("its field `system` is no store path of a system: {0:?}")]
    StorePath(String),
    /// The narinfo of the running system.
    #[error("the narinfo in its field `system`: {0}")]
    Narinfo(#[from] NarinfoError),
    /// The quote of the TPM.
    #[error("the quote of its TPM: {0}")]
    Quote(#[from] QuoteError),
}

/// A part of evidence. Its name is that in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Field {
    /// Evidence at all.
    Evidence,
    /// Version of HydraMesh.
    Version,
    /// Release of the kernel.
    Kernel,
    /// Operating system and its version.
    Os,
    /// Processor architecture.
    Architecture,
    /// Processor, threads, memory and graphics cards.
    Hardware,
    /// Models served.
    Models,
    /// The running NixOS system.
    System,
    /// The TPM, by its attestation key.
    Tpm,
    /// The TPM's registers.
    Pcrs,
}

/// A difference between two evidences of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The part that differs.
    pub field: Field,
    /// Its value before, cut.
    pub before: String,
    /// Its value now, cut.
    pub after: String,
}

impl Field {
    /// Name of the field, as in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Evidence => "evidence",
            Self::Version => "version",
            Self::Kernel => "kernel",
            Self::Os => "os",
            Self::Architecture => "architecture",
            Self::Hardware => "hardware",
            Self::Models => "models",
            Self::System => "system",
            Self::Tpm => "tpm",
            Self::Pcrs => "pcrs",
        }
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (field, before, after) = (self.field.name(), &self.before, &self.after);
        write!(f, "{field}: from {before:?} to {after:?}")
    }
}

impl Evidence {
    /// Reads evidence that a node vouches for, and verifies the quote beside it.
    ///
    /// # Errors
    /// [`EvidenceError`] names the field, or says why the quote does not hold.
    pub fn of(vouched: &Vouched<'_>, keys: &[narinfo::TrustedKey]) -> Result<Self, EvidenceError> {
        let quote = vouched.quote;
        let verified = quote.map(|quote| mesh_tpm::verify(quote, &vouched.digest));
        Ok(Self {
            tpm: verified.transpose()?.map(Tpm::from),
            ..Self::read(vouched.body, keys)?
        })
    }

    /// Reads evidence whose signature was verified. A narinfo counts as signed by those of `keys` whose signature holds.
    ///
    /// # Errors
    /// [`EvidenceError`] names the field.
    pub fn read(bytes: &[u8], keys: &[narinfo::TrustedKey]) -> Result<Self, EvidenceError> {
        let said = mesh_proto::Evidence::decode(bytes)
            .map_err(|error| EvidenceError::Encoding(error.to_string()))?;
        if said.form != FORM {
            return Err(EvidenceError::Form(said.form));
        }
        count("hardware", said.gpus.len(), MOST_GPUS)?;
        count("models", said.models.len(), MOST_MODELS)?;
        let gpus = said.gpus.into_iter().map(|gpu| text("hardware", gpu));
        let models = said.models.into_iter();
        let models = models.map(|model| {
            Ok((
                text("models", model.name)?,
                text("models", model.fingerprint)?,
            ))
        });
        let mut models: Vec<_> = models.collect::<Result<_, EvidenceError>>()?;
        models.sort_unstable();
        let system = said.system.map(|system| System::read(system, keys));
        Ok(Self {
            version: text("version", said.version)?,
            kernel: text("kernel", said.kernel)?,
            os: text("os", said.os)?,
            os_version: text("os", said.os_version)?,
            architecture: text("architecture", said.architecture)?,
            processor: text("hardware", said.processor)?,
            threads: said.threads,
            memory_mib: said.memory_mib,
            gpus: gpus.collect::<Result<_, _>>()?,
            boot: text("boot", said.boot)?,
            models,
            system: system.transpose()?,
            tpm: None,
        })
    }

    /// The fields in which a later evidence of the same node differs. The boot is not one of them, and neither is a little
    /// memory: the kernel's own share varies.
    pub fn changes_to(&self, later: &Self) -> Vec<Change> {
        let fields = [
            Field::Version,
            Field::Kernel,
            Field::Os,
            Field::Architecture,
            Field::Hardware,
            Field::Models,
            Field::System,
            Field::Tpm,
            Field::Pcrs,
        ];
        let differs = |field: &Field| match field {
            Field::Hardware => !self.has_hardware_of(later),
            // Which keys are trusted is the head's decision.
            Field::System => {
                let known = |evidence: &Self| {
                    let system = evidence.system.as_ref();
                    system.map(|system| (system.path.clone(), system.nar_hash.clone()))
                };
                known(self) != known(later)
            }
            Field::Models => self.models != later.models,
            Field::Tpm => self.tpm_key() != later.tpm_key(),
            // Those of another TPM, or of none, say nothing more.
            Field::Pcrs => self.tpm_key() == later.tpm_key() && self.pcrs() != later.pcrs(),
            field => self.value(*field) != later.value(*field),
        };
        let changed = fields.into_iter().filter(differs);
        let value = |evidence: &Self, other: &Self, field| match field {
            Field::Pcrs => evidence.pcrs_unlike(other),
            field => evidence.value(field),
        };
        let change = |field| Change {
            field,
            before: cut(&value(self, later, field)),
            after: cut(&value(later, self, field)),
        };
        changed.map(change).collect()
    }

    fn tpm_key(&self) -> Option<&str> {
        self.tpm.as_ref().map(|tpm| &*tpm.key)
    }

    fn pcrs(&self) -> &[(u8, String)] {
        self.tpm.as_ref().map_or(&[], |tpm| &tpm.pcrs)
    }

    /// The registers that the other evidence does not have with these values.
    fn pcrs_unlike(&self, other: &Self) -> String {
        let unlike = self.pcrs().iter().filter(|pcr| !other.pcrs().contains(pcr));
        pcr_text(unlike)
    }

    fn has_hardware_of(&self, other: &Self) -> bool {
        let parts = |evidence: &Self| {
            (
                evidence.processor.clone(),
                evidence.threads,
                evidence.gpus.clone(),
            )
        };
        let memory = self.memory_mib.abs_diff(other.memory_mib);
        parts(self) == parts(other) && memory <= self.memory_mib / MEMORY_TOLERANCE
    }

    /// The field as text; empty if it is not known.
    pub fn value(&self, field: Field) -> String {
        match field {
            Field::Evidence => String::new(),
            Field::Version => self.version.clone(),
            Field::Kernel => self.kernel.clone(),
            Field::Os => format!("{} {}", self.os, self.os_version).trim().to_owned(),
            Field::Architecture => self.architecture.clone(),
            Field::Hardware => {
                let mut parts = vec![
                    self.processor.clone(),
                    format!("{} threads", self.threads),
                    format!("{} MiB", self.memory_mib),
                ];
                parts.extend(self.gpus.iter().cloned());
                parts.join(", ")
            }
            Field::Models => {
                let models = self.models.iter().map(|(name, fingerprint)| {
                    let digits = fingerprint.chars().take(12).collect::<String>();
                    format!("{name} {digits}")
                });
                models.collect::<Vec<_>>().join(", ")
            }
            Field::System => self.system.as_ref().map_or_else(String::new, |system| {
                format!("{} {}", system.path, system.nar_hash)
                    .trim()
                    .to_owned()
            }),
            Field::Tpm => self.tpm.as_ref().map_or_else(String::new, |tpm| {
                format!("{} {} {}", tpm.manufacturer, tpm.algorithm, tpm.key)
            }),
            Field::Pcrs => pcr_text(self.pcrs().iter()),
        }
    }
}

/// Numbers and first digits.
fn pcr_text<'a>(pcrs: impl Iterator<Item = &'a (u8, String)>) -> String {
    let texts = pcrs.map(|(index, value)| {
        let digits: String = value.chars().take(12).collect();
        format!("{index}={digits}")
    });
    texts.collect::<Vec<_>>().join(" ")
}

impl From<Verified> for Tpm {
    fn from(verified: Verified) -> Self {
        Self {
            manufacturer: verified.manufacturer,
            key: verified.key,
            algorithm: verified.algorithm.name().to_owned(),
            pcrs: verified.pcrs,
        }
    }
}

impl System {
    fn read(said: NixSystem, keys: &[narinfo::TrustedKey]) -> Result<Self, EvidenceError> {
        let path = text("system", said.path)?;
        if !narinfo::is_store_path(&path) {
            return Err(EvidenceError::StorePath(path));
        }
        let nar_hash = text("system", said.nar_hash)?;
        if said.narinfo.is_empty() {
            return Ok(Self {
                path,
                nar_hash,
                ..Self::default()
            });
        }
        let info = narinfo::read(&said.narinfo)?;
        if info.path != path {
            return Err(NarinfoError::OtherPath(cut(&info.path)).into());
        }
        // A node without permission to read all of the path has none.
        if !nar_hash.is_empty() && nar_hash != info.nar_hash {
            return Err(NarinfoError::OtherHash {
                computed: nar_hash,
                stated: info.nar_hash,
            }
            .into());
        }
        Ok(Self {
            path,
            references: u32::try_from(info.references.len()).unwrap_or(u32::MAX),
            signed_by: info.signers(keys),
            nar_hash: info.nar_hash,
        })
    }
}

fn text(field: &'static str, text: String) -> Result<String, EvidenceError> {
    match text.len() > LONGEST_TEXT || text.contains(char::is_control) {
        true => Err(EvidenceError::Text(field, LONGEST_TEXT)),
        false => Ok(text),
    }
}

fn count(field: &'static str, count: usize, most: usize) -> Result<(), EvidenceError> {
    match count > most {
        true => Err(EvidenceError::Count(field, count, most)),
        false => Ok(()),
    }
}

/// Form of the evidence that this version reads.
const FORM: u32 = 1;
/// Maximum bytes of a text; store paths have up to 211.
const LONGEST_TEXT: usize = 255;
const MOST_GPUS: usize = 16;
const MOST_MODELS: usize = 32;
/// The part of the memory that does not count: a 32nd.
const MEMORY_TOLERANCE: u64 = 32;

#[cfg(test)]
pub(crate) mod tests {
    use mesh_proto::ServedFingerprint;
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn said() -> mesh_proto::Evidence {
        mesh_proto::Evidence {
            form: 1,
            version: "0.1.0".into(),
            kernel: "6.12.30".into(),
            os: "debian".into(),
            os_version: "12".into(),
            architecture: "x86_64".into(),
            processor: "Old CPU".into(),
            threads: 4,
            memory_mib: 7900,
            gpus: vec!["Nvidia 10de:2684".into()],
            boot: "b1".into(),
            models: vec![ServedFingerprint {
                name: "qwen".into(),
                fingerprint: "ab".repeat(32),
            }],
            system: None,
        }
    }

    pub(crate) fn read(said: &mesh_proto::Evidence) -> Result<Evidence, EvidenceError> {
        Evidence::read(&said.encode_to_vec(), &[])
    }

    #[test]
    fn hostile_evidence_is_refused_by_the_name_of_its_field() {
        read(&said()).expect("good");
        let long = "x".repeat(LONGEST_TEXT + 1);
        type Said = mesh_proto::Evidence;
        type Change<'a> = &'a dyn Fn(&mut Said);
        let cases: [(&str, Change<'_>); 9] = [
            ("kernel", &|said| said.kernel.clone_from(&long)),
            ("os", &|said| said.os = "debian\u{1b}[2J".into()),
            ("version", &|said| said.version = "0.1\n2".into()),
            ("hardware", &|said| {
                said.gpus = vec!["x".into(); MOST_GPUS + 1]
            }),
            ("hardware", &|said| said.gpus = vec!["\u{9b}31m".into()]),
            ("models", &|said| {
                said.models = vec![said.models[0].clone(); 33]
            }),
            ("models", &|said| said.models[0].name.push('\r')),
            ("update the head", &|said| said.form = 2),
            ("system", &|said| {
                said.system = Some(NixSystem {
                    path: "/nix/store/../etc".into(),
                    ..NixSystem::default()
                });
            }),
        ];
        for (name, change) in cases {
            let mut said = said();
            change(&mut said);
            let error = read(&said).expect_err(name).to_string();
            assert!(error.contains(name), "{name}: {error}");
            assert!(!error.contains('\u{1b}'), "{error:?}");
        }
        // A number where a text belongs.
        assert!(matches!(
            Evidence::read(&[0x08, 1, 0x10, 7], &[]),
            Err(EvidenceError::Encoding(_))
        ));
    }

    #[test]
    fn changes_are_named_with_both_values_and_a_boot_or_a_little_memory_is_none() {
        let before = read(&said()).unwrap();
        let mut same = said();
        same.boot = "b2".into();
        same.memory_mib += 40;
        assert_eq!(before.changes_to(&read(&same).unwrap()), []);
        let mut other = said();
        other.kernel = "6.18.1".into();
        other.memory_mib *= 2;
        other.models.clear();
        let changes = before.changes_to(&read(&other).unwrap());
        let fields: Vec<&str> = changes.iter().map(|change| change.field.name()).collect();
        assert_eq!(fields, ["kernel", "hardware", "models"]);
        assert_eq!(
            (&*changes[0].before, &*changes[0].after),
            ("6.12.30", "6.18.1")
        );
        assert_eq!(changes[2].before, "qwen abababababab");
        let kept = serde_json::to_string(&before).unwrap();
        assert_eq!(serde_json::from_str::<Evidence>(&kept).unwrap(), before);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn no_bytes_panic_and_no_control_character_is_kept(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            at: prop::sample::Index,
        ) {
            let mut changed = said().encode_to_vec();
            let at = at.index(changed.len());
            changed.splice(at..(at + bytes.len() / 8).min(changed.len()), bytes.iter().copied());
            for bytes in [&bytes, &changed] {
                if let Ok(evidence) = Evidence::read(bytes, &[]) {
                    let text = serde_json::to_string(&evidence).unwrap();
                    prop_assert!(!text.contains("\\u00"), "{}", text);
                }
            }
        }
    }
}
