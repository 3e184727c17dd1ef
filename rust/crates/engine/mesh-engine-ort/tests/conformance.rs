//! Every engine of this crate against the contracts of `mesh_testkit::conformance`: the CPU's stage, the
//! graph for devices on ONNX Runtime's CPU provider or on the GPU that `HYDRAMESH_TEST_GPU` names, models that
//! are split between a device and the CPU, and all of that on WebGPU with a software driver.

mod common;

use std::ops::Range;

use common::options;
use mesh_engine::Stage;
use mesh_engine_ort::{
    Backend, Device, DeviceMemory, DeviceOptions, DeviceStage, OrtOptions, OrtStage, Precision,
    Provider, open,
};
use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, GgmlType, Model};
use mesh_testkit::conformance::stage::{Limits, Rows, Subject};
use mesh_testkit::lavapipe;

fn made(shape: &Shape, ty: GgmlType) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    random_model(shape, ty, Tokens::Bytes, &path).unwrap();
    Model::open(&path).unwrap()
}

fn of_three(architecture: Architecture) -> Shape {
    Shape {
        layers: 3,
        ..Shape::tiny(architecture)
    }
}

fn limited(limits: Limits) -> OrtOptions {
    OrtOptions {
        max_rows: limits.max_rows,
        ..options(limits.slots, limits.context)
    }
}

fn on_cpu(model: &Model, layers: Range<u32>, options: OrtOptions) -> Box<dyn Stage> {
    Box::new(OrtStage::load(model, layers, options).unwrap())
}

/// The device under test.
fn device() -> Device {
    Device::new(common::provider())
}

/// Exported KV rows are of 16 bits. A part of the model on the CPU rounds activations to 8 bits, and what it rounds
/// differs in the last bits.
fn near(device: Device, parts_on_cpu: bool) -> Rows {
    match device.precision {
        Precision::F32 if !parts_on_cpu => Rows::Near {
            off: 1e-5,
            tie: 0.02,
        },
        _ => Rows::Near {
            off: 1e-3,
            tie: 0.2,
        },
    }
}

fn cpu_keeps_the_contract(shape: &Shape, ty: GgmlType) {
    let model = made(shape, ty);
    Subject {
        name: format!("{:?} {ty} on the CPU", shape.architecture),
        model: &model,
        open: &|layers, limits| on_cpu(&model, layers, limited(limits)),
        other: Some(&|limits| {
            let one = OrtOptions {
                threads: 1,
                ..limited(limits)
            };
            on_cpu(&model, 0..shape.layers, one)
        }),
        cuts: None,
        rows: Rows::Exact,
        held: None,
    }
    .check();
}

#[test]
fn the_cpus_stage_keeps_the_contract_with_every_family() {
    for architecture in Architecture::ALL {
        let mut shape = of_three(architecture);
        // Also families whose models are mixtures in every layer by default begin with a dense one.
        if let Some(mixture) = &mut shape.mixture
            && matches!(
                architecture,
                Architecture::Qwen3Moe | Architecture::Qwen2Moe
            )
        {
            mixture.leading_dense = 1;
        }
        let quantised = match architecture {
            Architecture::GptOss => GgmlType::MXFP4,
            Architecture::Llama => GgmlType::Q4_0,
            Architecture::Gemma3 => GgmlType::Q6_K,
            _ => GgmlType::Q4_K,
        };
        for ty in [quantised, GgmlType::F16] {
            cpu_keeps_the_contract(&shape, ty);
        }
    }
    cpu_keeps_the_contract(&Shape::tiny_mixtral(), GgmlType::Q8_0);
    cpu_keeps_the_contract(&Shape::tiny_granite_shared(), GgmlType::Q5_1);
    cpu_keeps_the_contract(&Shape::tiny(Architecture::Llama), GgmlType::F32);
}

