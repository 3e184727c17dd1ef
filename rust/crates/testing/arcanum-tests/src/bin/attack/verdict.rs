//! Decides if a liar is out, from the views of the head and of the liar.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use arcanum_tests::rogue::Lie;

use crate::sources::Attack;

/// Time after which a liar must be out.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Observations of one liar.
#[derive(Debug)]
pub(crate) struct LiarRecord {
    pub(crate) lie: Lie,
    /// Name in its certificate.
    pub(crate) name: String,
    started: Instant,
    /// Questions of honest clients that had reached it when it was last looked at.
    asked: usize,
    last_asked: Option<Duration>,
    /// Time at which the head last considered it ready.
    last_ready: Option<Duration>,
    /// Its current state, in the head's words.
    state: String,
}

impl LiarRecord {
    pub(crate) fn new(lie: Lie, name: String) -> Self {
        Self {
            lie,
            name,
            started: Instant::now(),
            asked: 0,
            last_asked: None,
            last_ready: None,
            state: "never seen".to_owned(),
        }
    }

    /// Reads the liar's log and the head's registry.
    pub(crate) fn look(
        &mut self,
        attack: &Attack,
        registry: Option<&mesh_api::Mesh>,
        honest: &HashSet<String>,
    ) {
        let now = self.started.elapsed();
        let lines = attack.lines();
        let asked = lines.iter().filter(|line| {
            let question = line["question"].as_str().unwrap_or_default();
            line["event"] == "asked" && honest.contains(question)
        });
        let asked = asked.count();
        if asked > self.asked {
            self.asked = asked;
            self.last_asked = Some(now);
        }
        let Some(registry) = registry else { return };
        let mut workers = registry.workers.iter();
        match workers.find(|worker| worker.name == self.name) {
            Some(worker) => {
                self.state = worker.state.to_string();
                if worker.state == "ready" {
                    self.last_ready = Some(now);
                }
            }
            None if self.state != "never seen" => "gone".clone_into(&mut self.state),
            None => {}
        }
    }

    /// True if it was watched for long enough to judge.
    pub(crate) fn can_be_judged(&self) -> bool {
        self.started.elapsed() > LIMIT + Duration::from_secs(2)
    }

    /// True if, after the limit, no question reached it and the head did not consider it ready.
    pub(crate) fn is_out(&self) -> bool {
        let early = |moment: Option<Duration>| moment.is_none_or(|moment| moment <= LIMIT);
        early(self.last_asked) && early(self.last_ready)
    }

    pub(crate) fn describe(&self) -> String {
        let after = |moment: Option<Duration>| {
            moment.map_or_else(
                || "never".to_owned(),
                |moment| format!("{:.0} s", moment.as_secs_f64()),
            )
        };
        format!(
            "{} honest questions, the last after {}; counted on until {}; now {}",
            self.asked,
            after(self.last_asked),
            after(self.last_ready),
            self.state
        )
    }
}
