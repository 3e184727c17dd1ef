//! A hub, a client that loses patience quickly, and files to fetch.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_hub::{Hub, HubError, RetryPolicy, Secret, Settings, Sink, Watch};
use mesh_testkit::hub::TestHub;

pub(crate) const ID: &str = "acme/tiny";

/// Settings for `hub` with pauses of milliseconds.
pub(crate) fn settings(hub: &TestHub) -> Settings {
    let mut settings = Settings::at(&hub.endpoint()).unwrap();
    settings.stall = Duration::from_millis(400);
    settings.retry = RetryPolicy {
        attempts: 4,
        base: Duration::from_millis(4),
        longest: Duration::from_millis(20),
        patience: Duration::from_secs(3),
        progress: 64 << 10,
    };
    settings
}

pub(crate) fn client(hub: &TestHub) -> Hub {
    Hub::new(settings(hub)).unwrap()
}

pub(crate) fn client_with_token(hub: &TestHub, token: &str) -> Hub {
    let mut settings = settings(hub);
    settings.token = Some((Secret::new(token), "HF_TOKEN".to_owned()));
    Hub::new(settings).unwrap()
}

/// Bytes that no compression and no accident makes alike.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// A file in memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory(pub(crate) Arc<Mutex<Vec<u8>>>);

impl Memory {
    pub(crate) fn of(len: usize) -> Self {
        Memory(Arc::new(Mutex::new(vec![0; len])))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Sink for Memory {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), HubError> {
        let mut held = self.0.lock().unwrap();
        let offset = offset as usize;
        held[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// Notes what it was told.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub(crate) pauses: Mutex<Vec<(String, Duration)>>,
    pub(crate) arrived: Mutex<u64>,
    pub(crate) planned: Mutex<Option<(u64, u64)>>,
}

impl Watch for Notes {
    fn planned(&self, missing: u64, present: u64) {
        *self.planned.lock().unwrap() = Some((missing, present));
    }

    fn arrived(&self, bytes: u64) {
        *self.arrived.lock().unwrap() += bytes;
    }

    fn waiting(&self, reason: &str, pause: Duration) {
        self.pauses.lock().unwrap().push((reason.to_owned(), pause));
    }
}
