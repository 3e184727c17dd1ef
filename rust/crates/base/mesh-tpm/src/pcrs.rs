//! The quoted registers: their choice, and their digest.

use sha2::{Digest, Sha256};
use tpm2_protocol::TpmResult;
use tpm2_protocol::data::{TpmAlgId, TpmlPcrSelection, TpmsPcrSelect, TpmsPcrSelection};

/// The registers of the SHA-256 bank that a quote covers: 0 to 7 are the firmware's (its code and settings,
/// the boot loader, the partition table, the state of Secure Boot), 11 and 12 the kernel image's and its
/// command line's (systemd-stub), 14 the keys that shim lets boot.
pub const PCRS: [u8; 11] = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 14];

/// Selection of these registers.
pub(crate) fn selection(indices: &[u8]) -> TpmResult<TpmlPcrSelection> {
    let mut bits = [0u8; BITMAP_BYTES];
    for index in indices {
        if let Some(byte) = bits.get_mut(usize::from(index / 8)) {
            *byte |= 1 << (index % 8);
        }
    }
    let mut list = TpmlPcrSelection::new();
    list.try_push(TpmsPcrSelection {
        hash: TpmAlgId::Sha256,
        pcr_select: TpmsPcrSelect::try_from(&bits[..])?,
    })?;
    Ok(list)
}

/// The registers of a selection, ascending. `None` unless it is of the SHA-256 bank alone.
pub(crate) fn selected(list: &TpmlPcrSelection) -> Option<Vec<u8>> {
    let [one] = &list[..] else {
        return None;
    };
    if one.hash != TpmAlgId::Sha256 {
        return None;
    }
    let bytes = (0u8..).zip(one.pcr_select.iter());
    let bits = bytes.flat_map(|(byte, bits)| {
        let set = (0..8).filter(move |bit| bits >> bit & 1 == 1);
        set.map(move |bit| byte * 8 + bit)
    });
    Some(bits.collect())
}

/// The digest that a quote has of these values.
pub(crate) fn digest<'a>(values: impl Iterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for value in values {
        hash.update(value);
    }
    hash.finalize().into()
}

/// A TPM has 24 registers.
const BITMAP_BYTES: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_has_the_registers_that_were_chosen() {
        let list = selection(&PCRS).unwrap();
        assert_eq!(list[0].pcr_select[..], [0xff, 0b0101_1000, 0]);
        assert_eq!(selected(&list), Some(PCRS.to_vec()));
        let mut two = list;
        two.try_push(list[0]).unwrap();
        assert_eq!(selected(&two), None);
        assert_eq!(selected(&TpmlPcrSelection::new()), None);
    }
}
