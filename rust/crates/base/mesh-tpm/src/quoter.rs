//! Quotes of this machine's TPM.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use data_encoding::HEXLOWER;
use mesh_proto::{PcrValue, TpmQuote};
use tpm2_protocol::basic::TpmHandle;
use tpm2_protocol::data::{
    Tpm2bPublic, TpmCap, TpmCc, TpmPt, TpmRc, TpmRcBase, TpmRh, TpmtPublic, TpmtSigScheme,
    TpmuAttest, TpmuCapabilities,
};
use tpm2_protocol::frame::{
    TpmCreatePrimaryCommand, TpmCreatePrimaryResponse, TpmFlushContextCommand,
    TpmFlushContextResponse, TpmGetCapabilityCommand, TpmGetCapabilityResponse, TpmPcrReadCommand,
    TpmPcrReadResponse, TpmQuoteCommand, TpmQuoteResponse,
};
use tpm2_protocol::{TpmError, TpmMarshal, TpmResult, TpmSized, TpmWriter};

use crate::device::{Device, DeviceError};
use crate::key::{self, Algorithm, PublicKey};
use crate::pcrs::{self, PCRS};

/// The kernel's TPM with a resource manager, which lets several programs use it.
pub const DEVICE: &str = "/dev/tpmrm0";

/// Makes quotes. It keeps the TPM open and its key loaded, and loads it again where that was lost (after a
/// suspension).
pub struct Quoter {
    path: PathBuf,
    loaded: Mutex<Option<Loaded>>,
}

impl Quoter {
    /// Opens the TPM behind this device file or socket, and has it derive the key. Takes from milliseconds to
    /// a minute, for an RSA key in an old TPM.
    ///
    /// # Errors
    /// If there is no TPM, or it cannot quote.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        Ok(Self {
            path: path.to_owned(),
            loaded: Mutex::new(Some(Loaded::open(path)?)),
        })
    }

    /// A quote over [`PCRS`] that is good for this request. Blocks for as long as the TPM works, mostly some
    /// 100 ms.
    ///
    /// # Errors
    /// If the TPM does not give one.
    pub fn quote(&self, request: &[u8; 32]) -> Result<TpmQuote, DeviceError> {
        // A panic elsewhere leaves nothing half done that matters here.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut known) = loaded.take()
            && let Ok(quote) = known.quote(request)
        {
            *loaded = Some(known);
            return Ok(quote);
        }
        let mut fresh = Loaded::open(&self.path)?;
        let quote = fresh.quote(request)?;
        *loaded = Some(fresh);
        Ok(quote)
    }

    /// Manufacturer, name and algorithm of the key, for the log. Empty while the key is lost.
    pub fn description(&self) -> String {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let described = loaded.as_ref().map(|loaded| {
            let name = HEXLOWER.encode(&loaded.name);
            let algorithm = loaded.algorithm.name();
            format!("{} {algorithm} {name}", loaded.manufacturer)
        });
        described.unwrap_or_default()
    }
}

impl std::fmt::Debug for Quoter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Quoter").field(&self.path).finish()
    }
}

/// An open TPM with the key in it.
struct Loaded {
    device: Device,
    handle: TpmHandle,
    public: Vec<u8>,
    name: Vec<u8>,
    algorithm: Algorithm,
    manufacturer: String,
}

impl Loaded {
    fn open(path: &Path) -> Result<Self, DeviceError> {
        let mut device = Device::open(path)?;
        let manufacturer = manufacturer(&mut device)?;
        let (handle, public) = create_key(&mut device)?;
        Self::with_key(device, manufacturer, handle, &public)
    }

    fn with_key(
        device: Device,
        manufacturer: String,
        handle: TpmHandle,
        public: &TpmtPublic,
    ) -> Result<Self, DeviceError> {
        let command = TpmCc::CreatePrimary;
        let unusable = |source| DeviceError::Answer { command, source };
        let public = marshalled(public).map_err(unusable)?;
        // A TPM that does otherwise than it was asked is found out here and not at the head.
        let key = PublicKey::read(&public).map_err(|_| {
            let (offset, needed, available) = (0, 0, public.len());
            unusable(TpmError::UnexpectedEnd {
                offset,
                needed,
                available,
            })
        })?;
        Ok(Self {
            device,
            handle,
            name: key.name().to_vec(),
            algorithm: key.algorithm(),
            public,
            manufacturer,
        })
    }

