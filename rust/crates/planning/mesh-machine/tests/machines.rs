//! Made-up machines, from their sysfs to their plans.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use arcanum_profiler::gpu::{GpuKind, Vendor};
use mesh_machine::boot::choice::{Backend, Choice, Wish, choose};
use mesh_machine::boot::plan::{BootInputs, Missing, Plan};
use mesh_machine::boot::run_dir;
use mesh_machine::hardware::{Hardware, probe};
use tempfile::TempDir;

/// A root file system that a test fills.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        let machine = Self(tempfile::tempdir().expect("a folder"));
        machine
            .file(
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx avx2\n\nprocessor\t: 1\nflags\t: avx\n",
            )
            .file("proc/meminfo", "MemTotal:        8000000 kB\nMemFree: 1 kB\n")
    }

    fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, content).expect("written");
        self
    }

    fn pci(self, address: &str, vendor: u16, device: u16, class: u32) -> Self {
        let dir = format!("sys/bus/pci/devices/{address}");
        self.file(&format!("{dir}/vendor"), format!("0x{vendor:04x}\n"))
            .file(&format!("{dir}/device"), format!("0x{device:04x}\n"))
            .file(&format!("{dir}/class"), format!("0x{class:06x}\n"))
    }

    fn nvidia(self, address: &str, device: u16) -> Self {
        self.pci(address, 0x10de, device, 0x03_00_00)
            // The card's sound chip does not count as a GPU.
            .pci(&address.replace(".0", ".1"), 0x10de, 0x0fbb, 0x04_03_00)
    }

    /// The driver of the card at `address` has made a render node.
    fn rendering(self, address: &str) -> Self {
        let dir = format!("sys/bus/pci/devices/{address}/drm");
        self.file(&format!("{dir}/card0/dev"), "226:0\n")
            .file(&format!("{dir}/renderD128/dev"), "226:128\n")
    }

    /// A card with AMD's compute driver.
    fn amd(self, address: &str, device: u16, location: u32, version: u32) -> Self {
        self.pci(address, 0x1002, device, 0x03_80_00)
            .file("dev/kfd", "")
            .file(
                "sys/class/kfd/kfd/topology/nodes/0/properties",
                "cpu_cores_count 8\ngfx_target_version 0\n",
            )
            .file(
                &format!("sys/class/kfd/kfd/topology/nodes/{location}/properties"),
                format!("simd_count 80\ngfx_target_version {version}\nvendor_id 4098\ndevice_id {device}\nlocation_id {location}\n"),
            )
    }

    fn probe(&self) -> Hardware {
        probe(self.0.path())
    }

    fn choose(&self) -> Choice {
        choose(&self.probe(), Wish::default())
    }
}

#[test]
fn without_a_gpu_the_processor_computes() {
    let machine = Machine::new().pci("0000:00:1f.2", 0x8086, 0x1c03, 0x01_06_01);
    let hardware = machine.probe();
    assert_eq!(hardware.gpus, []);
    assert_eq!(hardware.cpu.threads, 2);
    assert_eq!(hardware.cpu.vectors, ["AVX", "AVX2"]);
    assert_eq!(hardware.memory_bytes, Some(8_192_000_000));
    let choice = machine.choose();
    assert_eq!(choice.backend, Backend::Cpu);
    assert_eq!(
        choice.reason,
        "no graphics card was found, so the processor computes"
    );
}

#[test]
fn an_nvidia_card_is_taken() {
    let machine = Machine::new()
        .pci("0000:00:02.0", 0x8086, 0x3e9b, 0x03_00_00)
        .nvidia("0000:01:00.0", 0x1f82)
        .file(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  595.71.05  Release Build\nGCC version: 14\n",
        );
    let choice = machine.choose();
    assert_eq!(choice.backend, Backend::Nvidia);
    assert_eq!(
        choice.reason,
        "there is an NVIDIA card 10de:1f82 at 0000:01:00.0 (Turing or newer); NVIDIA's driver 595.71.05 is loaded"
    );
    assert_eq!(choice.left_out.len(), 1);
    assert!(choice.left_out[0].gpu.starts_with("Intel GPU"));
}

#[test]
fn a_compute_accelerator_without_a_display_is_taken() {
    let machine = Machine::new().pci("0000:41:00.0", 0x10de, 0x2330, 0x03_02_00);
    assert_eq!(machine.choose().backend, Backend::Nvidia);
    let machine = Machine::new().pci("0000:41:00.0", 0x10de, 0x2330, 0x12_00_00);
    assert_eq!(machine.choose().backend, Backend::Nvidia);
}

