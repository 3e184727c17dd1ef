//! Output of `tracing` events: to the journal, to a terminal, or as JSON lines.

use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::CommonArgs;

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// The journal when stderr is connected to it, else text.
    #[default]
    Auto,
    /// Text on stderr.
    Human,
    /// One JSON object per line on stderr.
    Json,
    /// The systemd journal, with fields.
    Journal,
}

/// Errors of setting up logging.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The filter is not valid.
    #[error(
        "log filter `{filter}` is not valid: {reason}; use a level such as debug, or target=level pairs"
    )]
    Filter {
        /// Text of the filter.
        filter: String,
        /// Error from the filter's parser.
        reason: String,
    },
    /// The journal was selected but is not available.
    #[error("cannot reach the systemd journal: {0}; use --log-format human")]
    Journal(std::io::Error),
    /// Another subscriber is in place.
    #[error("logging was set up twice")]
    AlreadySet,
}

/// Sets up logging for the whole process; `service` becomes the journal's identifier. `configured` is the filter in the
/// service's configuration, for where neither the flag nor RUST_LOG is set.
pub fn init(
    service: &str,
    args: &CommonArgs,
    configured: Option<&str>,
) -> Result<(), TelemetryError> {
    let (filter, handle) = reload::Layer::new(given(args, configured)?);
    Registry::default()
        .with(output(service, args.log_format)?.with_filter(filter))
        .try_init()
        .map_err(|_| TelemetryError::AlreadySet)?;
    // It was set up just now, and only once.
    let _ = FILTER.set(handle);
    Ok(())
}

/// Changes the log filter to that of a new configuration. The flag and RUST_LOG take precedence, so nothing
/// changes if one is set.
pub fn reload(args: &CommonArgs, configured: Option<&str>) -> Result<(), TelemetryError> {
    let filter = given(args, configured)?;
    match FILTER.get() {
        Some(handle) => handle
            .reload(filter)
            .map_err(|_| TelemetryError::AlreadySet),
        // Logging was never set up.
        None => Ok(()),
    }
}

/// Checks that the filter in a configuration is valid.
pub fn check(configured: Option<&str>) -> Result<(), TelemetryError> {
    filter(None, None, configured).map(|_| ())
}

fn given(args: &CommonArgs, configured: Option<&str>) -> Result<EnvFilter, TelemetryError> {
    let environment = std::env::var("RUST_LOG").ok();
    filter(
        args.log_level.as_deref(),
        environment.as_deref(),
        configured,
    )
}

/// The filter in effect: the flag, else the environment, else the configuration, else [`DEFAULT_FILTER`].
fn filter(
    flag: Option<&str>,
    environment: Option<&str>,
    configured: Option<&str>,
) -> Result<EnvFilter, TelemetryError> {
    let mut given = [flag, environment, configured].into_iter().flatten();
    let filter = given.find(|filter| !filter.trim().is_empty());
    let filter = filter.unwrap_or(DEFAULT_FILTER);
    EnvFilter::builder()
        .parse(filter)
        .map_err(|error| TelemetryError::Filter {
            filter: filter.to_owned(),
            reason: error.to_string(),
        })
}

/// The filter in use, to change it.
static FILTER: OnceLock<Handle<EnvFilter, Registry>> = OnceLock::new();

fn output(
    service: &str,
    format: LogFormat,
) -> Result<Box<dyn Layer<Registry> + Send + Sync>, TelemetryError> {
    let journal = || {
        tracing_journald::layer()
            .map(|layer| layer.with_syslog_identifier(format!("mesh-{service}")))
    };
    let text = || {
        let colour = std::io::stderr().is_terminal();
        // An error of the log cannot be logged. Told on standard error it would be a panic once the terminal is gone.
        tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .log_internal_errors(false)
            .with_ansi(colour)
            .boxed()
    };
    Ok(match format {
        LogFormat::Human => text(),
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .log_internal_errors(false)
            .json()
            .flatten_event(true)
            .boxed(),
        LogFormat::Journal => journal().map_err(TelemetryError::Journal)?.boxed(),
        LogFormat::Auto if stderr_is_journal() => journal().map_or_else(|_| text(), Layer::boxed),
        LogFormat::Auto => text(),
    })
}

/// True if systemd connected stderr to the journal: `JOURNAL_STREAM` holds the device and inode of the socket
/// (systemd.exec(5)); a redirected stderr has others.
fn stderr_is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = std::fs::metadata("/proc/self/fd/2");
    let place = stderr.ok().map(|stderr| (stderr.dev(), stderr.ino()));
    place.is_some() && parse_journal_stream(&stream) == place
}

fn parse_journal_stream(stream: &str) -> Option<(u64, u64)> {
    let (device, inode) = stream.split_once(':')?;
    Some((device.parse().ok()?, inode.parse().ok()?))
}

/// Default filter. Errors of quinn's sockets about a lost peer are logged by the owner of its link.
const DEFAULT_FILTER: &str = "info,quinn_udp=error";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_wins_over_the_environment_and_that_over_the_configuration() {
        let shown = |flag, environment, configured| {
            let filter = filter(flag, environment, configured).expect("valid");
            filter.to_string()
        };
        assert_eq!(shown(Some("debug"), Some("warn"), Some("error")), "debug");
        assert_eq!(shown(None, Some("warn"), Some("error")), "warn");
        assert_eq!(shown(None, Some(" "), Some("error")), "error");
        for default in [shown(None, Some(" "), None), shown(None, None, Some(""))] {
            assert!(
                default.split(',').any(|directive| directive == "info"),
                "{default}"
            );
        }
    }

    #[test]
    fn a_bad_filter_is_named() {
        let error = filter(Some("mesh=loud=really"), None, None)
            .expect_err("not a filter")
            .to_string();
        assert!(error.contains("mesh=loud=really"), "{error}");
    }

    #[test]
    fn journal_stream_is_device_and_inode() {
        assert_eq!(parse_journal_stream("9:1234"), Some((9, 1234)));
        assert_eq!(parse_journal_stream("9"), None);
        assert_eq!(parse_journal_stream("a:b"), None);
    }
}