    fn quote(&mut self, request: &[u8; 32]) -> Result<TpmQuote, DeviceError> {
        let command = TpmCc::Quote;
        let unusable = |source| DeviceError::Answer { command, source };
        let quote = TpmQuoteCommand {
            handles: [self.handle],
            qualifying_data: request[..].try_into().map_err(unusable)?,
            in_scheme: TpmtSigScheme::default(),
            pcr_select: pcrs::selection(&PCRS).map_err(unusable)?,
        };
        for _ in 0..ATTEMPTS {
            let pcrs = self.pcr_values()?;
            let answer: TpmQuoteResponse = self.device.run_authorised(&quote)?;
            let TpmuAttest::Quote(quoted) = &answer.quoted.attested else {
                continue;
            };
            // Something may have been measured between the two commands.
            if quoted.pcr_digest[..] != pcrs::digest(pcrs.iter().map(|pcr| &pcr.value[..])) {
                continue;
            }
            return Ok(TpmQuote {
                public: self.public.clone(),
                attest: marshalled(&*answer.quoted).map_err(unusable)?,
                signature: marshalled(&answer.signature).map_err(unusable)?,
                pcrs,
                manufacturer: self.manufacturer.clone(),
            });
        }
        Err(DeviceError::Changing)
    }

    /// A TPM gives a few values at once.
    fn pcr_values(&mut self) -> Result<Vec<PcrValue>, DeviceError> {
        let command = TpmCc::PcrRead;
        let unusable = |source| DeviceError::Answer { command, source };
        let (mut left, mut values) = (PCRS.to_vec(), Vec::new());
        while !left.is_empty() {
            let read = TpmPcrReadCommand {
                handles: [],
                pcr_selection_in: pcrs::selection(&left).map_err(unusable)?,
            };
            let answer: TpmPcrReadResponse = self.device.run(&read)?;
            let given = pcrs::selected(&answer.pcr_selection_out).unwrap_or_default();
            if given.is_empty() || given.len() != answer.pcr_values[..].len() {
                return Err(DeviceError::NoBank);
            }
            for (index, value) in given.iter().zip(answer.pcr_values.iter()) {
                let place = left.iter().position(|wanted| wanted == index);
                left.remove(place.ok_or(DeviceError::NoBank)?);
                values.push(PcrValue {
                    index: u32::from(*index),
                    value: value.to_vec(),
                });
            }
        }
        values.sort_unstable_by_key(|pcr| pcr.index);
        Ok(values)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // The kernel's resource manager does it by itself; without one, few keys fit.
        let flush = TpmFlushContextCommand {
            handles: [],
            flush_handle: self.handle,
        };
        let _: Result<TpmFlushContextResponse, _> = self.device.run(&flush);
    }
}

/// Derives the key: under the endorsement seed, which outlives `TPM2_Clear`, or under the owner's where that
/// hierarchy has a password or is off; with elliptic curves, or without where the TPM has none.
fn create_key(device: &mut Device) -> Result<(TpmHandle, TpmtPublic), DeviceError> {
    let mut refused = None;
    for parent in [TpmRh::Endorsement, TpmRh::Owner] {
        for algorithm in [Algorithm::EcdsaP256, Algorithm::Rsa2048] {
            match create_primary(device, parent, algorithm) {
                Err(error) if is_about_hierarchy(&error) => {
                    refused = Some(error);
                    break;
                }
                Err(error) if algorithm == Algorithm::EcdsaP256 && is_about_key(&error) => {}
                created => return created,
            }
        }
    }
    // Each hierarchy was refused if nothing was returned.
    Err(refused.unwrap_or(DeviceError::Changing))
}

fn create_primary(
    device: &mut Device,
    parent: TpmRh,
    algorithm: Algorithm,
) -> Result<(TpmHandle, TpmtPublic), DeviceError> {
    let command = TpmCc::CreatePrimary;
    let template =
        key::template(algorithm).map_err(|source| DeviceError::Answer { command, source })?;
    let create = TpmCreatePrimaryCommand {
        handles: [parent.value().into()],
        in_sensitive: Default::default(),
        in_public: Tpm2bPublic::from(template),
        outside_info: Default::default(),
        creation_pcr: Default::default(),
    };
    let created: TpmCreatePrimaryResponse = device.run_authorised(&create)?;
    let [handle] = created.handles;
    Ok((handle, (*created.out_public).clone()))
}

