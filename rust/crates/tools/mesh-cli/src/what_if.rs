//! `hydramesh plan --machines`: how equal machines that need not be there would share a model.

use std::path::Path;

use arcanum_profiler::{Candidate, Plan, Policy, place};
use mesh_engine_ort::WeightFormat;
use mesh_machine::{Estimate, estimate};
use mesh_model::Model;
use serde_json::json;

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::output::{bytes, plain, table};

/// Memory of each machine that is left to the system.
const SYSTEM: u64 = 1 << 30;

pub(crate) fn plan(args: &PlanArgs) -> Result<(), Failure> {
    let model = Model::open(Path::new(&args.model));
    let model = model.map_err(|error| Failure::failed(error.to_string()))?;
    let format = WeightFormat::suited(&model);
    let estimate = estimate(&model, format, args.bandwidth as f64);
    let plan = plan_of(&estimate, &model, args)
        .map_err(|error| Failure::failed(format!("{}: {error}", plain(&model.name()))))?;
    if args.json {
        let plan =
            serde_json::to_value(&plan).map_err(|error| Failure::failed(error.to_string()))?;
        println!(
            "{}",
            json!({"model": model.name(), "format": format.name(), "plan": plan})
        );
    } else {
        print!("{}", show(&plan, &estimate, &model, format, args));
    }
    Ok(())
}

fn plan_of(
    estimate: &Estimate,
    model: &Model,
    args: &PlanArgs,
) -> Result<Plan, arcanum_profiler::PlanError> {
    let memory = args.memory.unwrap_or(0).saturating_sub(SYSTEM);
    let machines = 1..=args.machines.unwrap_or(1);
    let candidates: Vec<Candidate> = machines
        .map(|number| Candidate {
            id: format!("machine {number:02}"),
            name: format!("machine {number}"),
            memory,
            decode_us: estimate.decode_us,
            prefill_us: estimate.decode_us,
            logits_us: estimate.logits_us,
            load: 0.0,
            reserved_for: Vec::new(),
            paths: std::collections::BTreeMap::new(),
        })
        .collect();
    let policy = Policy {
        context: args.context.min(model.config().context),
        slots: 1,
        standbys: false,
        ..Policy::default()
    };
    place(&estimate.model, &candidates, &policy)
}

fn show(
    plan: &Plan,
    estimate: &Estimate,
    model: &Model,
    format: WeightFormat,
    args: &PlanArgs,
) -> String {
    let rows: Vec<Vec<String>> = plan
        .stages
        .iter()
        .map(|stage| {
            vec![
                stage.node.clone(),
                format!(
                    "{}-{}",
                    stage.layers.start,
                    stage.layers.end.saturating_sub(1)
                ),
                bytes(stage.memory),
                format!("{:.1} ms", stage.decode_us / 1e3),
            ]
        })
        .collect();
    let spec = &estimate.model;
    let weights = spec.layer_bytes * u64::from(spec.layers) + spec.first_bytes + spec.last_bytes;
    let config = model.config();
    let active = match config.mixture {
        Some(_) => {
            let share = config.active_parameters() as f64 / config.parameters().max(1) as f64;
            format!(", of which a token reads {:.0} %", share * 100.0)
        }
        None => String::new(),
    };
    format!(
        "{}: {} of weights ({}){active}\n\n{}\nExpected: {:.1} tokens a second for one request, up to {:.1} for several at once, if each \
         machine reads {} of memory in a second. Room for {} tokens.\n",
        plain(&model.name()),
        bytes(weights),
        format.name(),
        table(&["MACHINE", "LAYERS", "MEMORY", "A TOKEN"], &rows),
        1e6 / plan.token_us.max(1.0),
        plan.tokens_per_second,
        bytes(args.bandwidth),
        plan.kv_tokens,
    )
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use mesh_model::GgmlType;
    use mesh_model::synth::{self, Shape, Tokens};

    use super::*;

    fn args(path: &Path, machines: u16) -> PlanArgs {
        PlanArgs {
            model: path.display().to_string(),
            json: false,
            machines: Some(machines),
            memory: Some(8 << 30),
            bandwidth: 15_000_000_000,
            context: 4096,
        }
    }

    #[test]
    fn three_small_machines_hold_a_mixture_that_two_do_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("Qwen3-30B-A3B.gguf");
        let header = synth::plan(&Shape::qwen3_30b_a3b(48), GgmlType::Q4_K, Tokens::Bytes);
        let mut file = File::create(&path).expect("a file");
        header.write_header(&mut file).expect("written");
        let model = Model::open(&path).expect("a header is enough");
        let estimate = estimate(&model, WeightFormat::File, 15e9);

        let three = args(&path, 3);
        let plan = plan_of(&estimate, &model, &three).expect("room");
        assert_eq!(plan.stages.len(), 3);
        assert_eq!(plan.stages[2].layers.end, 48);
        assert!(plan.stages.iter().all(|stage| stage.memory <= 7 << 30));
        // A dense model of this size reads 17 GB for a token.
        let rate = 1e6 / plan.token_us;
        assert!((4.0..12.0).contains(&rate), "{rate} tokens a second");
        let shown = show(&plan, &estimate, &model, WeightFormat::File, &three);
        assert!(shown.contains("of which a token reads 1"), "{shown}");
        assert!(shown.contains("machine 03"), "{shown}");

        let error = plan_of(&estimate, &model, &args(&path, 2)).expect_err("too small");
        let error = error.to_string();
        assert!(
            error.contains("the 2 nodes that can be used offer"),
            "{error}"
        );
        assert!(error.contains("add a node"), "{error}");
    }
}
