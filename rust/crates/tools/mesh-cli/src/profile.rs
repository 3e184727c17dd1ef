//! `hydramesh profile`: how fast this machine is, as a worker would tell its head.

use arcanum_profiler::{LayerSpeed, Profile};
use mesh_engine_ort::{AdapterKind, WeightFormat};
use mesh_kernels::Isa;
use mesh_machine::measure::FormatChoice;
use mesh_machine::{ProfileOptions, Profiler, choose_format};
use mesh_model::Model;
use serde_json::json;

use crate::args::ProfileArgs;
use crate::failure::Failure;
use crate::output::{Facts, Terminal, bytes, table};

pub(crate) fn run(args: ProfileArgs, terminal: Terminal) -> Result<(), Failure> {
    if let Some(dir) = &args.state_dir
        && !dir.is_dir()
    {
        let hint = "Create it, or leave --state-dir out to measure without keeping anything.";
        return Err(Failure::failed(format!("{} is not a folder", dir.display())).hint(hint));
    }
    let model = args.file.as_ref().map(Model::open).transpose();
    let model = model.map_err(|error| Failure::failed(error.to_string()))?;
    let options = ProfileOptions {
        state_dir: args.state_dir,
        model: args.file,
        threads: args.threads.map_or(0, usize::from),
        library: args.runtime,
        ..ProfileOptions::default()
    };
    if let Err(error) = Isa::requested() {
        eprintln!("{error}; taking the fastest");
    }
    let mut profiler = Profiler::take(options);
    if let Some(why) = &profiler.profile.remeasured {
        eprintln!("measured again, since {why}");
    }
    let mut speeds = Vec::new();
    if let Some(model) = &model {
        for format in FORMATS {
            let speed = profiler.layers(model, format);
            speeds.push(speed.map_err(|error| Failure::failed(error.to_string()))?);
        }
    }
    let profile = &profiler.profile;
    let choice = choose_format(&speeds);
    let available: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
    let vulkan = vulkan();
    if args.json {
        let mut object = json!(profile);
        object["available_isas"] = json!(available);
        object["vulkan"] = json!(vulkan);
        // The profile may keep other models' speeds, too.
        object["speeds"] = json!(speeds);
        if let Some(choice) = &choice {
            object["format"] = choice.format.name().into();
            object["reason"] = choice.reason.as_str().into();
        }
        println!("{object}");
        return Ok(());
    }
    print!("{}", machine(profile, &available, &vulkan, terminal));
    if let (Some(model), Some(choice)) = (&model, &choice) {
        print!("\n{}", layers(&model.name(), &speeds, choice, terminal));
    }
    Ok(())
}

/// The Vulkan devices of this machine, each with its use for a worker with the WebGPU plugin.
fn vulkan() -> Vec<String> {
    let adapters = mesh_engine_ort::adapters(None);
    // Most machines without a GPU have no loader, and need none.
    let adapters = adapters.unwrap_or_default().into_iter();
    adapters
        .map(|adapter| match adapter.kind {
            AdapterKind::Software => format!("{adapter}, not used"),
            _ if adapter.half => format!("{adapter}, for WebGPU in f16"),
            _ => format!("{adapter}, for WebGPU in f32"),
        })
        .collect()
}

/// `available` are the instruction sets that this machine's kernels could use, `vulkan` the lines of [`vulkan`].
fn machine(profile: &Profile, available: &[&str], vulkan: &[String], terminal: Terminal) -> String {
    let key = &profile.key;
    let rate = |value: f64| match value {
        value if value > 0.0 => format!("{}/s", bytes(value as u64)),
        _ => "unknown".to_owned(),
    };
    let mut text = Facts::new(terminal);
    text.line("processor", format!("{}, {} threads", key.cpu, key.threads));
    text.line(
        "kernels",
        format!("{}, out of {}", key.isa, available.join(", ")),
    );
    text.line(
        "memory",
        format!(
            "{}, {} of it for models, read at {}",
            bytes(profile.memory_total),
            bytes(profile.memory_available),
            rate(profile.memory_bandwidth)
        ),
    );
    if profile.disk_read > 0.0 {
        text.line("disk", format!("read at {}", rate(profile.disk_read)));
    }
    for gpu in profile.gpus.iter().filter_map(|gpu| gpu.reported.as_ref()) {
        let (total, free) = (bytes(gpu.vram_total), bytes(gpu.vram_free));
        text.line("graphics", format!("{}, {total}, {free} free", gpu.name));
    }
    for adapter in vulkan {
        text.line("vulkan", adapter);
    }
    let load = profile.load;
    text.line(
        "load",
        format!("{load:.2} other processes ready to run per core"),
    );
    text.text
}

