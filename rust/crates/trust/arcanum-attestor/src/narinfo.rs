//! The narinfo of a NixOS system: its fields, and signatures of binary caches over them.

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use data_encoding::BASE64;
use narinfo::NarInfo;

use crate::text::cut;

/// A public key of a binary cache, in the form `cache.nixos.org-1:BASE64`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedKey {
    name: String,
    key: [u8; 32],
}

/// The key is not one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no public key of a binary cache: give it as `cache.example.org-1:BASE64`, as `nix key convert-secret-to-public` prints it"
)]
pub struct TrustedKeyError(String);

/// Reasons for refusing a narinfo.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NarinfoError {
    /// It is too long.
    #[error("it has {0} bytes, and {LONGEST_NARINFO} are the most")]
    Length(usize),
    /// It is none.
    #[error("it is no narinfo: {0}")]
    Form(String),
    /// It is that of another path.
    #[error("it is that of {0:?}")]
    OtherPath(String),
    /// It states another hash than the node computed.
    #[error(
        "it states {stated}, and the path on the node's disk has {computed}: repair it with `nix-store --verify-path`"
    )]
    OtherHash {
        /// The node's hash.
        computed: String,
        /// The hash in the narinfo.
        stated: String,
    },
}

/// The fields of a narinfo that its signatures cover, and those.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) path: String,
    pub(crate) nar_hash: String,
    nar_size: usize,
    /// Names in the store, sorted.
    pub(crate) references: Vec<String>,
    /// Names of keys, and signatures in base64.
    signatures: Vec<(String, String)>,
}

impl std::str::FromStr for TrustedKey {
    type Err = TrustedKeyError;

    fn from_str(text: &str) -> Result<Self, TrustedKeyError> {
        let unfit = || TrustedKeyError(text.chars().take(120).collect());
        let (name, key) = text.split_once(':').ok_or_else(unfit)?;
        let key = BASE64.decode(key.as_bytes()).map_err(|_| unfit())?;
        let key = key.try_into().map_err(|_| unfit())?;
        let is_name = !name.is_empty() && !name.contains(|c: char| c.is_control() || c == ' ');
        is_name.then_some(()).ok_or_else(unfit)?;
        Ok(Self {
            name: name.to_owned(),
            key,
        })
    }
}

/// Reads a narinfo. Its URL and the file behind it do not matter here, and lines of later versions are left out.
pub(crate) fn read(text: &str) -> Result<Info, NarinfoError> {
    if text.len() > LONGEST_NARINFO {
        return Err(NarinfoError::Length(text.len()));
    }
    // The parser refuses keys that it does not know, and wants a URL.
    let mut lines = vec!["URL: -"];
    lines.extend(text.lines().filter(|line| {
        let key = line.split(':').next().unwrap_or_default();
        READ_KEYS.contains(&key)
    }));
    let lines = lines.join("\n");
    let unfit = |reason: &str| NarinfoError::Form(reason.to_owned());
    let info =
        NarInfo::parse(&lines).map_err(|error| NarinfoError::Form(cut(&format!("{error:?}"))))?;
    if !is_store_path(&info.store_path) {
        return Err(unfit("its StorePath is none"));
    }
    let digest = info.nar_hash.strip_prefix("sha256:").unwrap_or_default();
    if digest.len() != 52 || !digest.bytes().all(is_base32) {
        return Err(unfit(
            "its NarHash is not sha256: and 52 digits of Nix's base 32",
        ));
    }
    let references = info.references.iter().filter(|name| !name.is_empty());
    let mut references: Vec<String> = references.map(|name| name.to_string()).collect();
    if !references
        .iter()
        .all(|name| is_store_path(&format!("{STORE}{name}")))
    {
        return Err(unfit("its References are not all names in the store"));
    }
    references.sort_unstable();
    let signatures = info.sigs.iter().take(MOST_SIGNATURES);
    let signatures = signatures.map(|sig| (sig.key_name.to_string(), sig.sig.to_string()));
    Ok(Info {
        path: info.store_path.to_string(),
        nar_hash: info.nar_hash.to_string(),
        nar_size: info.nar_size,
        references,
        signatures: signatures.collect(),
    })
}

impl Info {
    /// The text that binary caches sign (Nix's manual, "Store Path", fingerprint).
    fn fingerprint(&self) -> String {
        let references: Vec<String> = self
            .references
            .iter()
            .map(|name| format!("{STORE}{name}"))
            .collect();
        format!(
            "1;{};{};{};{}",
            self.path,
            self.nar_hash,
            self.nar_size,
            references.join(",")
        )
    }

