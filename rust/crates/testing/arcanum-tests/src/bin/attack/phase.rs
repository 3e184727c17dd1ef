//! The results of a phase, and what the report says about them.

use std::time::Duration;

use anyhow::Result;
use arcanum_tests::report::Report;

use crate::args::Args;
use crate::honest::HonestResults;
use crate::sources::{AttackKind, AttackOutput};
use crate::verdict::{LIMIT, LiarRecord};
use crate::watch::HealthResults;

/// Results of one phase of the run.
#[derive(Debug)]
pub(crate) struct Phase {
    pub(crate) lasted: f64,
    pub(crate) served: HonestResults,
    pub(crate) health: HealthResults,
    pub(crate) head_peak: u64,
    pub(crate) worker_peaks: Vec<(String, u64)>,
    pub(crate) deaths: Vec<String>,
    pub(crate) said: Vec<(AttackKind, AttackOutput)>,
    pub(crate) liars: Vec<LiarRecord>,
    pub(crate) join: Option<Result<Duration>>,
    pub(crate) services_cpu: f64,
    pub(crate) attackers_cpu: f64,
    /// Processor time of all processes but services, attackers and this program.
    pub(crate) others_cpu: f64,
}

impl Phase {
    fn processors(&self) -> String {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let [services, attackers, others] =
            [self.services_cpu, self.attackers_cpu, self.others_cpu].map(|used| used / self.lasted);
        // Times that were measured beside other work say little.
        let busy = if others > 0.3 {
            ": THIS MACHINE IS BUSY WITH SOMETHING ELSE"
        } else {
            ""
        };
        format!(
            "by services {services:.2}, by attackers {attackers:.2}, by others {others:.2} of {cores}{busy}"
        )
    }

    pub(crate) fn judge_calm(&self, name: &str, report: &mut Report) {
        report.row(
            &format!("{name}: right answers"),
            format!("{} of {}", self.served.right, self.served.all()),
            Some(self.served.wrong.is_empty() && self.served.right > 0),
        );
        report.row(
            &format!("{name}: time to the first token"),
            self.served.first_token.to_string(),
            None,
        );
        report.row(&format!("{name}: processors used"), self.processors(), None);
        for failure in kinds(&self.served) {
            report.failure(format!("{name}: {failure}"));
        }
        report.row(
            &format!("{name}: head's memory at most"),
            mib(self.head_peak),
            None,
        );
    }

    pub(crate) fn judge(&self, name: &str, calm: &Self, args: &Args, report: &mut Report) {
        let called = |what: &str| {
            if name.is_empty() {
                what.to_owned()
            } else {
                format!("{name}: {what}")
            }
        };
        let served = &self.served;
        report.row(
            &called("right answers to honest clients"),
            format!(
                "{} of {} ({} reruns)",
                served.right,
                served.all(),
                served.reruns
            ),
            Some(served.wrong.is_empty() && served.right > 0),
        );
        for failure in kinds(served) {
            report.failure(called(&failure));
        }
        let p95 = |phase: &Phase| phase.served.first_token.percentile(95).as_secs_f64();
        let ratio = p95(self) / p95(calm).max(0.001);
        report.row(
            &called("p95 of the time to the first token / undisturbed"),
            format!(
                "{ratio:.2} (at most {}); {}",
                args.ratio, served.first_token
            ),
            Some(served.right > 0 && ratio <= args.ratio),
        );
        report.row(
            &called("head's memory at most"),
            format!("{} (at most {} MiB)", mib(self.head_peak), args.head_memory),
            Some(self.head_peak <= args.head_memory << 20),
        );
        let peaks: Vec<String> = self
            .worker_peaks
            .iter()
            .map(|(name, peak)| format!("{name} {}", mib(*peak)))
            .collect();
        let worst = self
            .worker_peaks
            .iter()
            .map(|(_, peak)| *peak)
            .max()
            .unwrap_or_default();
        report.row(
            &called("workers' memory at most"),
            format!("{} (at most {} MiB)", peaks.join(", "), args.worker_memory),
            Some(worst <= args.worker_memory << 20),
        );
        report.row(
            &called("processes that died"),
            self.deaths.len().to_string(),
            Some(self.deaths.is_empty()),
        );
        for death in &self.deaths {
            report.failure(called(death));
        }
        let failures = &self.health.failures;
        report.row(
            &called("/health, asked once a second"),
            format!(
                "{}; {} without an answer in time",
                self.health.times,
                failures.len()
            ),
            Some(failures.is_empty()),
        );
        if let Some((at, why)) = failures.first() {
            report.failure(called(&format!("/health, first after {at:.0} s: {why}")));
        }
        match &self.join {
            Some(Ok(took)) => report.row(
                &called("a new machine joins meanwhile"),
                format!("in {} ms (at most {JOIN_LIMIT:?})", took.as_millis()),
                Some(*took <= JOIN_LIMIT),
            ),
            Some(Err(error)) => report.row(
                &called("a new machine joins meanwhile"),
                format!("{error:#}"),
                Some(false),
            ),
            None => {}
        }
        for liar in &self.liars {
            let good = liar
                .can_be_judged()
                .then(|| liar.lie.answers_right() || liar.is_out());
            report.row(
                &called(&format!("{} is out within {LIMIT:?}", liar.name)),
                liar.describe(),
                good,
            );
        }
        for (source, said) in &self.said {
            // Words in capitals mark events that must not happen.
            let bad = ["TASKS OF CLIENTS", "JOINED", "WELCOMED"];
            let good = !bad.iter().any(|word| said.summary.contains(word));
            let summary = match source {
                AttackKind::Rogue(_) => liar_summary(said),
                _ => said.summary.clone(),
            };
            if said.lines.is_empty() && !said.summary.starts_with("SKIPPED") {
                report.failure(format!(
                    "{source} said nothing: it did not run ({})",
                    said.summary
                ));
            }
            report.row(
                &called(&format!("attack {source}")),
                summary,
                (!good).then_some(false),
            );
        }
        report.row(&called("processors used"), self.processors(), None);
    }
}

pub(crate) fn compare(after: &Phase, calm: &Phase, report: &mut Report) {
    let p95 = |phase: &Phase| phase.served.first_token.percentile(95).as_secs_f64();
    let ratio = p95(after) / p95(calm).max(0.001);
    let quiet = if (0.5..2.0).contains(&ratio) {
        ""
    } else {
        ": this machine was not quiet, or something stayed behind"
    };
    report.row(
        "p95 of the time to the first token, afterwards / before",
        format!("{ratio:.2}{quiet}"),
        None,
    );
}

fn kinds(served: &HonestResults) -> Vec<String> {
    let kinds = served.wrong_by_kind().into_iter();
    kinds
        .map(|(count, first, words)| {
            format!("{count} answers, the first after {first:.1} s: {words}")
        })
        .collect()
}

fn liar_summary(said: &AttackOutput) -> String {
    let count = |event: &str| {
        said.lines
            .iter()
            .filter(|line| line["event"] == event)
            .count()
    };
    let ended = said
        .lines
        .iter()
        .rev()
        .find(|line| line["event"] == "ended");
    let ended = ended
        .and_then(|line| line["reason"].as_str())
        .unwrap_or("none");
    format!(
        "welcomed {} times, asked {} times; the last end of a link: {ended}",
        count("welcomed"),
        count("asked")
    )
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// Longest time to join.
pub(crate) const JOIN_LIMIT: Duration = Duration::from_secs(5);
