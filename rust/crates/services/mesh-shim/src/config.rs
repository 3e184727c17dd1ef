//! Configuration of the shim.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use mesh_base::addresses::host_and_port;
use mesh_service::{config::units, network::Network};
use serde::{Deserialize, Serialize};

use crate::bridge::MAX_TASKS;

/// Configuration of the shim, as `shim.toml` holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory for `addresses.json` with the addresses that are listened on; none is written if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// Address to which clients send their datagrams.
    pub listen: SocketAddr,
    /// The heads, `host:port`, the preferred one first.
    pub heads: Vec<String>,
    /// Sources that are served.
    pub admit: Admit,
    /// Trust sources on this machine.
    pub trust_loopback: bool,
    /// Networks that are trusted to hold clients, such as `10.0.0.0/8`.
    pub trusted_networks: Vec<Network>,
    /// Those of them whose clients need not prove their address: clients of DCF v5.0.0 cannot. An attacker
    /// who can forge an address there can have answers sent to it.
    pub unverified_networks: Vec<Network>,
    /// Limit on the datagrams of each source.
    pub rate_limit: RateLimit,
    /// Most tasks at once, those answered within `answer_linger` included. Rounded up to a power of two.
    pub max_tasks: usize,
    /// Memory for copies of tasks under way, which are sent to another head if theirs is lost.
    #[serde(with = "units::bytes")]
    pub retain_bytes: u64,
    /// Interval at which each head is probed.
    #[serde(with = "units::duration")]
    pub probe_interval: Duration,
    /// Time without a datagram from a head after which it counts as failed.
    #[serde(with = "units::duration")]
    pub head_timeout: Duration,
    /// Time after which an unanswered task is given up with an Error.
    #[serde(with = "units::duration")]
    pub request_timeout: Duration,
    /// Time for which an answered task is known, so that a repeat of it is not a new one.
    #[serde(with = "units::duration")]
    pub answer_linger: Duration,
    /// Time limit for running tasks after SIGTERM.
    #[serde(with = "units::duration")]
    pub drain_limit: Duration,
    /// The HTTP listener for `/health`, `/ready` and `/metrics`.
    pub http: Http,
    /// Log level or filter, used if neither `--log-level` nor RUST_LOG is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_level: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: None,
            listen: mesh_base::listen::anywhere(9999),
            heads: vec!["127.0.0.1:7777".into()],
            admit: Admit::Trusted,
            trust_loopback: true,
            trusted_networks: Vec::new(),
            unverified_networks: Vec::new(),
            rate_limit: RateLimit::default(),
            max_tasks: 32_768,
            retain_bytes: 32 << 20,
            probe_interval: Duration::from_millis(500),
            head_timeout: Duration::from_millis(1_500),
            request_timeout: Duration::from_secs(300),
            answer_linger: Duration::from_secs(60),
            drain_limit: Duration::from_secs(30),
            http: Http::default(),
            log_level: None,
        }
    }
}

impl Config {
    /// Checks rules that the types cannot express.
    ///
    /// # Errors
    /// A sentence with the key, its value and what to do.
    pub fn check(&self) -> Result<(), Unsound> {
        let heads = self.heads.len();
        if heads == 0 || heads > MAX_HEADS {
            return Err(Unsound::Heads(heads));
        }
        if let Some(head) = self.heads.iter().find(|head| host_and_port(head).is_none()) {
            return Err(Unsound::Head(head.clone()));
        }
        if !(2..=MAX_TASKS).contains(&self.max_tasks) {
            return Err(Unsound::MaxTasks(self.max_tasks));
        }
        if self.probe_interval.is_zero() || self.head_timeout < self.probe_interval {
            return Err(Unsound::Probing {
                interval: self.probe_interval,
                timeout: self.head_timeout,
            });
        }
        Ok(())
    }

    /// Returns true if datagrams from `source` are served without proof that they are from there. A loopback
    /// address cannot be forged from elsewhere: the system drops such datagrams.
    #[must_use]
    pub fn knows(&self, source: IpAddr) -> bool {
        let canonical = source.to_canonical();
        let unverified = &self.unverified_networks;
        self.trusts(source)
            && (canonical.is_loopback() || unverified.iter().any(|n| n.contains(canonical)))
    }

    /// Returns true if clients at `source` are served, once they have proved their address.
    #[must_use]
    pub fn trusts(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        let mut networks = self.trusted_networks.iter();
        (self.trust_loopback && source.is_loopback())
            || networks.any(|network| network.contains(source))
    }
}

/// Sources that are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Admit {
    /// Trusted sources alone; all others get no answer.
    #[default]
    Trusted,
    /// Also sources that echo a Challenge and so show that they have the address they send from.
    Verified,
}

/// Limit on the datagrams of each source: a token bucket per IPv4 address or IPv6 /64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimit {
    /// Datagrams per second in the long run; 0 is no limit.
    pub per_second: u32,
    /// Most datagrams of a source at once.
    pub burst: u32,
    /// Sources that are kept apart at the same time; the memory for them is fixed.
    pub sources: usize,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self {
            per_second: 5_000,
            burst: 10_000,
            sources: 16_384,
        }
    }
}

/// Settings of the HTTP listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Address of the listener; there is none if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Names, besides this machine's own, under which browsers may reach it on loopback.
    pub hosts: Vec<String>,
}

/// Keys that are valid one by one and make no sense together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsound {
    /// None or too many.
    #[error("`heads` names {0} heads; name 1 to {MAX_HEADS}, as [\"host:7777\"]")]
    Heads(usize),
    /// A head is not given as `host:port`.
    #[error("`heads` contains {0:?}, which is not host:port; write it as \"head.example:7777\"")]
    Head(String),
    /// `max_tasks` is out of range.
    #[error("`max_tasks` is {0}; choose 2 to {MAX_TASKS}")]
    MaxTasks(usize),
    /// Interval of probes and timeout of heads contradict each other.
    #[error(
        "`head_timeout` ({timeout:?}) must not be shorter than `probe_interval` ({interval:?}), which must not be 0"
    )]
    Probing {
        /// Value of `probe_interval`.
        interval: Duration,
        /// Value of `head_timeout`.
        timeout: Duration,
    },
}

pub(crate) const MAX_HEADS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    #[test]
    fn a_mapped_address_is_the_address_it_maps() {
        let config = Config {
            trusted_networks: vec![network("192.168.0.0/16")],
            ..Config::default()
        };
        assert!(config.trusts("::ffff:192.168.1.1".parse().unwrap()));
        assert!(config.trusts("::ffff:127.0.0.1".parse().unwrap()));
        assert!(!config.trusts("::ffff:192.169.1.1".parse().unwrap()));
    }

    #[test]
    fn heads_that_are_not_host_and_port_are_named() {
        for head in ["head", "head:", ":7777", "head:0", "head:70000"] {
            let config = Config {
                heads: vec![head.into()],
                ..Config::default()
            };
            assert_eq!(config.check(), Err(Unsound::Head(head.into())));
        }
        assert_eq!(
            Config {
                heads: vec![],
                ..Config::default()
            }
            .check(),
            Err(Unsound::Heads(0))
        );
        assert_eq!(
            Config {
                heads: vec!["[::1]:7777".into()],
                ..Config::default()
            }
            .check(),
            Ok(())
        );
    }

    #[test]
    fn timing_that_contradicts_itself_is_refused() {
        let config = Config {
            head_timeout: Duration::from_millis(100),
            ..Config::default()
        };
        assert!(matches!(config.check(), Err(Unsound::Probing { .. })));
    }
}
