//! Notifications to systemd, and a watchdog that only living loops feed.
//!
//! Outside systemd every call is a no-op. The watchdog thread pets systemd only while every registered loop has beaten
//! within its own limit: a thread that pets unconditionally would vouch for a service whose loops hang.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use mesh_base::sync::lock;
use sd_notify::NotifyState;

/// Tells systemd that the service answers requests.
pub fn ready() {
    send(&[NotifyState::Ready]);
}

/// Sets the line that `systemctl status` shows.
pub fn status(line: &str) {
    send(&[NotifyState::Status(line)]);
}

/// The service takes a new configuration; [`ready`] follows when it has. With `Type=notify-reload`, systemd waits for both.
pub fn reloading() {
    // Systemd distinguishes this reload from an earlier one by the time.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "systemd was not told"),
    }
}

/// The service drains; `limit` is how long that may take, so that systemd waits as long.
pub fn stopping(limit: Duration) {
    let micros = u32::try_from(limit.as_micros()).unwrap_or(u32::MAX);
    send(&[
        NotifyState::Stopping,
        NotifyState::Status("draining"),
        NotifyState::ExtendTimeoutUsec(micros),
    ]);
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// Watches the loops of this process and feeds systemd's watchdog while all of them turn.
#[derive(Clone, Debug)]
pub struct Watchdog {
    shared: Arc<WatchdogState>,
}

impl Watchdog {
    /// Starts the feeding thread when systemd asks for a watchdog (`WatchdogSec=`); loops can be watched either way.
    pub fn start() -> Self {
        let mut micros = 0;
        let period = sd_notify::watchdog_enabled(false, &mut micros)
            .then(|| Duration::from_micros(micros) / 3);
        Self::with_feed(period, || send(&[NotifyState::Watchdog]))
    }

    /// A watchdog that calls `feed` every `period` while all loops turn.
    pub fn with_feed(period: Option<Duration>, feed: impl Fn() + Send + 'static) -> Self {
        let shared = Arc::new(WatchdogState {
            started: Instant::now(),
            loops: Mutex::default(),
        });
        if let Some(period) = period {
            let weak = Arc::downgrade(&shared);
            let spawned = std::thread::Builder::new()
                .name("watchdog".into())
                .spawn(move || feed_loop(&weak, period, &feed));
            if let Err(error) = spawned {
                tracing::warn!(%error, "no thread for the watchdog; systemd will restart this service");
            }
        }
        Self { shared }
    }

    /// Registers a loop that promises a beat at least every `limit`, idle or not. Dropping the handle ends the promise.
    pub fn register(&self, name: &str, limit: Duration) -> Heart {
        let watched = Arc::new(WatchedLoop {
            name: name.to_owned(),
            limit,
            last: AtomicU64::new(self.shared.now_ms()),
        });
        let mut loops = lock(&self.shared.loops);
        loops.retain(|watched| watched.strong_count() > 0);
        loops.push(Arc::downgrade(&watched));
        Heart {
            watched,
            shared: self.shared.clone(),
        }
    }

    /// The first loop that has been silent beyond its limit, with the length of its silence.
    pub fn stuck(&self) -> Option<(String, Duration)> {
        self.shared.stuck(self.shared.now_ms())
    }
}

/// The promise of one loop; see [`Watchdog::register`].
#[derive(Debug)]
pub struct Heart {
    watched: Arc<WatchedLoop>,
    shared: Arc<WatchdogState>,
}

impl Heart {
    /// Records a beat of the loop. Costs one clock read and one store.
    pub fn beat(&self) {
        let now = self.shared.now_ms();
        self.watched.last.store(now, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct WatchdogState {
    started: Instant,
    /// Each as long as its [`Heart`] is there.
    loops: Mutex<Vec<Weak<WatchedLoop>>>,
}

#[derive(Debug)]
struct WatchedLoop {
    name: String,
    limit: Duration,
    /// Milliseconds since `WatchdogState::started`.
    last: AtomicU64,
}

impl WatchdogState {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn stuck(&self, now_ms: u64) -> Option<(String, Duration)> {
        let loops = lock(&self.loops);
        loops.iter().filter_map(Weak::upgrade).find_map(|watched| {
            let last = watched.last.load(Ordering::Relaxed);
            let silence = Duration::from_millis(now_ms.saturating_sub(last));
            (silence > watched.limit).then(|| (watched.name.clone(), silence))
        })
    }
}

/// Feeds until every handle to `shared` is gone.
fn feed_loop(shared: &Weak<WatchdogState>, period: Duration, feed: &dyn Fn()) {
    while let Some(stuck) = shared.upgrade().map(|shared| shared.stuck(shared.now_ms())) {
        match stuck {
            None => feed(),
            Some((name, silence)) => tracing::error!(
                loop_name = name,
                ?silence,
                "loop is stuck; watchdog not fed"
            ),
        }
        std::thread::sleep(period);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn a_silent_loop_is_stuck_until_it_beats_or_leaves() {
        let watchdog = Watchdog::with_feed(None, || {});
        let router = watchdog.register("router", Duration::from_millis(50));
        let _patient = watchdog.register("janitor", Duration::from_secs(3600));
        let shared = &watchdog.shared;
        let beaten_at = router.watched.last.load(Ordering::Relaxed);
        assert_eq!(shared.stuck(beaten_at + 50), None);
        let stuck = shared.stuck(beaten_at + 51);
        assert_eq!(
            stuck,
            Some(("router".to_owned(), Duration::from_millis(51)))
        );
        drop(router);
        assert_eq!(shared.stuck(beaten_at + 51), None);
    }

    #[test]
    fn systemd_is_fed_only_while_every_loop_beats() {
        let fed = Arc::new(AtomicUsize::new(0));
        let count = fed.clone();
        let watchdog = Watchdog::with_feed(Some(Duration::from_millis(5)), move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let heart = watchdog.register("loop", Duration::from_millis(200));
        while fed.load(Ordering::SeqCst) < 3 {
            heart.beat();
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(260));
        let starved_at = fed.load(Ordering::SeqCst);
        assert!(watchdog.stuck().is_some());
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(
            fed.load(Ordering::SeqCst),
            starved_at,
            "a stuck loop must starve the watchdog"
        );
        heart.beat();
        assert_eq!(watchdog.stuck(), None);
    }
}