#[test]
fn an_amd_card_is_taken() {
    let machine = Machine::new().amd("0000:03:00.0", 0x73bf, 0x300, 100_300);
    let choice = machine.choose();
    assert_eq!(choice.backend, Backend::Rocm);
    assert!(
        choice
            .reason
            .contains("AMD card 1002:73bf at 0000:03:00.0 (gfx1030)"),
        "{}",
        choice.reason
    );
    let data_centre = Machine::new().amd("0000:c3:00.0", 0x740f, 0xc300, 90_010);
    assert!(data_centre.choose().reason.contains("gfx90a"));
}

#[test]
fn an_amd_card_without_its_compute_driver_is_left_out() {
    let machine = Machine::new().pci("0000:03:00.0", 0x1002, 0x6779, 0x03_00_00);
    let choice = machine.choose();
    assert_eq!(choice.backend, Backend::Cpu);
    assert!(choice.left_out[0].why.contains("/dev/kfd"));
    let polaris = Machine::new()
        .amd("0000:03:00.0", 0x67df, 0x300, 80_003)
        .choose();
    assert_eq!(polaris.backend, Backend::Cpu);
    assert!(
        polaris.left_out[0]
            .why
            .contains("gfx803; ROCm needs gfx900")
    );
}

#[test]
fn of_both_the_nvidia_card_is_taken_unless_it_is_a_guess() {
    let both = |device| {
        Machine::new()
            .nvidia("0000:01:00.0", device)
            .amd("0000:03:00.0", 0x73bf, 0x300, 100_300)
    };
    let choice = both(0x2684).choose();
    assert_eq!(choice.backend, Backend::Nvidia);
    assert!(choice.left_out[0].why.contains("hydramesh.backend=rocm"));
    // An id that the table does not know.
    assert_eq!(both(0xfff0).choose().backend, Backend::Rocm);
    // A card that the driver does not support.
    assert_eq!(both(0x1b80).choose().backend, Backend::Rocm);
    let wish = Wish {
        backend: Some(Backend::Rocm),
        ..Wish::default()
    };
    let asked = choose(&both(0x2684).probe(), wish);
    assert_eq!(asked.backend, Backend::Rocm);
    assert!(asked.reason.starts_with("rocm was asked for at boot"));
}

#[test]
fn cards_that_the_driver_no_longer_supports_are_left_out() {
    for (device, words) in [
        (0x1b80, "branch 580"),
        (0x1380, "branch 580"),
        (0x1db1, "branch 580"),
        (0x0fc6, "too old"),
    ] {
        let choice = Machine::new().nvidia("0000:01:00.0", device).choose();
        assert_eq!(choice.backend, Backend::Cpu, "{device:04x}");
        assert!(choice.left_out[0].why.contains(words), "{device:04x}");
        let wish = Wish {
            backend: Some(Backend::Nvidia),
            ..Wish::default()
        };
        let machine = Machine::new().nvidia("0000:01:00.0", device);
        let asked = choose(&machine.probe(), wish);
        assert_eq!(asked.backend, Backend::Cpu);
        assert!(asked.reason.contains("no card here can be used with it"));
    }
}

#[test]
fn the_legacy_driver_takes_the_cards_that_the_current_one_leaves_out() {
    let wish = Wish {
        nvidia_legacy: true,
        ..Wish::default()
    };
    for device in [0x1b80, 0x1380, 0x1db1] {
        let choice = choose(&Machine::new().nvidia("0000:01:00.0", device).probe(), wish);
        assert_eq!(choice.backend, Backend::Nvidia, "{device:04x}");
        assert!(choice.reason.contains("legacy driver"), "{}", choice.reason);
    }
    // Kepler has no maintained driver at all.
    let old = Machine::new().nvidia("0000:01:00.0", 0x0fc6);
    assert_eq!(choose(&old.probe(), wish).backend, Backend::Cpu);
    // The boot menu's entry says it on the command line.
    let line = "hydramesh.nvidia_legacy";
    let pascal = Machine::new().nvidia("0000:01:00.0", 0x1b80);
    assert_eq!(
        plan(&pascal, line, None, None).choice.backend,
        Backend::Nvidia
    );
}

