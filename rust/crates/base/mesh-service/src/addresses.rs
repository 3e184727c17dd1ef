//! `addresses.json` in the state directory: the addresses that a running service listens on.
//!
//! A service told to listen on port 0 gets a free port; scripts and tests read it here. The file is written when all
//! sockets are bound, so its presence also tells that the service is up.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::files;

/// Bound addresses by socket name (`http`, `quic`, `dcf.clients`).
pub type Addresses = BTreeMap<String, SocketAddr>;

/// Path of the file in a state directory.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("addresses.json")
}

/// Writes the file; every reader sees it whole.
pub fn write(state_dir: &Path, addresses: &Addresses) -> io::Result<()> {
    let mut json = serde_json::to_vec_pretty(addresses)?;
    json.push(b'\n');
    files::write_public(&path(state_dir), &json)
}

/// Reads what [`write()`] wrote.
pub fn read(state_dir: &Path) -> io::Result<Addresses> {
    Ok(serde_json::from_slice(&std::fs::read(path(state_dir))?)?)
}

/// Removes the file of an earlier run, so that its addresses are not taken for those of this run.
pub fn remove(state_dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(path(state_dir)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_and_go_away() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let addresses = Addresses::from([
            ("http".to_owned(), SocketAddr::from(([127, 0, 0, 1], 8080))),
            ("quic".to_owned(), SocketAddr::from(([0u16; 8], 7780))),
        ]);
        write(dir.path(), &addresses).expect("write");
        assert_eq!(read(dir.path()).expect("read"), addresses);
        remove(dir.path()).expect("remove");
        remove(dir.path()).expect("nothing to remove");
        assert_eq!(
            read(dir.path()).expect_err("gone").kind(),
            io::ErrorKind::NotFound
        );
    }
}
