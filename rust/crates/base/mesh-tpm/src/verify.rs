//! The head's side: a quote of a stranger.

use data_encoding::HEXLOWER;
use mesh_proto::TpmQuote;
use tpm2_protocol::TpmUnmarshal;
use tpm2_protocol::data::{TpmSt, TpmsAttest, TpmuAttest};

use crate::key::{Algorithm, PublicKey};
use crate::pcrs::{self, PCRS};

/// A quote that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Name of the attestation key (TPM 2.0 part 1, "Names"), in hexadecimal: `000b` and a SHA-256.
    pub key: String,
    /// Algorithm of the key.
    pub algorithm: Algorithm,
    /// Values of the registers in hexadecimal, by ascending index. They include [`PCRS`].
    pub pcrs: Vec<(u8, String)>,
    /// Manufacturer of the TPM: the node's word.
    pub manufacturer: String,
}

/// Reasons for refusing a quote.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuoteError {
    /// A part is longer than those of a TPM.
    #[error("its field `{0}` is longer than a TPM makes it")]
    Length(&'static str),
    /// The manufacturer is longer than a short text.
    #[error("its manufacturer is not one word of at most {LONGEST_MANUFACTURER} letters")]
    Manufacturer,
    /// The key is not an attestation key.
    #[error("its key was not made by a TPM for attestation: {0} is not as it has to be")]
    Key(&'static str),
    /// The statement is something else than a quote of a TPM.
    #[error("its statement is not a quote that a TPM has made")]
    Statement,
    /// The statement was made for another request.
    #[error("it was made for another request or session")]
    Request,
    /// The statement is of another key.
    #[error(
        "it is not by a primary key of the endorsement or owner hierarchy with the name of its key"
    )]
    Signer,
    /// Other registers than the head wants.
    #[error(
        "it does not cover the registers {PCRS:?} of the SHA-256 bank, each with its value: update HydraMesh on the node or at the head"
    )]
    Registers,
    /// Values that were not quoted.
    #[error("the values of its registers are not those that the TPM signed")]
    Values,
    /// The signature does not fit.
    #[error("its signature is not that of its key")]
    Signature,
}

/// Verifies a quote for this request.
///
/// # Errors
/// [`QuoteError`] says which part does not hold.
pub fn verify(quote: &TpmQuote, request: &[u8; 32]) -> Result<Verified, QuoteError> {
    for (name, bytes, most) in [
        ("public", &quote.public, LONGEST_PUBLIC),
        ("attest", &quote.attest, LONGEST_ATTEST),
        ("signature", &quote.signature, LONGEST_SIGNATURE),
    ] {
        if bytes.len() > most {
            return Err(QuoteError::Length(name));
        }
    }
    if quote.pcrs.len() > MOST_PCRS {
        return Err(QuoteError::Length("pcrs"));
    }
    let maker = &quote.manufacturer;
    if maker.len() > LONGEST_MANUFACTURER || !maker.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(QuoteError::Manufacturer);
    }
    let key = PublicKey::read(&quote.public).map_err(QuoteError::Key)?;
    if !key.verifies(&quote.attest, &quote.signature) {
        return Err(QuoteError::Signature);
    }
    // The magic number is checked in here: a restricted key signs nothing from outside of the TPM that begins
    // with it.
    let Ok((attest, [])) = TpmsAttest::unmarshal(&quote.attest) else {
        return Err(QuoteError::Statement);
    };
    let TpmuAttest::Quote(quoted) = &attest.attested else {
        return Err(QuoteError::Statement);
    };
    if attest.attest_type != TpmSt::AttestQuote {
        return Err(QuoteError::Statement);
    }
    if attest.extra_data[..] != request[..] {
        return Err(QuoteError::Request);
    }
    if !key.is_qualified(&attest.qualified_signer) {
        return Err(QuoteError::Signer);
    }
    let covered = pcrs::selected(&quoted.pcr_select).ok_or(QuoteError::Registers)?;
    let sent = quote.pcrs.iter().map(|pcr| pcr.index);
    let whole = quote.pcrs.iter().all(|pcr| pcr.value.len() == DIGEST_BYTES)
        && sent.eq(covered.iter().map(|index| u32::from(*index)))
        && PCRS.iter().all(|wanted| covered.contains(wanted));
    if !whole {
        return Err(QuoteError::Registers);
    }
    let values = || quote.pcrs.iter().map(|pcr| &pcr.value[..]);
    if quoted.pcr_digest[..] != pcrs::digest(values()) {
        return Err(QuoteError::Values);
    }
    let values = values().map(|value| HEXLOWER.encode(value));
    Ok(Verified {
        key: HEXLOWER.encode(&key.name()),
        algorithm: key.algorithm(),
        pcrs: covered.into_iter().zip(values).collect(),
        manufacturer: maker.clone(),
    })
}