#[test]
fn an_image_leaves_out_the_cards_that_it_has_no_programs_for() {
    let machine =
        Machine::new()
            .nvidia("0000:01:00.0", 0x2684)
            .amd("0000:03:00.0", 0x73bf, 0x300, 100_300);
    let on = |backends: &[Backend], line: &str| {
        let told = BootInputs {
            backends: Some(backends.to_vec()),
            command_line: line.to_owned(),
            ..BootInputs::default()
        };
        Plan::new(&machine.probe(), &told).choice
    };
    let cpu = on(&[Backend::Cpu], "");
    assert_eq!(cpu.backend, Backend::Cpu);
    assert!(cpu.left_out[0].why.contains("iso-nvidia"), "{cpu:?}");
    assert!(cpu.left_out[1].why.contains("iso-all"), "{cpu:?}");
    let asked = on(&[Backend::Cpu], "hydramesh.backend=nvidia");
    assert_eq!(asked.backend, Backend::Cpu);
    let nvidia = on(&[Backend::Cpu, Backend::Nvidia], "");
    assert_eq!(nvidia.backend, Backend::Nvidia);
    assert_eq!(on(&Backend::ALL, "").backend, Backend::Nvidia);
}

#[test]
fn a_card_with_a_render_node_is_tried_through_vulkan() {
    const AT: &str = "0000:00:02.0";
    let laptop = Machine::new()
        .pci(AT, 0x8086, 0x3e9b, 0x03_00_00)
        .rendering(AT);
    assert_eq!(
        laptop.probe().gpus[0].render_node.as_deref(),
        Some("renderD128")
    );
    let choice = laptop.choose();
    assert_eq!(choice.backend, Backend::WebGpu);
    assert_eq!(
        choice.reason,
        "there is an Intel GPU 8086:3e9b at 0000:00:02.0; Vulkan alone reaches such a GPU; it is tried through \
         Vulkan, and the processor computes where it is faster"
    );
    assert_eq!(choice.left_out, []);
    let plan = plan(&laptop, "hydramesh.backend=cpu", None, None);
    assert_eq!(plan.choice.backend, Backend::Cpu);
    let why = &plan.choice.left_out[0].why;
    assert!(why.contains("hydramesh.backend=webgpu"), "{why}");
    // What ROCm has left behind.
    let polaris = Machine::new()
        .amd("0000:03:00.0", 0x67df, 0x300, 80_003)
        .rendering("0000:03:00.0")
        .choose();
    assert_eq!(polaris.backend, Backend::WebGpu);
    assert!(polaris.reason.contains("ROCm needs gfx900"), "{polaris:?}");
    // An image without the card's own programs says where they are.
    let gaming = Machine::new()
        .nvidia("0000:01:00.0", 0x2684)
        .rendering("0000:01:00.0");
    let on = |backends: &[Backend]| {
        let told = BootInputs {
            backends: Some(backends.to_vec()),
            ..BootInputs::default()
        };
        Plan::new(&gaming.probe(), &told).choice
    };
    let small = on(&[Backend::Cpu, Backend::WebGpu]);
    assert_eq!(small.backend, Backend::WebGpu);
    assert!(small.reason.contains("iso-nvidia"), "{small:?}");
    assert_eq!(on(&[Backend::Cpu]).backend, Backend::Cpu);
    // Its maker's libraries go first, and a wish before them.
    assert_eq!(on(&Backend::ALL).backend, Backend::Nvidia);
    let wish = Wish {
        backend: Some(Backend::WebGpu),
        ..Wish::default()
    };
    let asked = choose(&gaming.probe(), wish);
    assert_eq!(asked.backend, Backend::WebGpu);
    assert_eq!(asked.left_out, []);
    // A virtual machine's display has a render node, too.
    let virtual_card = Machine::new()
        .pci("0000:00:01.0", 0x1af4, 0x1050, 0x03_00_00)
        .rendering("0000:00:01.0");
    assert_eq!(virtual_card.choose().backend, Backend::Cpu);
}

#[test]
fn an_unknown_nvidia_card_is_tried() {
    let choice = Machine::new().nvidia("0000:01:00.0", 0xfff0).choose();
    assert_eq!(choice.backend, Backend::Nvidia);
    assert!(choice.reason.contains("it is tried"));
}

