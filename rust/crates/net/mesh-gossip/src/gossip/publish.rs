//! Records of this node.

use std::time::Duration;

use super::Gossip;
use crate::clock::Now;
use crate::store::{Key, StoreError, Topic};
use crate::threats::{Sighting, THREAT_LIFE};

impl Gossip {
    /// Tells every peer of a sighting, unless it was told of this kind and subject already.
    ///
    /// # Errors
    /// If this node has published too many.
    pub fn sight(
        &mut self,
        (kind, subject, detail): (&str, &str, &str),
        now: Now,
    ) -> Result<(), StoreError> {
        let name = Sighting::name(kind, subject);
        let key = Key::new(Topic::Threats, self.own_id(), &name);
        let known = self.store.get(key);
        if known.is_some_and(|known| Sighting::read(known).is_some()) {
            return Ok(());
        }
        let value = Sighting::encode(kind, subject, detail, now.unix);
        self.publish((Topic::Threats, &name, value), THREAT_LIFE, now)
    }

    /// Withdraws a sighting of this node.
    ///
    /// # Errors
    /// If this node has published too many.
    pub fn withdraw(&mut self, kind: &str, subject: &str, now: Now) -> Result<(), StoreError> {
        let name = Sighting::name(kind, subject);
        let key = Key::new(Topic::Threats, self.own_id(), &name);
        match self.store.get(key) {
            Some(_) => self.publish((Topic::Threats, &name, Vec::new()), THREAT_LIFE, now),
            None => Ok(()),
        }
    }

    /// Publishes a record that every node keeps for `life`, at most 30 days. Unchanged values are published again when half
    /// of their life is over.
    ///
    /// # Errors
    /// If the name or value is too long, or this node has published too many.
    pub fn remember(
        &mut self,
        name: &[u8],
        value: &[u8],
        life: Duration,
        now: Now,
    ) -> Result<(), StoreError> {
        let key = Key::new(Topic::Memory, self.own_id(), name);
        let fresh_until = now.unix.saturating_add(life.as_secs() / 2);
        let known = self.store.get(key);
        if known.is_some_and(|known| known.value == value && known.expires > fresh_until) {
            return Ok(());
        }
        self.publish((Topic::Memory, name, value.to_vec()), life, now)
    }

    fn publish(
        &mut self,
        what: (Topic, &[u8], Vec<u8>),
        life: Duration,
        now: Now,
    ) -> Result<(), StoreError> {
        let expires = now.unix.saturating_add(life.as_secs());
        let times = (expires, self.pushes(), now.unix);
        self.store.publish(&self.mesh, &self.key, what, times)?;
        self.hasten(now.instant);
        Ok(())
    }
}
