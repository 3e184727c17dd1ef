//! A plan as a table for people.

use std::collections::BTreeMap;
use std::fmt;

use super::error::size;
use super::types::{Objective, Plan, Reason};

/// A plan that is shown as a table, see [`explain`].
#[derive(Debug, Clone, Copy)]
pub struct Explanation<'a> {
    plan: &'a Plan,
    names: &'a BTreeMap<String, String>,
}

/// Shows `plan`: its stages, the nodes left out with their reasons, and the expected speed. `names` are the
/// nodes' names by id; a node without one is shown by the beginning of its id.
pub fn explain<'a>(plan: &'a Plan, names: &'a BTreeMap<String, String>) -> Explanation<'a> {
    Explanation { plan, names }
}

impl Explanation<'_> {
    fn name(&self, id: &str) -> String {
        let name = self.names.get(id).filter(|name| !name.is_empty());
        let (name, most) = name.map_or((id, 12), |name| (name.as_str(), 40));
        // Names come from other machines: nothing of them may steer a terminal.
        name.chars()
            .filter(|c| !c.is_control())
            .take(most)
            .collect()
    }
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.plan;
        let mut rows = vec![HEADINGS.map(String::from)];
        for (at, stage) in plan.stages.iter().enumerate() {
            let hop = match stage.hop_us {
                us if us > 0.0 => ms(us),
                _ => "-".into(),
            };
            rows.push([
                at.to_string(),
                format!(
                    "{}-{}",
                    stage.layers.start,
                    stage.layers.end.saturating_sub(1)
                ),
                self.name(&stage.node),
                stage
                    .standby
                    .as_ref()
                    .map_or("-".into(), |id| self.name(id)),
                size(stage.memory),
                ms(stage.decode_us),
                hop,
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
        let widths: Vec<usize> = (0..HEADINGS.len()).filter_map(width).collect();
        for row in &rows {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:<width$}"))
                .collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        for out in &plan.left_out {
            let standby = plan
                .stages
                .iter()
                .any(|stage| stage.standby.as_ref() == Some(&out.node));
            let part = if standby { "standby only" } else { "left out" };
            writeln!(f, "{part}: {}, {}", self.name(&out.node), out.reason)?;
        }
        writeln!(
            f,
            "one token {} ms, that is {:.1} a second; up to {:.1} a second with enough requests at once; KV cache for {} tokens",
            ms(plan.token_us),
            1e6 / plan.token_us,
            plan.tokens_per_second,
            plan.kv_tokens
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Reserved { purposes } => {
                let clean = |text: &String| text.chars().filter(|c| !c.is_control()).collect();
                let purposes: Vec<String> = purposes.iter().map(clean).collect();
                write!(f, "which is reserved for {}", purposes.join(", "))
            }
            Reason::UnknownSpeed => {
                f.write_str("which has not said how fast it is with this model")
            }
            Reason::TooLittleMemory { has, needs } => write!(
                f,
                "which may use {}, and one layer with the KV cache of one context needs {}",
                size(*has),
                size(*needs)
            ),
            Reason::Slower {
                objective,
                with_us,
                without_us,
            } => write!(
                f,
                "which would make {} {} ms instead of {} ms",
                match objective {
                    Objective::Latency => "a token",
                    Objective::Throughput => "the slowest stage",
                },
                ms(*with_us),
                ms(*without_us)
            ),
            Reason::NotNeeded => f.write_str("which is not needed: nothing would get better"),
            Reason::NoRoom => f.write_str("for which no layout has a place"),
        }
    }
}

/// Microseconds as milliseconds, with three digits.
fn ms(us: f64) -> String {
    match us / 1e3 {
        ms if ms < 1.0 => format!("{ms:.3}"),
        ms if ms < 10.0 => format!("{ms:.2}"),
        ms if ms < 100.0 => format!("{ms:.1}"),
        ms => format!("{ms:.0}"),
    }
}

const HEADINGS: [&str; 7] = [
    "STAGE", "LAYERS", "NODE", "STANDBY", "MEMORY", "MS/TOKEN", "HOP MS",
];

#[cfg(test)]
mod tests {
    use super::super::types::{LeftOut, PlannedStage};
    use super::*;

    #[test]
    fn a_plan_is_shown_with_names_reasons_and_totals() {
        let stage = |node: &str, layers, standby: Option<&str>, hop_us| PlannedStage {
            node: node.into(),
            layers,
            standby: standby.map(str::to_owned),
            memory: 3 << 30,
            decode_us: 4_100.0,
            hop_us,
        };
        let left_out = |node: &str, reason| LeftOut {
            node: node.into(),
            reason,
        };
        let plan = Plan {
            stages: vec![
                stage("aa", 0..14, Some("cc"), 620.0),
                stage("bb", 14..30, None, 310.0),
            ],
            left_out: vec![
                left_out(
                    "cc",
                    Reason::Slower {
                        objective: Objective::Latency,
                        with_us: 83_000.0,
                        without_us: 9_130.0,
                    },
                ),
                left_out("0123456789abcdef", Reason::UnknownSpeed),
            ],
            token_us: 9_130.0,
            tokens_per_second: 243.9,
            kv_tokens: 8192,
        };
        let names = [("aa", "attic\x1b[31m"), ("bb", "barn"), ("cc", "cellar")]
            .map(|(id, name)| (id.to_owned(), name.to_owned()));
        assert_eq!(
            explain(&plan, &names.into()).to_string(),
            "\
STAGE  LAYERS  NODE       STANDBY  MEMORY   MS/TOKEN  HOP MS
0      0-13    attic[31m  cellar   3.0 GiB  4.10      0.620
1      14-29   barn       -        3.0 GiB  4.10      0.310
standby only: cellar, which would make a token 83.0 ms instead of 9.13 ms
left out: 0123456789ab, which has not said how fast it is with this model
one token 9.13 ms, that is 109.5 a second; up to 243.9 a second with enough requests at once; KV cache for 8192 tokens
"
        );
    }

    #[test]
    fn plans_travel_as_json() {
        let plan = Plan {
            stages: Vec::new(),
            left_out: vec![LeftOut {
                node: "a".into(),
                reason: Reason::TooLittleMemory { has: 1, needs: 2 },
            }],
            token_us: 1.5,
            tokens_per_second: 2.5,
            kv_tokens: 3,
        };
        let text = serde_json::to_string(&plan).expect("text");
        assert!(
            text.contains(r#""reason":{"kind":"too_little_memory","has":1,"needs":2}"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Plan>(&text).expect("a plan"), plan);
    }
}