#[test]
fn a_virtual_gpu_does_not_count() {
    for (vendor, device) in [
        (0x1af4, 0x1050),
        (0x1b36, 0x0100),
        (0x15ad, 0x0405),
        (0x1414, 0x5353),
        (0x1013, 0x00b8),
        (0x1234, 0x1111),
    ] {
        let machine = Machine::new().pci("0000:00:01.0", vendor, device, 0x03_00_00);
        assert_eq!(machine.probe().gpus[0].kind, GpuKind::Virtual);
        assert_eq!(machine.probe().gpus[0].vendor, Vendor::Other);
        let choice = machine.choose();
        assert_eq!(choice.backend, Backend::Cpu);
        assert!(
            choice.reason.contains("virtual machine's"),
            "{}",
            choice.reason
        );
    }
    // A real card that was handed through counts.
    let handed_through = Machine::new()
        .pci("0000:00:01.0", 0x1234, 0x1111, 0x03_00_00)
        .nvidia("0000:00:05.0", 0x2204);
    assert_eq!(handed_through.choose().backend, Backend::Nvidia);
}

#[test]
fn garbage_is_left_out() {
    let machine = Machine::new()
        .file(
            "sys/bus/pci/devices/0000:01:00.0/vendor",
            [0xff, 0x00, 0xfe],
        )
        .file(
            "sys/bus/pci/devices/0000:01:00.0/device",
            "0xfffffffffffffffff",
        )
        .file("sys/bus/pci/devices/0000:01:00.0/class", "0x030000")
        .file("sys/bus/pci/devices/0000:02:00.0/vendor", "0x10de")
        .file("sys/bus/pci/devices/0000:02:00.0/device", "0x12345")
        .file("sys/bus/pci/devices/0000:02:00.0/class", "0x030000")
        .file("sys/bus/pci/devices/0000:03:00.0/class", "-1")
        .file("sys/bus/pci/devices/0000:04:00.0/none", "")
        .file("proc/driver/nvidia/version", vec![b'9'; 100_000])
        .file("proc/cpuinfo", vec![0xff; 3_000_000])
        .file("proc/meminfo", "MemTotal: 99999999999999999999 kB")
        .file(
            "sys/class/kfd/kfd/topology/nodes/0/properties",
            "gfx_target_version\n\n \n x",
        );
    let hardware = machine.probe();
    assert_eq!(hardware.gpus, []);
    assert_eq!(hardware.nvidia_driver, None);
    assert_eq!(hardware.memory_bytes, None);
    assert_eq!(probe(Path::new("/nonexistent")), Hardware::default());
}

#[test]
fn safe_graphics_and_cpu_only_keep_the_cards_out() {
    let machine = Machine::new().nvidia("0000:01:00.0", 0x2204);
    for (line, words) in [
        ("nomodeset hydramesh.backend=cpu", "safe graphics"),
        ("nomodeset hydramesh.backend=nvidia", "safe graphics"),
        ("hydramesh.backend=cpu", "CPU only"),
    ] {
        let plan = plan(&machine, line, None, None);
        assert_eq!(plan.choice.backend, Backend::Cpu, "{line}");
        assert!(plan.choice.reason.contains(words), "{line}");
    }
}

fn plan(machine: &Machine, line: &str, partition: Option<&Path>, typed: Option<&str>) -> Plan {
    let told = BootInputs {
        typed: typed.map(str::to_owned),
        command_line: line.to_owned(),
        partition: partition.map(Path::to_owned),
        ..BootInputs::default()
    };
    Plan::new(&machine.probe(), &told)
}

fn token(letter: &str) -> String {
    format!("hydra1.{}", letter.repeat(80))
}

#[test]
fn what_is_typed_wins_over_the_command_line_and_that_over_the_partition() {
    let partition = tempfile::tempdir().expect("a folder");
    fs::write(
        partition.path().join("hydramesh.toml"),
        "head = \"partition\"\nname = \"attic\"\nrole = \"shim\"\n",
    )
    .expect("written");
    fs::write(partition.path().join("join-token"), token("p")).expect("written");
    let line = format!("hydramesh.head=line hydramesh.token={}", token("l"));
    let typed = "head=typed\nrole=worker\n";
    let plan = plan(&Machine::new(), &line, Some(partition.path()), Some(typed));
    assert_eq!(plan.head.as_ref().expect("a head").0.host, "typed");
    assert_eq!(plan.token.as_ref().expect("a token").0.secret(), token("l"));
    assert_eq!(plan.name.as_deref(), Some("attic"));
    assert_eq!(plan.missing(), [Missing::Model]);
    let text = plan.to_string();
    assert!(
        text.contains("Role: worker\nBackend: cpu, since no graphics card was found"),
        "{text}"
    );
    assert!(
        text.contains("Join token: given (kernel command line)"),
        "{text}"
    );
    assert!(
        text.contains("Missing: a model. Put a .gguf file"),
        "{text}"
    );
}

