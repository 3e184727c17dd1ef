//! What procfs and sysfs say about processor, memory and load. What cannot be read is unknown, never an error.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

/// The text of a kernel file below `root`, cut at 1 MiB.
pub(crate) fn kernel_text(root: &Path, path: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let file = File::open(root.join(path)).ok()?;
    file.take(1 << 20).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The processor's name; on ARM, which has none there, its numbers.
pub(crate) fn cpu_name(root: &Path) -> String {
    let text = kernel_text(root, "proc/cpuinfo").unwrap_or_default();
    let value = |wanted: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == wanted).then(|| value.trim().to_owned())
        })
    };
    let name = value("model name").or_else(|| {
        let (maker, part) = (value("CPU implementer")?, value("CPU part")?);
        Some(format!("ARM {maker}:{part}"))
    });
    let name = name.unwrap_or_else(|| "unknown".into());
    name.chars().filter(|c| !c.is_control()).take(80).collect()
}

/// Total and available memory, bytes; the smaller of the machine's and of the control groups' that this process is in.
pub(crate) fn memory(root: &Path) -> (u64, u64) {
    let text = kernel_text(root, "proc/meminfo").unwrap_or_default();
    let line = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    let total = line("MemTotal:").unwrap_or(0);
    let available = line("MemAvailable:").unwrap_or(0);
    let mut least = (total, available);
    for (limit, left) in group_limits(root) {
        least = (least.0.min(limit), least.1.min(left));
    }
    least
}

/// Limit and what is left of it, for every control group (version 2) from the process's own to the root.
fn group_limits(root: &Path) -> Vec<(u64, u64)> {
    let groups = kernel_text(root, "proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let Some(own) = own.filter(|path| !path.split('/').any(|part| part == "..")) else {
        return Vec::new();
    };
    Path::new(own)
        .ancestors()
        .take(32)
        .filter_map(|group| {
            let number = |file: &str| -> Option<u64> {
                let path = Path::new("sys/fs/cgroup").join(group).join(file);
                kernel_text(root, path.to_str()?)?.trim().parse().ok()
            };
            let limit = number("memory.max")?;
            Some((limit, limit.saturating_sub(number("memory.current")?)))
        })
        .collect()
}

/// Bytes of last-level cache over all processors; 32 MiB where the system does not say.
pub(crate) fn last_level_cache(root: &Path, cpus: usize) -> u64 {
    const CACHES: &str = "sys/devices/system/cpu/cpu0/cache";
    let largest = (0..8)
        .filter_map(|index| {
            let text = |file| kernel_text(root, &format!("{CACHES}/index{index}/{file}"));
            let kib: u64 = text("size")?.trim().strip_suffix('K')?.parse().ok()?;
            let sharing = text("shared_cpu_list").map_or(1, |list| list_len(&list));
            Some((kib.min(1 << 22) * 1024, sharing))
        })
        .max_by_key(|(bytes, _)| *bytes);
    match largest {
        Some((bytes, sharing)) => bytes * cpus.div_ceil(sharing.max(1)).clamp(1, 64) as u64,
        None => 32 << 20,
    }
}

/// Numbers in a list such as `0-3,8`.
fn list_len(list: &str) -> usize {
    let part = |part: &str| match part.trim().split_once('-') {
        Some((from, to)) => {
            let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
            Some(to.saturating_sub(from).saturating_add(1))
        }
        None => part.trim().parse::<usize>().ok().map(|_| 1),
    };
    list.split(',')
        .filter_map(part)
        .fold(0, usize::saturating_add)
}

/// Tells how busy other processes keep the machine: the system's load average without this process's own part.
#[derive(Debug)]
pub struct LoadMeter {
    /// When it was read last, and the processor seconds that this process had used by then.
    last: Option<(Instant, f64)>,
}

impl Default for LoadMeter {
    fn default() -> Self {
        LoadMeter::new()
    }
}

impl LoadMeter {
    /// A meter that has not been read.
    pub fn new() -> Self {
        LoadMeter { last: None }
    }