fn layers(name: &str, speeds: &[LayerSpeed], choice: &FormatChoice, terminal: Terminal) -> String {
    let rows: Vec<Vec<String>> = speeds
        .iter()
        .map(|speed| {
            let token_us = speed.decode_us * f64::from(speed.layers) + speed.logits_us;
            vec![
                speed.format.clone(),
                bytes(speed.layer_bytes),
                format!("{:.0} µs", speed.decode_us),
                format!("{:.0} µs", speed.prefill_us),
                format!("{:.0} µs", speed.logits_us),
                format!("{:.1} tok/s", 1e6 / token_us),
            ]
        })
        .collect();
    let count = speeds.first().map_or(0, |speed| speed.layers);
    format!(
        "{}, {count} layers; times are those of one layer\n{}{} {}, since {}\n",
        terminal.bold(name),
        table(&HEADINGS, &rows),
        terminal.dim("format"),
        terminal.bold(choice.format.name()),
        choice.reason
    )
}

const HEADINGS: [&str; 6] = [
    "WEIGHTS",
    "A LAYER",
    "DECODE ROW",
    "PREFILL ROW",
    "LOGITS",
    "WHOLE MODEL",
];

/// The formats that differ for a file of any kind: 4-bit files are most common, and their own format is `Int4` then.
const FORMATS: [WeightFormat; 2] = [WeightFormat::File, WeightFormat::Int8];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Color;

    #[test]
    fn a_person_sees_the_speeds_and_the_choice() {
        let speed = |format: &str, decode_us| LayerSpeed {
            fingerprint: String::new(),
            format: format.into(),
            layers: 30,
            hidden: 576,
            layer_bytes: 2_060_000,
            first_bytes: 0,
            last_bytes: 0,
            kv_bytes: 768,
            decode_us,
            prefill_us: 20.0,
            logits_us: 1000.0,
        };
        let speeds = [speed("file", 100.0), speed("int8", 150.0)];
        let choice = choose_format(&speeds).expect("a choice");
        assert_eq!(
            layers("small", &speeds, &choice, Terminal::new(Color::Never)),
            "\
small, 30 layers; times are those of one layer
WEIGHTS  A LAYER  DECODE ROW  PREFILL ROW  LOGITS   WHOLE MODEL
file     2.1 MB   100 µs      20 µs        1000 µs  250.0 tok/s
int8     2.1 MB   150 µs      20 µs        1000 µs  181.8 tok/s
format file, since a row takes 100 µs a layer with file weights, int8 takes 150 µs
"
        );
        let mut profile = Profiler::take(ProfileOptions {
            threads: 1,
            ..ProfileOptions::default()
        })
        .profile;
        profile.gpus.clear();
        profile.memory_total = 8_000_000_000;
        profile.memory_available = 7_000_000_000;
        profile.memory_bandwidth = 22e9;
        profile.load = 0.5;
        profile.key.cpu = "Some CPU".into();
        profile.key.isa = "avx2".into();
        assert_eq!(
            machine(
                &profile,
                &["scalar", "avx2"],
                &["Some Radeon, for WebGPU in f16".into()],
                Terminal::new(Color::Never)
            ),
            "processor  Some CPU, 1 threads\n\
             kernels    avx2, out of scalar, avx2\n\
             memory     8.00 GB, 7.00 GB of it for models, read at 22.00 GB/s\n\
             vulkan     Some Radeon, for WebGPU in f16\n\
             load       0.50 other processes ready to run per core\n"
        );
    }
}