fn is_about_hierarchy(error: &DeviceError) -> bool {
    let DeviceError::Refused { code, .. } = error else {
        return false;
    };
    matches!(
        code.base(),
        TpmRcBase::AuthFail
            | TpmRcBase::BadAuth
            | TpmRcBase::Hierarchy
            | TpmRcBase::AuthUnavailable
            | TpmRcBase::Disabled
    )
}

fn is_about_key(error: &DeviceError) -> bool {
    matches!(
        error,
        DeviceError::Refused {
            code: TpmRc::Fmt1(_),
            ..
        }
    )
}

/// The TPM's word: four characters.
fn manufacturer(device: &mut Device) -> Result<String, DeviceError> {
    let ask = TpmGetCapabilityCommand {
        handles: [],
        cap: TpmCap::TpmProperties,
        property: TpmPt::Manufacturer.value().into(),
        property_count: 1.into(),
    };
    let answer: TpmGetCapabilityResponse = device.run(&ask)?;
    let TpmuCapabilities::TpmProperties(properties) = &answer.capability_data.data else {
        return Ok(String::new());
    };
    let known = properties
        .iter()
        .find(|one| one.property == TpmPt::Manufacturer);
    let bytes = known.map_or([0; 4], |one| one.value.value().to_be_bytes());
    let shown = bytes.iter().filter(|byte| byte.is_ascii_graphic());
    Ok(shown.map(|byte| char::from(*byte)).collect())
}

fn marshalled(value: &(impl TpmMarshal + TpmSized)) -> TpmResult<Vec<u8>> {
    let mut bytes = vec![0; value.len()];
    value.marshal(&mut TpmWriter::new(&mut bytes))?;
    Ok(bytes)
}

/// Quotes that are tried while registers change.
const ATTEMPTS: usize = 3;

#[cfg(test)]
mod tests {
    use mesh_testkit::Swtpm;
    use tpm2_protocol::frame::{TpmHierarchyChangeAuthCommand, TpmHierarchyChangeAuthResponse};

    use super::*;
    use crate::verify::verify;

    const REQUEST: [u8; 32] = [7; 32];

    #[test]
    fn a_tpm_without_elliptic_curves_quotes_with_rsa() {
        let Some(tpm) = Swtpm::start("a_tpm_without_elliptic_curves_quotes_with_rsa") else {
            return;
        };
        let mut device = Device::open(&tpm.socket()).unwrap();
        let (handle, public) =
            create_primary(&mut device, TpmRh::Endorsement, Algorithm::Rsa2048).unwrap();
        let mut loaded = Loaded::with_key(device, "IBM".to_owned(), handle, &public).unwrap();
        let mut quote = loaded.quote(&REQUEST).unwrap();
        assert_eq!(
            verify(&quote, &REQUEST).unwrap().algorithm,
            Algorithm::Rsa2048
        );
        quote.signature[100] ^= 1;
        assert!(verify(&quote, &REQUEST).is_err());
    }

    #[test]
    fn an_endorsement_hierarchy_with_a_password_is_left_alone() {
        let Some(tpm) = Swtpm::start("an_endorsement_hierarchy_with_a_password_is_left_alone")
        else {
            return;
        };
        let first = Quoter::open(&tpm.socket())
            .unwrap()
            .quote(&REQUEST)
            .unwrap();
        let mut device = Device::open(&tpm.socket()).unwrap();
        let lock = TpmHierarchyChangeAuthCommand {
            handles: [TpmRh::Endorsement.value().into()],
            new_auth: b"secret"[..].try_into().unwrap(),
        };
        let _: TpmHierarchyChangeAuthResponse = device.run_authorised(&lock).unwrap();
        drop(device);
        let quote = Quoter::open(&tpm.socket())
            .unwrap()
            .quote(&REQUEST)
            .unwrap();
        let owner = verify(&quote, &REQUEST).unwrap();
        assert_ne!(owner.key, verify(&first, &REQUEST).unwrap().key);
    }
}