    /// Names of the keys whose signature holds.
    pub(crate) fn signers(&self, keys: &[TrustedKey]) -> Vec<String> {
        let fingerprint = self.fingerprint();
        let signed = |key: &&TrustedKey| {
            self.signatures.iter().any(|(name, signature)| {
                let public = UnparsedPublicKey::new(&ED25519, key.key);
                let signature = BASE64.decode(signature.as_bytes()).unwrap_or_default();
                *name == key.name && public.verify(fingerprint.as_bytes(), &signature).is_ok()
            })
        };
        let signers = keys.iter().filter(signed);
        signers.map(|key| key.name.clone()).collect()
    }
}

/// True for `/nix/store/`, 32 digits of Nix's base 32, a dash and a name.
pub fn is_store_path(path: &str) -> bool {
    let name = path.strip_prefix(STORE).and_then(|rest| {
        let (digest, name) = rest.split_at_checked(32)?;
        digest.bytes().all(is_base32).then_some(name)
    });
    let name = name.and_then(|rest| rest.strip_prefix('-'));
    let fits = |c: char| c.is_ascii_alphanumeric() || "+-._?=".contains(c);
    name.is_some_and(|name| (1..=211).contains(&name.len()) && name.chars().all(fits))
}

fn is_base32(byte: u8) -> bool {
    // Nix leaves out e, o, t and u.
    byte.is_ascii_digit() || (byte.is_ascii_lowercase() && !b"eotu".contains(&byte))
}

const STORE: &str = "/nix/store/";
const READ_KEYS: [&str; 5] = ["StorePath", "NarHash", "NarSize", "References", "Sig"];
const MOST_SIGNATURES: usize = 16;
/// Maximum bytes of a narinfo; a system has some 50 references of 60 bytes.
const LONGEST_NARINFO: usize = 16 << 10;