    /// Processes ready to run per core beside this one's own, over about a minute. The first reading takes the process's time
    /// so far as used within the last minute; later ones what it used since the one before.
    pub fn read(&mut self) -> f32 {
        let root = Path::new("/");
        let now = Instant::now();
        let used = kernel_text(root, "proc/self/stat").and_then(|text| processor_seconds(&text));
        let own = match (used, self.last) {
            (Some(used), Some((at, before))) => {
                let seconds = (now - at).as_secs_f64();
                if seconds > 1.0 {
                    (used - before) / seconds
                } else {
                    0.0
                }
            }
            (Some(used), None) => used.min(60.0) / 60.0,
            (None, _) => 0.0,
        };
        if let Some(used) = used {
            self.last = Some((now, used));
        }
        let text = kernel_text(root, "proc/loadavg").unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        others(&text, own, cores)
    }
}

fn others(loadavg: &str, own: f64, cores: usize) -> f32 {
    let all: Option<f64> = loadavg.split(' ').next().and_then(|text| text.parse().ok());
    let all = all.filter(|load| (0.0..1e6).contains(load)).unwrap_or(0.0);
    ((all - own).max(0.0) / cores.max(1) as f64) as f32
}

/// User and system time of /proc/self/stat, in ticks of 10 ms.
fn processor_seconds(stat: &str) -> Option<f64> {
    // The program's name, in parentheses, may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let ticks = |text: Option<&str>| text?.parse::<f64>().ok();
    Some((ticks(fields.next())? + ticks(fields.next())?) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, text).expect("written");
        }
        root
    }

    #[test]
    fn memory_is_what_the_tightest_group_leaves() {
        let meminfo = "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:   6000 kB\n";
        let free = tree(&[("proc/meminfo", meminfo)]);
        assert_eq!(memory(free.path()), (8000 << 10, 6000 << 10));
        let bound = tree(&[
            ("proc/meminfo", meminfo),
            (
                "proc/self/cgroup",
                "1:name=systemd:/\n0::/system.slice/worker\n",
            ),
            ("sys/fs/cgroup/system.slice/worker/memory.max", "max\n"),
            ("sys/fs/cgroup/system.slice/worker/memory.current", "5\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "4096000\n"),
            ("sys/fs/cgroup/system.slice/memory.current", "96000\n"),
        ]);
        assert_eq!(memory(bound.path()), (4_096_000, 4_000_000));
        assert_eq!(memory(Path::new("/nowhere")), (0, 0));
        let odd = tree(&[
            (
                "proc/meminfo",
                "MemTotal: 99999999999999999999 kB\nMemAvailable: x kB\n",
            ),
            ("proc/self/cgroup", "0::/../../etc\n"),
        ]);
        assert_eq!(memory(odd.path()), (0, 0));
    }

    #[test]
    fn processors_have_a_name() {
        let intel = tree(&[(
            "proc/cpuinfo",
            "processor: 0\nmodel name\t: Some CPU @ 2 GHz\n",
        )]);
        assert_eq!(cpu_name(intel.path()), "Some CPU @ 2 GHz");
        let arm = tree(&[("proc/cpuinfo", "CPU implementer : 0x41\nCPU part : 0xd0b\n")]);
        assert_eq!(cpu_name(arm.path()), "ARM 0x41:0xd0b");
        assert_eq!(cpu_name(Path::new("/nowhere")), "unknown");
    }

    #[test]
    fn caches_of_all_clusters_count() {
        let cache = "sys/devices/system/cpu/cpu0/cache";
        let root = tree(&[
            (&format!("{cache}/index0/size"), "32K\n"),
            (&format!("{cache}/index3/size"), "32768K\n"),
            (&format!("{cache}/index3/shared_cpu_list"), "0-3,8-11\n"),
        ]);
        assert_eq!(last_level_cache(root.path(), 16), 64 << 20);
        assert_eq!(last_level_cache(Path::new("/nowhere"), 4), 32 << 20);
    }

    #[test]
    fn load_leaves_this_process_out() {
        assert_eq!(others("3.00 2.00 1.00 5/600 1234\n", 1.0, 4), 0.5);
        assert_eq!(others("0.50 0 0", 2.0, 4), 0.0);
        assert_eq!(others("nonsense", 0.0, 4), 0.0);
        let stat = "7 (a) b) R 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0";
        assert_eq!(processor_seconds(stat), Some(3.0));
        assert_eq!(processor_seconds("7 (a"), None);
        assert!(LoadMeter::new().read() >= 0.0);
    }
}
