//! All addresses of a host, tried as RFC 8305 ("happy eyeballs") says.

#[cfg(feature = "tokio")]
mod race;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};

#[cfg(feature = "tokio")]
pub use race::{ATTEMPT_DELAY, race, resolve};

use crate::sync::lock;

/// Splits `host:port`, without the brackets of an IPv6 address; `None` if one of them is missing.
pub fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let inner = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let host = inner.unwrap_or(host);
    let port = port.parse().ok().filter(|port| *port != 0)?;
    (!host.is_empty()).then_some((host, port))
}

/// `host`, `host:port`, `[IPv6]`, `[IPv6]:port` or a bare IPv6 address as `host:port`, with `port` where none
/// is given.
pub fn with_port(text: &str, port: u16) -> String {
    let inner = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    match (inner.unwrap_or(text).parse(), text.contains(':')) {
        (Ok(IpAddr::V6(address)), _) => format!("[{address}]:{port}"),
        (_, false) => format!("{text}:{port}"),
        (_, true) => text.to_owned(),
    }
}

/// The addresses without repeats, alternating between the families, beginning with the first one's (RFC 8305, section 4).
/// At most [`MOST`]: a name server's answer must not decide how many sockets are opened.
pub fn ordered(addresses: impl IntoIterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let mut unique: Vec<SocketAddr> = Vec::new();
    for address in addresses.into_iter().map(canonical) {
        if !unique.contains(&address) {
            unique.push(address);
        }
    }
    let Some(first) = unique.first().copied() else {
        return unique;
    };
    let (same, other): (Vec<_>, Vec<_>) = unique
        .into_iter()
        .partition(|address| address.is_ipv4() == first.is_ipv4());
    let (mut same, mut other) = (same.into_iter(), other.into_iter());
    let mut mixed = Vec::new();
    loop {
        let pair = [same.next(), other.next()];
        if pair == [None, None] {
            mixed.truncate(MOST);
            return mixed;
        }
        mixed.extend(pair.into_iter().flatten());
    }
}

/// An IPv4 address that a dual-stack socket shows as `::ffff:a.b.c.d`, as the IPv4 address that it is.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        // Keeps flow and scope of IPv6.
        ip if ip == address.ip() => address,
        ip => SocketAddr::new(ip, address.port()),
    }
}

/// The source of an address, for shares per source: an IPv6 host has a whole /64.
pub fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64))
        }
        address => address,
    }
}

/// The address that worked last, to be tried first. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Preferred(Arc<Mutex<Option<SocketAddr>>>);

impl Preferred {
    /// Records that a connection to this address succeeded.
    pub fn remember(&self, address: SocketAddr) {
        *lock(&self.0) = Some(address);
    }

    /// Moves the remembered address to the front, if it is still among them.
    pub fn first(&self, mut addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let known = *lock(&self.0);
        if let Some(at) = addresses.iter().position(|address| Some(*address) == known) {
            addresses[..=at].rotate_right(1);
        }
        addresses
    }
}

/// Most addresses of one name that are tried.
pub const MOST: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts
            .iter()
            .map(|text| text.parse().expect("an address"))
            .collect()
    }

    #[test]
    fn a_host_and_a_port_are_both_needed() {
        for (text, expected) in [
            ("head.example:7777", Some(("head.example", 7777))),
            ("10.0.0.1:1", Some(("10.0.0.1", 1))),
            ("[::1]:7780", Some(("::1", 7780))),
            // As the system reads it, too.
            ("::1:7780", Some(("::1", 7780))),
            ("head", None),
            ("head:", None),
            (":7780", None),
            ("[]:7780", None),
            ("head:0", None),
            ("head:65536", None),
            ("head:http", None),
            ("", None),
        ] {
            assert_eq!(host_and_port(text), expected, "{text}");
        }
    }

    #[test]
    fn a_port_is_added_where_none_is_given() {
        for (text, expected) in [
            ("head", "head:9"),
            ("head:1", "head:1"),
            ("10.0.0.1", "10.0.0.1:9"),
            ("::1", "[::1]:9"),
            ("[::1]", "[::1]:9"),
            ("[::1]:1", "[::1]:1"),
        ] {
            assert_eq!(with_port(text, 9), expected, "{text}");
        }
    }

    #[test]
    fn families_alternate_and_repeats_are_dropped() {
        let found = addresses(&[
            "[::1]:1",
            "[::2]:1",
            "[::1]:1",
            "10.0.0.1:1",
            "[::ffff:10.0.0.1]:1",
        ]);
        let expected = addresses(&["[::1]:1", "10.0.0.1:1", "[::2]:1"]);
        assert_eq!(ordered(found), expected);
        assert!(ordered([]).is_empty());
        let many = (1..=100).map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        assert_eq!(ordered(many).len(), MOST);
    }

    #[test]
    fn the_address_that_worked_is_tried_first_while_the_name_has_it() {
        let preferred = Preferred::default();
        let all = addresses(&["[::1]:1", "10.0.0.1:1", "[::2]:1"]);
        assert_eq!(preferred.first(all.clone()), all);
        preferred.remember(all[2]);
        let expected = addresses(&["[::2]:1", "[::1]:1", "10.0.0.1:1"]);
        assert_eq!(preferred.first(all.clone()), expected);
        assert_eq!(preferred.first(all[..2].to_vec()), all[..2]);
    }
}