/// An RSA key has 280 bytes, its signature 262; a statement has some 150.
const LONGEST_PUBLIC: usize = 512;
const LONGEST_ATTEST: usize = 512;
const LONGEST_SIGNATURE: usize = 512;
const MOST_PCRS: usize = 24;
const LONGEST_MANUFACTURER: usize = 8;
const DIGEST_BYTES: usize = 32;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;
    use mesh_proto::PcrValue;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    const REQUEST: [u8; 32] = [7; 32];

    /// A quote of swtpm 0.7.1 for this request.
    fn genuine() -> TpmQuote {
        let digits: String = include_str!("quote.hex").split_whitespace().collect();
        let bytes = HEXLOWER.decode(digits.as_bytes()).unwrap();
        TpmQuote::decode(&bytes[..]).unwrap()
    }

    #[test]
    fn a_quote_with_any_byte_changed_is_refused() {
        let quote = genuine();
        let verified = verify(&quote, &REQUEST).unwrap();
        assert_eq!(verified.pcrs.len(), PCRS.len());
        assert_eq!(verified.manufacturer, "IBM");
        type Part = fn(&mut TpmQuote) -> &mut Vec<u8>;
        let parts: [Part; 4] = [
            |quote| &mut quote.public,
            |quote| &mut quote.attest,
            |quote| &mut quote.signature,
            |quote| &mut quote.pcrs[8].value,
        ];
        for part in parts {
            let length = part(&mut quote.clone()).len();
            for place in 0..length {
                let mut changed = quote.clone();
                part(&mut changed)[place] ^= 1 << (place % 8);
                assert!(verify(&changed, &REQUEST).is_err(), "byte {place}");
            }
            for other in [length - 1, length + 1, 5000] {
                let mut changed = quote.clone();
                part(&mut changed).resize(other, 0);
                assert!(verify(&changed, &REQUEST).is_err(), "{other} bytes");
            }
        }
    }

    #[test]
    fn each_fault_of_a_quote_is_named() {
        // Of the attributes, big-endian at byte 4 of the public area.
        let without = |byte: usize, bit: u8| {
            let mut quote = genuine();
            quote.public[byte] ^= bit;
            quote
        };
        for (byte, bit, name) in [
            (7, 0x02, "fixedTPM"),
            (7, 0x10, "fixedParent"),
            (7, 0x20, "sensitiveDataOrigin"),
            (5, 0x01, "restricted"),
            (5, 0x04, "sign"),
            (5, 0x02, "attributes"),
        ] {
            let error = verify(&without(byte, bit), &REQUEST).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        type Change = fn(&mut TpmQuote);
        let cases: [(Change, QuoteError); 5] = [
            (
                |quote| quote.manufacturer = "a\u{1b}".into(),
                QuoteError::Manufacturer,
            ),
            (|quote| quote.pcrs.truncate(3), QuoteError::Registers),
            (|quote| quote.pcrs.swap(0, 1), QuoteError::Registers),
            (|quote| quote.pcrs[0].value.clear(), QuoteError::Registers),
            (
                |quote| quote.pcrs = vec![PcrValue::default(); 1000],
                QuoteError::Length("pcrs"),
            ),
        ];
        for (change, expected) in cases {
            let mut quote = genuine();
            change(&mut quote);
            assert_eq!(verify(&quote, &REQUEST), Err(expected));
        }
        assert_eq!(verify(&genuine(), &[0; 32]), Err(QuoteError::Request));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn no_bytes_panic_or_pass(bytes in proptest::collection::vec(any::<u8>(), 0..200), part in 0..3usize) {
            let mut quote = genuine();
            match part {
                0 => quote.public = bytes,
                1 => quote.attest = bytes,
                _ => quote.signature = bytes,
            }
            prop_assert!(verify(&quote, &REQUEST).is_err());
        }
    }
}
