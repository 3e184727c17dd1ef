//! Layers of the real SmolLM2-135M-Instruct, measured.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arcanum_profiler::{Candidate, ModelSpec, Policy, place};
use mesh_engine::{LogitRows, Segment, Stage, StageInput};
use mesh_engine_ort::{OrtOptions, OrtStage, WeightFormat};
use mesh_machine::{ProfileOptions, Profiler, choose_format, measure_layers};
use mesh_model::Model;
use mesh_proto::{ModelCard, NodeProfile};
use mesh_testkit::paths;

/// Keeps timed tests from running at the same time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options() -> ProfileOptions {
    ProfileOptions {
        library: Some(paths::ort_library().unwrap()),
        model: Some(paths::smollm2().unwrap()),
        threads: 2,
        ..ProfileOptions::default()
    }
}

/// Microseconds of a decode row through the whole model, median.
fn whole_model(model: &Model, options: &ProfileOptions) -> (f64, u64) {
    let options = OrtOptions {
        library: options.library.clone(),
        threads: options.threads,
        slots: 1,
        context: 256,
        ..OrtOptions::default()
    };
    let mut stage = OrtStage::load(model, 0..model.config().layers, options).unwrap();
    let mut times: Vec<f64> = (0..120)
        .map(|position| {
            let segment = Segment {
                slot: 0,
                position,
                rows: 1,
                logits: LogitRows::Last,
            };
            let start = Instant::now();
            stage
                .forward(&[segment], StageInput::Tokens(&[42]))
                .unwrap();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[60], stage.info().weight_bytes)
}

#[test]
fn layers_are_as_fast_as_they_are_in_the_whole_model() {
    let _alone = alone();
    let model = Model::open(paths::smollm2().unwrap()).unwrap();
    model.fingerprint().unwrap();
    let options = options();
    // The machine may be busy: the best of three.
    let mut ratios = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        let speed = measure_layers(&model, WeightFormat::File, &options).unwrap();
        let took = start.elapsed();
        let (whole_us, whole_bytes) = whole_model(&model, &options);
        println!("{speed:?} in {took:?}; the whole model {whole_us} µs, {whole_bytes} bytes");
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert_eq!((speed.layers, speed.hidden, speed.kv_bytes), (30, 576, 768));
        // The embedding is tied: counted for the first stage and for the last, held once by a whole model.
        let bytes = speed.layer_bytes * 30 + speed.last_bytes;
        assert!(
            bytes.abs_diff(whole_bytes) < whole_bytes / 20,
            "{bytes}, {whole_bytes}"
        );
        assert!(speed.prefill_us < speed.decode_us, "{speed:?}");
        let ratio = (speed.decode_us * 30.0 + speed.logits_us) / whole_us;
        ratios.push(ratio);
        if (0.75..1.33).contains(&ratio) {
            return;
        }
    }
    panic!("the parts take {ratios:?} of the whole");
}

#[test]
fn measurements_are_kept_and_make_an_offer_that_can_be_placed() {
    let _alone = alone();
    let state = tempfile::tempdir().unwrap();
    let options = ProfileOptions {
        state_dir: Some(state.path().to_owned()),
        ..options()
    };
    let model = Model::open(paths::smollm2().unwrap()).unwrap();
    let mut first = Profiler::take(options.clone());
    assert!(first.profile.disk_read > 0.0, "{first:?}");
    let speeds: Vec<_> = [WeightFormat::File, WeightFormat::Int8]
        .into_iter()
        .map(|format| first.layers(&model, format).unwrap())
        .collect();
    // 34 bytes instead of 20 for 32 weights.
    assert!(speeds[1].layer_bytes > speeds[0].layer_bytes * 3 / 2);
    let choice = choose_format(&speeds).unwrap();
    println!("{}: {}", choice.format.name(), choice.reason);
    assert!(choice.reason.contains("file") && choice.reason.contains("int8"));

    let mut again = Profiler::take(options);
    assert_eq!(again.profile.speeds, speeds);
    assert_eq!(again.profile.disk_read, first.profile.disk_read);
    let start = Instant::now();
    let kept = again.layers(&model, WeightFormat::File).unwrap();
    assert!(
        start.elapsed() < Duration::from_millis(100),
        "measured again"
    );

    let card = ModelCard {
        name: model.name(),
        ..ModelCard::default()
    };
    let offer = kept.offer(card);
    let candidate =
        Candidate::from_offer("id", "attic", &NodeProfile::from(&again.profile), &offer);
    let spec = ModelSpec::try_from(&offer).unwrap();
    let plan = place(&spec, &[candidate], &Policy::default()).unwrap();
    assert_eq!(plan.stages[0].layers, 0..30);
    assert!((500.0..500_000.0).contains(&plan.token_us), "{plan:?}");
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_it_is_loaded() {
    let root = tempfile::tempdir().unwrap();
    let model = Model::open(paths::smollm2().unwrap()).unwrap();
    std::fs::create_dir(root.path().join("proc")).unwrap();
    let text = "MemTotal: 40000 kB\nMemAvailable: 30000 kB\n";
    std::fs::write(root.path().join("proc/meminfo"), text).unwrap();
    let options = ProfileOptions {
        root: root.path().to_owned(),
        ..options()
    };
    let error = measure_layers(&model, WeightFormat::File, &options).unwrap_err();
    assert!(
        error.to_string().contains("30720000 bytes of memory"),
        "{error}"
    );
}
