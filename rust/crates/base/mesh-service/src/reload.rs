//! Reloading: the configuration and the files that it names are read again, and reloadable keys are applied.
//!
//! A service names the keys that it can apply. Every other key that has changed is named in the log as one that needs a restart.
//! A configuration that cannot be read or contradicts itself changes nothing.

use std::fmt::Display;

use serde::Serialize;

use crate::config::{ConfigError, table};
use crate::notify;
use crate::shutdown::Shutdown;

/// Holds the configuration in effect, and reads the new one.
pub struct Reloader<T> {
    read: Box<dyn Fn() -> anyhow::Result<T> + Send>,
    running: toml::Table,
}

impl<T: Serialize> Reloader<T> {
    /// `running` is the configuration in effect; `read` reads and checks the new one.
    ///
    /// # Errors
    /// If the configuration cannot be written as TOML, which it was read from.
    pub fn new(
        running: &T,
        read: impl Fn() -> anyhow::Result<T> + Send + 'static,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            read: Box::new(read),
            running: table(running)?,
        })
    }

    /// Reads the configuration again, and has `apply` put the `live` keys into effect and read files again.
    pub fn reload(&mut self, live: &[&str], apply: impl FnOnce(&T, &mut Report)) -> Report {
        let mut report = Report::default();
        let read = (self.read)().and_then(|value| Ok((table(&value)?, value)));
        let (fresh, value) = match read {
            Ok(read) => read,
            Err(error) => {
                report.failed.push(format!("configuration: {error:#}"));
                return report;
            }
        };
        let keys = differences(&self.running, &fresh).into_iter();
        (report.applied, report.restart) = keys.partition(|key| live.contains(&key.as_str()));
        let changed = report.applied.clone();
        apply(&value, &mut report);
        for key in &changed {
            copy(key, &fresh, &mut self.running);
        }
        report
    }
}

/// The result of a reload, for the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Keys that now have their configured values.
    pub applied: Vec<String>,
    /// Keys that have changed and need a restart.
    pub restart: Vec<String>,
    /// Keys that could not be applied, with the reason: they stay as they were.
    pub failed: Vec<String>,
}

impl Report {
    /// The outcome of one step.
    pub fn step<E: Display>(&mut self, what: &str, outcome: Result<bool, E>) {
        match outcome {
            Ok(true) => self.applied.push(what.to_owned()),
            Ok(false) => {}
            Err(error) => self.failed.push(format!("{what}: {error}")),
        }
    }

    fn log(&self) {
        for failure in &self.failed {
            tracing::error!("not reloaded, the old one stays in use: {failure}");
        }
        if !self.restart.is_empty() {
            let keys = self.restart.join(", ");
            tracing::warn!("changed but needs a restart: {keys}");
        }
        if self.applied.is_empty() {
            tracing::info!("reloaded: nothing that is in use has changed");
        } else {
            tracing::info!("reloaded: {}", self.applied.join(", "));
        }
    }
}

/// Reloads on every request, without end, and reports to systemd and the log.
pub async fn follow(shutdown: Shutdown, mut reload: impl FnMut() -> Report) {
    loop {
        shutdown.reload_asked().await;
        if shutdown.is_draining() {
            tracing::info!("not reloading: the service is shutting down");
            continue;
        }
        notify::reloading();
        reload().log();
        notify::ready();
    }
}

/// The dotted keys whose values differ, in order.
fn differences(old: &toml::Table, new: &toml::Table) -> Vec<String> {
    fn collect(old: &toml::Table, new: &toml::Table, prefix: &str, keys: &mut Vec<String>) {
        let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for name in names {
            let key = crate::config::join(prefix, name);
            match (old.get(name), new.get(name)) {
                (Some(toml::Value::Table(old)), Some(toml::Value::Table(new))) => {
                    collect(old, new, &key, keys);
                }
                (old, new) if old == new => {}
                _ => keys.push(key),
            }
        }
    }
    let mut keys = Vec::new();
    collect(old, new, "", &mut keys);
    keys
}

/// Copies the value of `key` from `from` to `to`.
fn copy(key: &str, from: &toml::Table, to: &mut toml::Table) {
    let (name, rest) = key.split_once('.').unwrap_or((key, ""));
    match (from.get(name), to.get_mut(name)) {
        (Some(toml::Value::Table(from)), Some(toml::Value::Table(to))) if !rest.is_empty() => {
            copy(rest, from, to);
        }
        (Some(value), _) => {
            to.insert(name.to_owned(), value.clone());
        }
        (None, _) => {
            to.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::{Arc, Mutex};

    use serde::Deserialize;

    use super::*;

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Config {
        level: Option<String>,
        http: Http,
    }

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Http {
        port: u16,
        keys: Option<String>,
    }

    fn reloader() -> (Reloader<Config>, Arc<Mutex<Option<Config>>>) {
        let file = Arc::new(Mutex::new(Some(Config::default())));
        let read = file.clone();
        let reloader = Reloader::new(&Config::default(), move || {
            let config = read.lock().unwrap().clone();
            config.ok_or_else(|| anyhow::anyhow!("unknown key `levl`"))
        });
        (reloader.unwrap(), file)
    }

    const LIVE: [&str; 2] = ["level", "http.keys"];

    #[test]
    fn what_can_be_applied_is_told_from_what_needs_a_restart() {
        let (mut reloader, file) = reloader();
        let mut reload = || {
            let report = reloader.reload(&LIVE, |_, _| {});
            (report.applied, report.restart)
        };
        assert_eq!(reload(), (vec![], vec![]));
        let new = Config {
            level: Some("debug".into()),
            http: Http {
                port: 9,
                keys: Some("a".into()),
            },
        };
        *file.lock().unwrap() = Some(new);
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            reload(),
            (keys(&["http.keys", "level"]), keys(&["http.port"]))
        );
        // A change that was applied is not reported again; one that needs a restart is.
        assert_eq!(reload(), (vec![], keys(&["http.port"])));
        *file.lock().unwrap() = Some(Config::default());
        assert_eq!(reload(), (keys(&["http.keys", "level"]), vec![]));
    }

    #[test]
    fn a_bad_configuration_is_an_error_and_changes_nothing() {
        let (mut reloader, file) = reloader();
        *file.lock().unwrap() = None;
        let report = reloader.reload(&LIVE, |_, _| panic!("nothing to apply"));
        assert!(report.failed[0].contains("levl"), "{report:?}");
        assert!(report.applied.is_empty() && report.restart.is_empty());
    }

    #[tokio::test]
    async fn reloads_come_one_after_the_other_and_none_during_a_drain() {
        let shutdown = Shutdown::manual(std::time::Duration::from_secs(1));
        let count = Rc::new(Cell::new(0));
        let counted = count.clone();
        let following = follow(shutdown.clone(), move || {
            counted.set(counted.get() + 1);
            Report::default()
        });
        let asking = async {
            for _ in 0..3 {
                shutdown.ask_reload();
                tokio::task::yield_now().await;
            }
            shutdown.begin();
            shutdown.ask_reload();
            tokio::task::yield_now().await;
        };
        tokio::select! {
            () = following => {}
            () = asking => {}
        }
        assert!((1..=3).contains(&count.get()), "{}", count.get());
    }
}