#[cfg(test)]
pub(crate) mod tests {
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};

    use super::*;

    pub(crate) const SYSTEM: &str =
        "/nix/store/1x5yixv9dljwz8bjzmyjxd0dnzi9pxqc-nixos-system-attic-26.05";
    const HASH: &str = "sha256:01jzbbmqi2salffgf3bidy4b48dgw485jmhqhqh4a385cxkpf7lq";

    /// As the public cache serves it, with its signature.
    const HELLO: &str = "\
StorePath: /nix/store/w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10
URL: nar/15zk4zszw9lgkdkkwy7w11m5vag11n5dhv2i6hj308qpxczvdddx.nar.xz
Compression: xz
FileHash: sha256:15zk4zszw9lgkdkkwy7w11m5vag11n5dhv2i6hj308qpxczvdddx
FileSize: 41232
NarHash: sha256:1mi14cqk363wv368ffiiy01knardmnlyphi6h9xv6dkjz44hk30i
NarSize: 205968
References: 9df65igwjmf2wbw0gbrrgair6piqjgmi-glibc-2.31 w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10
Sig: cache.nixos.org-1:uP5KU8MCmyRnKGlN5oEv6xWJBI5EO/Pf5aFztZuLSz8BpCcZ1fdBnJkVXhBAlxkdm/CemsgQskhwvyd2yghTAg==
";
    const CACHE_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

    /// A narinfo of a system, signed by a key of this seed, and that key.
    pub(crate) fn signed(seed: u8) -> (String, TrustedKey) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
        let unsigned = format!(
            "StorePath: {SYSTEM}\nURL: nar/x\nNarHash: {HASH}\nNarSize: 4096\nReferences: {} {}\nCA: later\n",
            "2x5yixv9dljwz8bjzmyjxd0dnzi9pxqc-linux-6.12", "0x5yixv9dljwz8bjzmyjxd0dnzi9pxqc-etc",
        );
        let fingerprint = read(&unsigned).unwrap().fingerprint();
        let signature = BASE64.encode(pair.sign(fingerprint.as_bytes()).as_ref());
        let public = BASE64.encode(pair.public_key().as_ref());
        let key = format!("attic-1:{public}").parse().unwrap();
        (format!("{unsigned}Sig: attic-1:{signature}\n"), key)
    }

    #[test]
    fn a_trusted_keys_signature_holds_and_no_other() {
        let (text, key) = signed(1);
        let info = read(&text).unwrap();
        assert_eq!(info.references.len(), 2);
        assert_eq!(info.signers(std::slice::from_ref(&key)), ["attic-1"]);
        let (_, other) = signed(2);
        assert_eq!(info.signers(&[other]), Vec::<String>::new(), "same name");
        // Each character of the path, the hash, the size and the references.
        let covered = |at: &usize| {
            let (url, hash) = (text.find("URL").unwrap(), text.find("NarHash").unwrap());
            *at < url || (hash..text.find("CA: ").unwrap()).contains(at)
        };
        for at in (0..text.len()).filter(covered) {
            let byte = text.as_bytes()[at];
            let mut changed = text.clone().into_bytes();
            changed[at] = if byte == b'1' { b'2' } else { b'1' };
            let changed = String::from_utf8(changed).unwrap();
            let signers = read(&changed).map(|info| info.signers(std::slice::from_ref(&key)));
            assert!(signers.is_err() || signers == Ok(Vec::new()), "byte {at}");
        }
        for (from, to) in [
            ("NarSize: 4096", "NarSize: 4097"),
            ("-linux-6.12", "-linux-6.13"),
        ] {
            let changed = read(&text.replace(from, to)).unwrap();
            assert_eq!(
                changed.signers(std::slice::from_ref(&key)),
                Vec::<String>::new()
            );
        }
    }

    #[test]
    fn a_narinfo_of_the_public_cache_is_signed_by_its_key() {
        let info = read(HELLO).unwrap();
        let key: TrustedKey = CACHE_KEY.parse().unwrap();
        assert_eq!(
            info.signers(std::slice::from_ref(&key)),
            ["cache.nixos.org-1"]
        );
        let changed = read(&HELLO.replace("hello-2.10\nURL", "hello-2.11\nURL")).unwrap();
        assert_eq!(changed.signers(&[key]), Vec::<String>::new());
    }

    /// Made with `nix-store --add`, `nix key generate-secret` and `nix store sign` of Nix 2.8.
    #[test]
    fn a_path_that_nix_signed_on_a_node_is_signed_by_its_key() {
        let text = "StorePath: /nix/store/ab3li50xq0nl4q5lxdyinb8w8y13my9s-f\n\
            NarHash: sha256:1xmr8jicvzszfzpz46g37mlpvbzjl2wpwvl2b05psipssyp1sm8h\nNarSize: 120\nReferences:\n\
            Sig: test-1:qf9tUV9eX8OmnKIle8+NB4DGYFG812MO8cm+F8jV2YhYyRungEg+1q+0N/f0A2xYDZ737RV1D0+LwUe88FnICg==\n";
        let key = "test-1:y6lZY6QYaHj7pVb8KamRvk22V0XdvQCL0DvkiMlr9+o=";
        let info = read(text).unwrap();
        assert_eq!(info.references, Vec::<String>::new());
        assert_eq!(info.signers(&[key.parse().unwrap()]), ["test-1"]);
    }

    #[test]
    fn what_is_no_narinfo_is_refused() {
        let (text, _) = signed(1);
        let cases = [
            String::new(),
            "StorePath".to_owned(),
            text.replace("NarHash: sha256:", "NarHash: md5:"),
            text.replace("NarSize: 4096", "NarSize: -1"),
            text.replace(SYSTEM, "/etc/passwd"),
            text.replace("References: ", "References: ../x "),
            text.replace("Sig: attic-1:", "Sig: "),
            "x".repeat(LONGEST_NARINFO + 1),
        ];
        for text in cases {
            assert!(read(&text).is_err(), "{text:?}");
        }
        for bad in [
            "",
            "x",
            "x:",
            ":AAAA",
            "a b:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
        ] {
            assert!(bad.parse::<TrustedKey>().is_err(), "{bad:?}");
        }
        assert!(CACHE_KEY.parse::<TrustedKey>().is_ok());
    }

    #[test]
    fn store_paths_are_told_from_other_paths() {
        assert!(is_store_path(SYSTEM));
        for bad in ["/nix/store/x", "/nix/store/", "/etc", ""] {
            assert!(!is_store_path(bad), "{bad}");
        }
        assert!(
            !is_store_path(&SYSTEM.replace("1x5", "1e5")),
            "no digit of base 32"
        );
        assert!(!is_store_path(&format!("{SYSTEM}/bin")));
    }
}