fn device_keeps_the_contract(architecture: Architecture, ty: GgmlType) {
    let model = made(&Shape::tiny(architecture), ty);
    let memory = DeviceMemory::default();
    let on_device = |layers, limits| -> Box<dyn Stage> {
        let options = OrtOptions {
            device: DeviceOptions {
                memory: memory.clone(),
                ..DeviceOptions::default()
            },
            ..limited(limits)
        };
        Box::new(DeviceStage::load(&model, layers, options, device()).unwrap())
    };
    Subject {
        name: format!("{architecture:?} {ty} on {}", device().provider),
        model: &model,
        open: &on_device,
        other: None,
        cuts: None,
        rows: near(device(), false),
        held: Some(&|| memory.used()),
    }
    .check();
}

#[test]
fn stages_on_a_device_keep_the_contract() {
    device_keeps_the_contract(Architecture::Llama, GgmlType::Q4_0);
}

#[test]
fn stages_of_other_families_on_a_device_keep_the_contract() {
    for (architecture, ty) in [
        (Architecture::Qwen2, GgmlType::Q4_K),
        (Architecture::Qwen3, GgmlType::Q6_K),
        (Architecture::Gemma3, GgmlType::Q5_1),
        (Architecture::Llama, GgmlType::F32),
    ] {
        device_keeps_the_contract(architecture, ty);
    }
}

/// All layers with the first `most` of them on the device, and ranges on the device or the CPU.
fn split_keeps_the_contract(shape: &Shape, ty: GgmlType, most: u32, cuts: Option<Vec<u32>>) {
    let model = made(shape, ty);
    let backend = match device().provider {
        Provider::Cpu => Backend::OrtCpu,
        provider => provider.name().parse().unwrap(),
    };
    let split = |layers: Range<u32>, limits| {
        let device = DeviceOptions {
            most_layers: Some(most),
            ..DeviceOptions::default()
        };
        let options = OrtOptions {
            device,
            ..limited(limits)
        };
        let opened = open(&model, layers.clone(), options, backend).unwrap();
        let parts = opened.split.unwrap();
        assert_eq!(parts.device_layers.len(), layers.len().min(most as usize));
        opened.stage
    };
    Subject {
        name: format!(
            "{:?} {ty}, {most} layers on {}",
            shape.architecture,
            device().provider
        ),
        model: &model,
        open: &split,
        other: Some(&|limits| on_cpu(&model, 0..shape.layers, limited(limits))),
        cuts,
        rows: near(device(), true),
        held: None,
    }
    .check();
}

#[test]
fn models_split_after_the_first_layer_keep_the_contract() {
    split_keeps_the_contract(
        &of_three(Architecture::Llama),
        GgmlType::Q4_0,
        1,
        Some(vec![]),
    );
}

#[test]
fn models_split_anywhere_keep_the_contract() {
    for (architecture, most) in [(Architecture::Qwen3, 2), (Architecture::Gemma3, 1)] {
        split_keeps_the_contract(&of_three(architecture), GgmlType::Q8_0, most, None);
    }
}

/// The experts of all layers are on the CPU, the rest of the first `most` on the device.
#[test]
fn mixtures_with_their_experts_on_the_cpu_keep_the_contract() {
    for (architecture, leading_dense, ty, most) in [
        (Architecture::Qwen3Moe, 1, GgmlType::F16, 2),
        (Architecture::Qwen2Moe, 0, GgmlType::F32, 3),
    ] {
        let mut shape = of_three(architecture);
        if let Some(mixture) = &mut shape.mixture {
            mixture.leading_dense = leading_dense;
        }
        split_keeps_the_contract(&shape, ty, most, None);
    }
}

/// A driver in software needs seconds for each new shader, so these are the tests with few of them.
#[test]
fn webgpu_with_a_software_driver_keeps_the_contract() {
    lavapipe::run(&[
        "models_split_after_the_first_layer_keep_the_contract",
        "stages_on_a_device_keep_the_contract",
    ]);
}
