//! All addresses of a host, tried as RFC 8305 ("happy eyeballs") says.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

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

/// All addresses of `host:port`, ordered by [`ordered`].
///
/// # Errors
/// If the name cannot be looked up or has no address.
pub async fn resolve(host_and_port: &str) -> io::Result<Vec<SocketAddr>> {
    let found = ordered(tokio::net::lookup_host(host_and_port).await?);
    if found.is_empty() {
        let text = format!("the name in {host_and_port} has no address");
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    Ok(found)
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

/// Tries the addresses in their order. The next attempt begins [`ATTEMPT_DELAY`] after the one before, or as soon as all
/// that run have failed. The first success wins and the other attempts are dropped.
///
/// # Errors
/// The error of every address, in the order in which the attempts failed. Empty if there are no addresses.
pub async fn race<T, E, F>(
    addresses: &[SocketAddr],
    mut attempt: impl FnMut(SocketAddr) -> F,
) -> Result<(SocketAddr, T), Vec<(SocketAddr, E)>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = addresses.iter().copied();
    let mut running = FuturesUnordered::new();
    let mut failed = Vec::new();
    let mut start = |address: SocketAddr| {
        let attempt = attempt(address);
        async move { (address, attempt.await) }
    };
    loop {
        let next = waiting.next();
        running.extend(next.map(&mut start));
        let delay = async {
            match waiting.len() {
                0 => std::future::pending().await,
                _ => tokio::time::sleep(ATTEMPT_DELAY).await,
            }
        };
        tokio::pin!(delay);
        loop {
            let ended = tokio::select! {
                ended = running.next() => ended,
                () = &mut delay => break,
            };
            match ended {
                Some((address, Ok(won))) => return Ok((address, won)),
                Some((address, Err(error))) => failed.push((address, error)),
                None if waiting.len() == 0 => return Err(failed),
                None => break,
            }
        }
    }
}

/// The address that worked last, to be tried first. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Preferred(Arc<Mutex<Option<SocketAddr>>>);

impl Preferred {
    /// Records that a connection to this address succeeded.
    pub fn remember(&self, address: SocketAddr) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
    }

    /// Moves the remembered address to the front, if it is still among them.
    pub fn first(&self, mut addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = addresses.iter().position(|address| Some(*address) == known) {
            addresses[..=at].rotate_right(1);
        }
        addresses
    }
}

/// Between the starts of two attempts (RFC 8305, section 8).
pub const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

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

    #[tokio::test]
    async fn a_silent_address_delays_the_next_one_by_a_quarter_of_a_second() {
        let all = addresses(&["[::1]:1", "10.0.0.1:1"]);
        let started = std::time::Instant::now();
        let won = race(&all, |address| async move {
            match address.is_ipv6() {
                true => std::future::pending().await,
                false => Ok::<_, ()>("here"),
            }
        });
        assert_eq!(won.await, Ok((all[1], "here")));
        assert!(started.elapsed() >= ATTEMPT_DELAY);
    }

    #[tokio::test]
    async fn a_refusal_starts_the_next_attempt_at_once_and_all_refusals_are_reported() {
        let all = addresses(&["[::1]:1", "10.0.0.1:1", "[::2]:1"]);
        let lost = race(&all, |address| async move { Err::<(), _>(address.port()) });
        let expected: Vec<_> = all.iter().map(|address| (*address, 1)).collect();
        // Polled once: nothing has to be waited for.
        assert_eq!(futures::FutureExt::now_or_never(lost), Some(Err(expected)));
        let nobody = race(&[], |_| async { Ok::<(), ()>(()) });
        assert_eq!(nobody.await, Err(Vec::new()));
    }

    #[tokio::test]
    async fn the_slow_first_address_still_wins_over_a_later_failure() {
        let all = addresses(&["[::1]:1", "10.0.0.1:1"]);
        let won = race(&all, |address| async move {
            tokio::time::sleep(Duration::from_millis(400)).await;
            match address.is_ipv6() {
                true => Ok("slow"),
                false => Err(()),
            }
        });
        assert_eq!(won.await, Ok((all[0], "slow")));
    }
}
