//! `hydramesh probe` and `hydramesh boot-config`: the hardware of this machine, and the plan of a live image
//! on it.

use mesh_machine::boot::choice::{Choice, choose};
use mesh_machine::boot::plan::{BootInputs, Plan};
use mesh_machine::boot::run_dir;
use mesh_machine::files::{ReadError, read_text};
use mesh_machine::hardware::{Hardware, probe};
use serde_json::json;

use crate::args::{BootConfigArgs, ProbeArgs};
use crate::failure::Failure;
use crate::output::{Facts, Terminal, bytes};

pub(crate) fn run(args: ProbeArgs, terminal: Terminal) -> Result<(), Failure> {
    let hardware = probe(&args.root);
    let choice = choose(&hardware, args.backend);
    if args.json {
        println!("{}", json!({"hardware": hardware, "choice": choice}));
    } else {
        print!("{}", show(&hardware, &choice, terminal));
    }
    Ok(())
}

pub(crate) fn boot_config(args: BootConfigArgs) -> Result<(), Failure> {
    let command_line = args.root.join("proc/cmdline");
    let typed = match args.typed.as_deref().map(read_text) {
        None | Some(Err(ReadError::Absent)) => None,
        Some(Ok(text)) => Some(text),
        Some(Err(error)) => return Err(Failure::usage(format!("what was typed: {error}"))),
    };
    let told = BootInputs {
        typed,
        command_line: read_text(&command_line)
            .map_err(|error| Failure::failed(format!("{}: {error}", command_line.display())))?,
        partition: args.partition,
        state: args.state_dir,
        backends: args.backends,
        makes_images: args.images,
    };
    let plan = Plan::new(&probe(&args.root), &told);
    run_dir::write(&plan, &args.run_dir).map_err(|error| Failure::failed(error.to_string()))?;
    print!("{plan}");
    Ok(())
}

fn show(hardware: &Hardware, choice: &Choice, terminal: Terminal) -> String {
    let cpu = &hardware.cpu;
    let mut text = Facts::new(terminal);
    let name = cpu.model.as_deref().unwrap_or("of unknown name");
    let vectors: String = cpu.vectors.iter().map(|name| format!(", {name}")).collect();
    text.line(
        "processor",
        format!("{name}, {} threads{vectors}", cpu.threads),
    );
    if let Some(memory) = hardware.memory_bytes {
        text.line("memory", bytes(memory));
    }
    for gpu in &hardware.gpus {
        text.line("graphics", gpu);
    }
    let backend = terminal.bold(&choice.backend.to_string());
    text.line("backend", format!("{backend}, since {}", choice.reason));
    for left_out in &choice.left_out {
        text.line("not used", format!("{}: {}", left_out.gpu, left_out.why));
    }
    text.text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Color;
    use mesh_machine::boot::choice::Wish;

    fn file(root: &std::path::Path, path: &str, content: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, content).expect("written");
    }

    #[test]
    fn a_person_sees_the_hardware_and_the_reason() {
        let root = tempfile::tempdir().expect("a folder");
        file(
            root.path(),
            "proc/cpuinfo",
            "processor: 0\nmodel name: Some CPU\nflags: avx2\n",
        );
        file(root.path(), "proc/meminfo", "MemTotal: 4000000 kB\n");
        let hardware = probe(root.path());
        let choice = choose(&hardware, Wish::default());
        assert_eq!(
            show(&hardware, &choice, Terminal::new(Color::Never)),
            "processor  Some CPU, 1 threads, AVX2\nmemory     4.10 GB\n\
             backend    cpu, since no graphics card was found, so the processor computes\n"
        );
    }

    #[test]
    fn booting_writes_the_run_folder_also_when_something_is_missing() {
        let root = tempfile::tempdir().expect("a folder");
        file(root.path(), "proc/cmdline", "quiet hydramesh.role=head\n");
        let args = |typed: &str| BootConfigArgs {
            run_dir: root.path().join("run"),
            partition: None,
            state_dir: None,
            backends: None,
            images: false,
            typed: Some(root.path().join(typed)),
            root: root.path().to_owned(),
        };
        boot_config(args("absent")).expect("a plan");
        assert!(root.path().join("run/role-head").exists());
        file(root.path(), "typed", "role=worker\n");
        boot_config(args("typed")).expect("a plan");
        assert!(!root.path().join("run/role-head").exists());
        assert!(!root.path().join("run/ready").exists());
        let summary = std::fs::read_to_string(root.path().join("run/summary")).expect("text");
        assert!(summary.contains("Missing: a join token"), "{summary}");
    }
}
