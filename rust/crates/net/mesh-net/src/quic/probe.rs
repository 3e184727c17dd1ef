//! The bandwidth of a link, from the arrival rate of a train of Probes on a stream of its own.
//!
//! A path's congestion window starts small and grows by every acknowledgement, so only the later half of the train counts.
//! A receiver that was asleep finds the whole train in a buffer, which looks like a path without limits. So
//! the sender bounds the reported bandwidth by the time until the answer.

use std::time::{Duration, Instant};

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use mesh_proto::Probed;
use prost::Message as _;

use super::error::StreamFailure;
use super::link::Link;
use super::stream::MsgStream;

/// Measures how many bytes per second the peer of a link receives from here. Takes milliseconds on a fast path; a slow one is
/// filled for as long as 64 KiB take.
///
/// # Errors
/// If the link fails, or the peer does not answer a train within ten seconds or not with Probed.
pub async fn bandwidth(link: &Link) -> Result<f64, ProbeError> {
    let started = Instant::now();
    let first = train(link, SHORT_TRAIN).await?;
    if started.elapsed() >= QUICK {
        return Ok(first);
    }
    // What stood the first train and not the second has a buffer before something slow.
    Ok(train(link, LONG_TRAIN).await.unwrap_or(first))
}

async fn train(link: &Link, wagons: usize) -> Result<f64, ProbeError> {
    tokio::time::timeout(LIMIT, send_train(link, wagons))
        .await
        .unwrap_or(Err(ProbeError::Silent))
}

/// Errors of measuring a bandwidth.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The stream failed.
    #[error(transparent)]
    Stream(#[from] StreamFailure),
    /// The peer did not answer in time.
    #[error("no answer to a train of probes within {} s", LIMIT.as_secs())]
    Silent,
    /// The answer is not a Probed message, or has no bandwidth.
    #[error("the answer to a train of probes is a {0} without a bandwidth")]
    Answer(MsgType),
}

async fn send_train(link: &Link, wagons: usize) -> Result<f64, ProbeError> {
    let mut stream = link.open().await?;
    let payload = Bytes::from_static(&[0; WAGON]);
    let started = Instant::now();
    for _ in 0..wagons {
        let wagon = Message::new(MsgType::PROBE, 0, 0, payload.clone());
        stream.send(wagon).await?;
    }
    let sent = (wagons * WAGON) as u64;
    stream.finish()?;
    let answer = stream.recv().await?;
    let answer = answer.ok_or(ProbeError::Silent)?;
    let probed = match answer.kind {
        MsgType::PROBED => Probed::decode(answer.payload.clone()).ok(),
        _ => None,
    };
    probed
        .and_then(|probed| believed(&probed, sent, started.elapsed()))
        .ok_or(ProbeError::Answer(answer.kind))
}

/// Answers a train of Probes of which `first` has been received.
///
/// # Errors
/// If the stream fails, or brings something else, too much, or all of it too slowly.
pub async fn answer(first: &Message, mut stream: MsgStream) -> Result<(), StreamFailure> {
    let mut train = Train::default();
    train.arrived(first.payload.len(), Instant::now());
    let receive = async {
        while let Some(message) = stream.recv().await? {
            if message.kind != MsgType::PROBE || train.is_too_long() {
                return Err(StreamFailure::Cancelled(ErrorCode::INVALID_PAYLOAD));
            }
            train.arrived(message.payload.len(), Instant::now());
        }
        let probed = train.probed().encode_to_vec();
        stream
            .send(Message::new(MsgType::PROBED, 0, 0, probed))
            .await?;
        stream.finish()
    };
    tokio::time::timeout(LIMIT, receive)
        .await
        .unwrap_or(Err(StreamFailure::Cancelled(ErrorCode::TIMEOUT)))
}

/// Arrival times of the bytes of a train.
#[derive(Debug, Default)]
struct Train {
    /// Time, and bytes up to then.
    arrivals: Vec<(Instant, u64)>,
}

impl Train {
    fn bytes(&self) -> u64 {
        self.arrivals.last().map_or(0, |(_, bytes)| *bytes)
    }

    /// Longer than any that [`bandwidth`] sends.
    fn is_too_long(&self) -> bool {
        self.arrivals.len() > 2 * LONG_TRAIN || self.bytes() > 2 * (LONG_TRAIN * WAGON) as u64
    }

    fn arrived(&mut self, bytes: usize, now: Instant) {
        self.arrivals.push((now, self.bytes() + bytes as u64));
    }

    fn probed(&self) -> Probed {
        let whole = self.bytes();
        let half = self.arrivals.iter().find(|(_, bytes)| *bytes >= whole / 2);
        let (Some((from, before)), Some((to, _))) = (half, self.arrivals.last()) else {
            return Probed::default();
        };
        let took = to.saturating_duration_since(*from);
        Probed {
            bytes: whole - before,
            microseconds: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

/// Bandwidth in bytes per second, from an answer that came `took` after the first of `sent` bytes. `None` if
/// the answer has no data.
fn believed(probed: &Probed, sent: u64, took: Duration) -> Option<f64> {
    if probed.bytes == 0 {
        return None;
    }
    // All bytes were sent and answered within that time, so the path is at least as fast.
    let least = sent as f64 / took.as_secs_f64().max(1e-6);
    let told = probed.bytes as f64 / (probed.microseconds.max(1) as f64 / 1e6);
    Some(told.clamp(least, FASTER * least))
}

/// Payload of one Probe in bytes.
const WAGON: usize = 16 << 10;
/// Number of Probes in the first train.
const SHORT_TRAIN: usize = 4;
/// A path that took less time for the first train gets a longer one, after which a LAN's congestion window
/// has grown.
const QUICK: Duration = Duration::from_millis(250);
/// Number of Probes in the longer train: 512 KiB.
const LONG_TRAIN: usize = 32;
/// Time limit for a train and its answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Maximum factor by which the later half may be faster than the whole, round trips and growing window
/// included.
const FASTER: f64 = 8.0;

#[cfg(test)]
mod tests {
    use super::*;

    /// A train whose wagons come after these milliseconds.
    fn train(arrivals: &[u64]) -> Probed {
        let start = Instant::now();
        let mut train = Train::default();
        for &at in arrivals {
            train.arrived(1_000, start + Duration::from_millis(at));
        }
        train.probed()
    }

    #[test]
    fn the_later_half_counts() {
        // Slow at first, then 1,000 bytes a millisecond.
        let probed = train(&[0, 50, 100, 150, 151, 152, 153, 154]);
        assert_eq!((probed.bytes, probed.microseconds), (4_000, 4_000));
        let speed = believed(&probed, 8_000, Duration::from_millis(160));
        assert_eq!(speed, Some(8.0 * 8_000.0 / 0.16));
        let speed = believed(&probed, 8_000, Duration::from_millis(10));
        assert_eq!(speed, Some(1e6));
    }

    #[test]
    fn a_burst_or_a_lie_is_not_believed_and_nothing_is_nothing() {
        let at_once = train(&[5; 32]);
        let second = Duration::from_secs(1);
        assert_eq!(believed(&at_once, 32_000, second), Some(8.0 * 32_000.0));
        let crawling = Probed {
            bytes: 1,
            microseconds: u64::MAX,
        };
        assert_eq!(believed(&crawling, 32_000, second), Some(32_000.0));
        for nothing in [train(&[]), train(&[3])] {
            assert_eq!(believed(&nothing, 32_000, second), None, "{nothing:?}");
        }
        assert!(believed(&at_once, u64::MAX, Duration::ZERO).is_some_and(f64::is_finite));
    }
}
