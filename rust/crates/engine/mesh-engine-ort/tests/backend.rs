//! The choice of a stage's backend. By default ONNX Runtime's library is the one for CPUs; with
//! `HYDRAMESH_TEST_GPU` it is one whose provider of that name must work.

mod common;

use common::{last, logits, options, some_tokens, tiny, whole};
use mesh_engine_ort::{Backend, LoadError, Opened, Provider, open};
use mesh_model::{Architecture, GgmlType, Model};
use mesh_testkit::lavapipe;

fn model() -> Model {
    tiny(Architecture::Qwen3, GgmlType::Q4_K)
}

fn opened(backend: Backend) -> Result<Opened, LoadError> {
    let model = model();
    open(&model, 0..model.config().layers, options(1, 64), backend)
}

fn compiled_in() -> Vec<Provider> {
    [Provider::MiGraphX, Provider::Cuda]
        .into_iter()
        .filter(|provider| provider.is_compiled_in())
        .collect()
}

/// The reason why `provider` is not used. Others that this program was built with may be refused beside it.
fn refusal(opened: &Opened, provider: Provider) -> &str {
    let mut refused = opened.refused.iter();
    let found = refused.find(|(refused, _)| *refused == provider);
    &found.unwrap().1
}

fn a_gpu_is_expected() -> bool {
    common::provider() != Provider::Cpu
}

/// Boxed stages are stages.
fn answer(opened: &mut Opened) -> Vec<f32> {
    let tokens = some_tokens(9);
    match opened
        .stage
        .forward(&[last(0, 0, 9)], mesh_engine::StageInput::Tokens(&tokens))
        .unwrap()
    {
        mesh_engine::StageOutput::Logits(logits) => logits.to_vec(),
        mesh_engine::StageOutput::Hidden(_) => panic!("a whole model gives logits"),
    }
}

#[test]
fn the_cpu_serves_where_no_provider_works_and_the_reasons_are_kept() {
    let mut opened = opened(Backend::Auto).unwrap();
    let answer = answer(&mut opened);
    let on_cpu = logits(
        &mut whole(&model(), options(1, 64)),
        &[last(0, 0, 9)],
        &some_tokens(9),
    );
    if a_gpu_is_expected() {
        if opened.provider == Provider::Cpu {
            // A model as small as this one may be faster there.
            let reason = refusal(&opened, common::provider());
            assert!(reason.contains("for a decode step"), "{reason}");
        }
        assert!(common::cosine(&answer, &on_cpu) > 0.99);
        return;
    }
    assert_eq!(opened.provider, Provider::Cpu);
    common::assert_same_bits(&answer, &on_cpu);
    let tried: Vec<_> = opened
        .refused
        .iter()
        .map(|(provider, _)| *provider)
        .collect();
    assert_eq!(tried, compiled_in());
    for (provider, reason) in &opened.refused {
        assert!(reason.contains(provider.name()), "{reason}");
    }
}

#[test]
fn a_backend_asked_for_by_name_fails_with_reason_and_remedy() {
    if a_gpu_is_expected() {
        return;
    }
    for (backend, provider) in [
        (Backend::Cuda, Provider::Cuda),
        (Backend::MiGraphX, Provider::MiGraphX),
        (Backend::WebGpu, Provider::WebGpu),
    ] {
        let error = opened(backend).unwrap_err();
        assert!(
            matches!(&error, LoadError::Provider { provider: found, .. } if *found == provider)
        );
        let text = error.to_string();
        assert!(text.contains(provider.name()), "{text}");
        // If the library has the provider, the provider's own requirements are missing.
        let reasons = match provider.is_compiled_in() {
            true => [
                "was loaded was built without it",
                "Failed to load",
                "failure",
                "its plugin libonnxruntime_providers_webgpu.so is not configured",
            ],
            false => ["this program was built without it"; 4],
        };
        assert!(reasons.iter().any(|reason| text.contains(reason)), "{text}");
        assert!(
            text.contains("set the backend to \"auto\" or \"cpu\""),
            "{text}"
        );
    }
}

#[test]
fn what_no_backend_can_do_is_no_providers_fault() {
    for backend in [Backend::Auto, Backend::Cuda, Backend::Cpu] {
        let model = model();
        let error = open(&model, 1..9, options(1, 64), backend).unwrap_err();
        assert!(matches!(error, LoadError::Layers { .. }), "{error}");
        let error = open(&model, 0..2, options(0, 64), backend).unwrap_err();
        assert!(
            matches!(error, LoadError::Option { name: "slots", .. }),
            "{error}"
        );
    }
}

