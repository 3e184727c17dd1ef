//! Looking a name up, and the race between its addresses.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::ordered;

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

/// Between the starts of two attempts (RFC 8305, section 8).
pub const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts
            .iter()
            .map(|text| text.parse().expect("an address"))
            .collect()
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