#[test]
fn a_machine_that_was_told_nothing_says_what_it_needs() {
    let plan = plan(&Machine::new(), "quiet", None, None);
    assert_eq!(
        plan.missing(),
        [Missing::Head, Missing::Token, Missing::Model]
    );
    let text = plan.to_string();
    assert!(text.contains("hydramesh token create"), "{text}");
    assert!(text.contains("hydramesh.head=HOST:7780"), "{text}");
}

#[test]
fn a_worker_that_has_joined_before_needs_no_token() {
    let machine = Machine::new().file("state/worker/node.crt", "certificate");
    let told = BootInputs {
        command_line: "hydramesh.head=attic".to_owned(),
        state: Some(machine.0.path().join("state")),
        ..BootInputs::default()
    };
    let plan = Plan::new(&machine.probe(), &told);
    assert_eq!(plan.missing(), [Missing::Model]);
    assert!(plan.to_string().contains("it has joined before"), "{plan}");
}

#[test]
fn a_source_with_a_mistake_is_not_used_and_the_mistake_told() {
    let partition = tempfile::tempdir().expect("a folder");
    fs::write(partition.path().join("hydramesh.toml"), [0xff; 10]).expect("written");
    let plan = plan(
        &Machine::new(),
        "hydramesh.role=head hydramesh.ssh_key=nonsense",
        Some(partition.path()),
        Some("role=head"),
    );
    assert_eq!(plan.mistakes.len(), 2);
    assert_eq!(plan.missing(), []);
    let text = plan.to_string();
    assert!(
        text.contains("Not used, kernel command line: `ssh_key`"),
        "{text}"
    );
    assert!(
        text.contains("Not used, partition HYDRAMESH: hydramesh.toml"),
        "{text}"
    );
}