#[test]
fn the_cpu_asked_for_by_name_tries_nothing_else() {
    let opened = opened(Backend::Cpu).unwrap();
    assert_eq!((opened.provider, opened.refused.len()), (Provider::Cpu, 0));
}

#[test]
fn names_of_backends_and_of_torch_devices() {
    for (text, backend) in [
        ("auto", Backend::Auto),
        ("cpu", Backend::Cpu),
        (" CUDA ", Backend::Cuda),
        ("cuda:0", Backend::Cuda),
        ("migraphx", Backend::MiGraphX),
        ("webgpu", Backend::WebGpu),
        ("vulkan:0", Backend::WebGpu),
    ] {
        assert_eq!(text.parse(), Ok(backend));
    }
    for backend in [
        Backend::Auto,
        Backend::Cpu,
        Backend::Cuda,
        Backend::MiGraphX,
        Backend::WebGpu,
    ] {
        assert_eq!(backend.to_string().parse(), Ok(backend));
    }
    let error = "cuda:1".parse::<Backend>().unwrap_err().to_string();
    assert!(
        error.contains("\"cuda:1\"") && error.contains("migraphx"),
        "{error}"
    );
}

/// A provider that computes correctly passes the checks for GPUs.
#[test]
fn a_stage_says_what_it_holds() {
    let opened = opened(Backend::Auto).unwrap();
    let info = opened.stage.info();
    assert_eq!(
        (info.slots, info.context, info.layers.clone()),
        (1, 64, 0..2)
    );
    assert!(info.weight_bytes > 0);
}

/// True in a process that [`webgpu_with_a_software_driver`] started.
fn on_webgpu() -> bool {
    common::provider() == Provider::WebGpu
}

#[test]
fn webgpu_with_a_software_driver() {
    lavapipe::run(&[
        "webgpu_asked_for_by_name_computes_what_the_cpu_does",
        "the_slower_of_two_that_work_does_not_compute",
    ]);
}

#[test]
#[ignore = "a process of the test above"]
fn webgpu_asked_for_by_name_computes_what_the_cpu_does() {
    assert!(on_webgpu());
    let mut opened = opened(Backend::WebGpu).unwrap();
    assert_eq!(opened.provider, Provider::WebGpu);
    let on_cpu = logits(
        &mut whole(&model(), options(1, 64)),
        &[last(0, 0, 9)],
        &some_tokens(9),
    );
    assert!(common::cosine(&answer(&mut opened), &on_cpu) > 0.99);
}

#[test]
#[ignore = "a process of the test above"]
fn the_slower_of_two_that_work_does_not_compute() {
    assert!(on_webgpu());
    // A GPU in software is slower than the CPU's own kernels.
    let opened = opened(Backend::Auto).unwrap();
    assert_eq!(opened.provider, Provider::Cpu);
    let reason = refusal(&opened, Provider::WebGpu);
    // By the first layer alone, or by a step of all.
    let by_layer = reason.contains("a step of one layer takes longer there");
    let by_step = reason.starts_with("webgpu takes") && reason.contains("for a decode step, cpu");
    assert!(by_layer || by_step, "{reason}");
}

#[test]
fn a_software_driver_is_refused_unless_it_is_allowed() {
    for allowed in ["", "0"] {
        lavapipe::run_with(&["software_is_refused"], &[(lavapipe::ALLOWED, allowed)]);
    }
}

#[test]
#[ignore = "a process of the test above"]
fn software_is_refused() {
    assert!(on_webgpu());
    let error = opened(Backend::WebGpu).unwrap_err().to_string();
    for part in [
        "webgpu cannot be used: the only Vulkan device is llvmpipe",
        "a software renderer",
        "install the Vulkan driver of the GPU",
        "set the backend to \"auto\" or \"cpu\"",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let auto = opened(Backend::Auto).unwrap();
    assert_eq!(auto.provider, Provider::Cpu);
}

#[test]
fn no_vulkan_driver_is_said_with_the_remedy() {
    lavapipe::run_with(
        &["no_device_is_found"],
        &[
            ("VK_DRIVER_FILES", "/nonexistent.json"),
            ("VK_ICD_FILENAMES", "/nonexistent.json"),
        ],
    );
}

#[test]
#[ignore = "a process of the test above"]
fn no_device_is_found() {
    assert!(on_webgpu());
    let error = opened(Backend::WebGpu).unwrap_err().to_string();
    for part in [
        "there is no Vulkan device",
        "mesa-vulkan-drivers",
        "/dev/dri",
    ] {
        assert!(error.contains(part), "{error}");
    }
}