#[test]
fn a_worker_may_hold_parts_of_models_alone() {
    let partition = tempfile::tempdir().expect("a folder");
    // `shards` is the old name of `ring`.
    for (folder, file) in [("ring", "big.gguf"), ("shards", "old.gguf")] {
        fs::create_dir(partition.path().join(folder)).expect("a folder");
        fs::write(partition.path().join(folder).join(file), "").expect("written");
    }
    let line = format!("hydramesh.head=attic hydramesh.token={}", token("t"));
    let worker = plan(&Machine::new(), &line, Some(partition.path()), None);
    assert_eq!(worker.missing(), []);
    assert!(
        worker
            .to_string()
            .contains("Models held in parts: big.gguf, old.gguf")
    );
    let environment = worker.environment();
    let value = |name: &str| {
        let found = environment.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(value("HYDRAMESH_WORKER__MODELS"), Some("[]"));
    let folder = partition.path().display();
    assert_eq!(
        value("HYDRAMESH_WORKER__RING__MODELS"),
        Some(format!("[\"{folder}/ring/big.gguf\", \"{folder}/shards/old.gguf\"]").as_str())
    );
}

#[test]
fn a_second_folder_of_parts_allows_no_more_models() {
    let partition = tempfile::tempdir().expect("a folder");
    for folder in ["ring", "shards"] {
        let folder = partition.path().join(folder);
        fs::create_dir(&folder).expect("a folder");
        for index in 0..10 {
            fs::write(folder.join(format!("m{index}.gguf")), "").expect("written");
        }
    }
    let worker = plan(&Machine::new(), "", Some(partition.path()), None);
    assert_eq!(worker.ring_models.len(), 16);
    assert!(worker.ring_models[15].ends_with("shards/m5.gguf"));
}

#[test]
fn the_parts_of_a_split_file_are_one_model() {
    let partition = tempfile::tempdir().expect("a folder");
    let ring = partition.path().join("ring");
    fs::create_dir(&ring).expect("a folder");
    for number in 1..=20 {
        let name = format!("big-{number:05}-of-00020.gguf");
        fs::write(ring.join(name), "").expect("written");
    }
    fs::write(ring.join("small.gguf"), "").expect("written");
    let worker = plan(&Machine::new(), "", Some(partition.path()), None);
    let names = ["big-00001-of-00020.gguf", "small.gguf"];
    assert_eq!(worker.ring_models, names.map(|name| ring.join(name)));
}

#[test]
fn models_for_images_are_served_where_the_workers_make_images() {
    let partition = tempfile::tempdir().expect("a folder");
    let images = partition.path().join("images");
    fs::create_dir_all(images.join("sd15")).expect("a folder");
    fs::write(images.join("sd15/model_index.json"), "{}").expect("written");
    fs::write(images.join("text.gguf"), "").expect("written");
    let on = |makes_images| {
        let told = BootInputs {
            command_line: "hydramesh.head=attic".to_owned(),
            partition: Some(partition.path().to_owned()),
            makes_images,
            ..BootInputs::default()
        };
        Plan::new(&Machine::new().probe(), &told)
    };
    let worker = on(true);
    assert_eq!(worker.missing(), [Missing::Token]);
    assert!(worker.to_string().contains("Models for images: sd15\n"));
    let (_, models) = worker.environment().pop().expect("models");
    assert_eq!(models, format!("[\"{}/sd15\"]", images.display()));
    let small = on(false);
    assert_eq!(small.missing(), [Missing::Token, Missing::Model]);
    assert!(
        small.to_string().contains("iso-all have them): sd15\n"),
        "{small}"
    );
}

#[test]
fn the_run_folder_starts_what_the_plan_says_and_keeps_the_token_secret() {
    let partition = tempfile::tempdir().expect("a folder");
    let models = partition.path().join("models");
    fs::create_dir(&models).expect("a folder");
    for name in [
        "b.gguf",
        "A model (1).GGUF",
        "._b.gguf",
        "evil'.gguf",
        "notes.txt",
    ] {
        fs::write(models.join(name), "").expect("written");
    }
    let machine = Machine::new().nvidia("0000:01:00.0", 0x2204);
    let run = tempfile::tempdir().expect("a folder");
    let dir = run.path().join("hydramesh");
    let line = format!(
        "hydramesh.head=attic hydramesh.token={} hydramesh.name=gamer hydramesh.keymap=de",
        token("t")
    );
    let worker = plan(&machine, &line, Some(partition.path()), None);
    run_dir::write(&worker, &dir).expect("written");

    let read = |name: &str| fs::read_to_string(dir.join(name)).expect(name);
    assert_eq!(read("role-worker-nvidia"), "");
    assert_eq!(read("ready"), "");
    assert_eq!(read("join-token"), format!("{}\n", token("t")));
    assert_eq!(read("keymap"), "de\n");
    assert_eq!(
        read("service.env"),
        format!(
            "HYDRAMESH_WORKER__HEAD='attic:7780'\nHYDRAMESH_WORKER__NODE_NAME='gamer'\n\
             HYDRAMESH_WORKER__MODELS='[\"{0}/A model (1).GGUF\", \"{0}/b.gguf\"]'\n",
            models.display()
        )
    );
    let mode = |name: &str| {
        let metadata = fs::metadata(dir.join(name)).expect(name);
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode("join-token"), 0o600);
    for entry in fs::read_dir(&dir).expect("a folder").flatten() {
        let name = entry.file_name();
        let content = fs::read_to_string(entry.path()).expect("text");
        assert!(
            name == "join-token" || !content.contains(&token("t")),
            "{name:?}"
        );
    }

    // The next plan starts anew.
    let head = plan(
        &machine,
        "hydramesh.role=head hydramesh.name=attic",
        None,
        None,
    );
    run_dir::write(&head, &dir).expect("written");
    let mut names: Vec<_> = fs::read_dir(&dir)
        .expect("a folder")
        .flatten()
        .map(|entry| entry.file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    assert_eq!(names, ["ready", "role-head", "service.env", "summary"]);
    assert_eq!(
        fs::read_to_string(dir.join("service.env")).expect("text"),
        "HYDRAMESH_HEAD__MESH_NAME='attic'\n"
    );
    let shim = plan(
        &machine,
        "hydramesh.role=shim hydramesh.head=attic",
        None,
        None,
    );
    assert_eq!(
        shim.environment(),
        [(
            "HYDRAMESH_SHIM__HEADS".to_owned(),
            "[\"attic:7777\"]".to_owned()
        )]
    );
}

#[test]
fn what_is_missing_starts_nothing() {
    let run = tempfile::tempdir().expect("a folder");
    let plan = plan(&Machine::new(), "", None, None);
    run_dir::write(&plan, run.path()).expect("written");
    assert!(!run.path().join("role-worker-cpu").exists());
    assert!(!run.path().join("ready").exists());
    assert!(run.path().join("summary").exists());
}
