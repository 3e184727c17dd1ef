//! Memory that this process may use: the machine's, within the limits of its control groups.

use std::path::{Component, Path};

use crate::files::kernel_text;

/// Memory in bytes; `None` where the system does not report it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Memory of the machine.
    pub installed: Option<u64>,
    /// Memory that this process may ever have: all of the machine's, or the tightest limit of a control
    /// group.
    pub total: Option<u64>,
    /// Memory that this process could have now, without swapping.
    pub available: Option<u64>,
}

impl Memory {
    /// Reads procfs and sysfs below `root`, which is `/` except in tests.
    pub fn read(root: &Path) -> Self {
        let text = kernel_text(&root.join("proc/meminfo")).unwrap_or_default();
        let line = |name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        let installed = line("MemTotal:");
        let mut memory = Memory {
            installed,
            total: installed,
            available: line("MemAvailable:"),
        };
        for (limit, left) in group_limits(root) {
            let least = |known: Option<u64>, bytes| Some(known.unwrap_or(u64::MAX).min(bytes));
            memory.total = least(memory.total, limit);
            memory.available = least(memory.available, left);
        }
        memory
    }
}

/// The files of one version of control groups.
struct Version {
    /// Mount point of the hierarchy.
    mount: &'static str,
    /// Limits; beyond each the kernel kills or throttles.
    limits: &'static [&'static str],
    usage: &'static str,
    /// Entries of memory.stat that the kernel gives back before it kills.
    reclaimable: &'static [&'static str],
}

/// Limit and remaining bytes of every limited control group, from the process's own to the root. In a
/// container the own path may be the host's and lead nowhere; the container's group is the root there.
fn group_limits(root: &Path) -> Vec<(u64, u64)> {
    let groups = kernel_text(&root.join("proc/self/cgroup")).unwrap_or_default();
    let own = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (id, controllers) = (fields.next()?, fields.next()?);
        let version = match (id, controllers) {
            ("0", "") => &V2,
            _ if controllers.split(',').any(|name| name == "memory") => &V1,
            _ => return None,
        };
        let path = Path::new(fields.next()?.strip_prefix('/')?);
        let mut parts = path.components();
        let plain = parts.all(|part| matches!(part, Component::Normal(_)));
        plain.then_some((version, path))
    });
    own.flat_map(|(version, path)| path.ancestors().take(32).map(move |group| (version, group)))
        .filter_map(|(version, group)| version.limit(&root.join(version.mount).join(group)))
        .collect()
}

impl Version {
    /// Limit and remaining bytes of the group in `folder`. Cached files count as remaining, as they do in
    /// `MemAvailable`: reading a model fills a group up to its limit, and costs the next allocation nothing.
    fn limit(&self, folder: &Path) -> Option<(u64, u64)> {
        let number = |file| kernel_text(&folder.join(file))?.trim().parse::<u64>().ok();
        let limit = self.limits.iter().copied().filter_map(number).min()?;
        let stat = kernel_text(&folder.join("memory.stat")).unwrap_or_default();
        let entries = stat.lines().filter_map(|line| line.split_once(' '));
        let reclaimable = entries.filter(|(name, _)| self.reclaimable.contains(name));
        let reclaimable = reclaimable.filter_map(|(_, bytes)| bytes.trim().parse().ok());
        let reclaimable = reclaimable.fold(0, u64::saturating_add);
        let used = number(self.usage)?.saturating_sub(reclaimable);
        Some((limit, limit.saturating_sub(used)))
    }
}

/// Kernel documentation, admin-guide/cgroup-v2.rst.
const V2: Version = Version {
    mount: "sys/fs/cgroup",
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    reclaimable: &["active_file", "inactive_file", "slab_reclaimable"],
};
/// Kernel documentation, admin-guide/cgroup-v1/memory.rst. No limit is the largest number of whole pages.
const V1: Version = Version {
    mount: "sys/fs/cgroup/memory",
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    reclaimable: &["total_active_file", "total_inactive_file"],
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::tree;

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:   6000 kB\n",
    );

    /// Total and available memory of a machine with 8000 KiB, of which 6000 are available, and `files`.
    fn within(files: &[(&str, &str)]) -> (u64, u64) {
        let root = tree(&[files, &[MEMINFO]].concat());
        let memory = Memory::read(root.path());
        assert_eq!(memory.installed, Some(8000 << 10));
        (memory.total.unwrap(), memory.available.unwrap())
    }

    #[test]
    fn without_control_groups_memory_is_the_machines() {
        assert_eq!(within(&[]), (8000 << 10, 6000 << 10));
        assert_eq!(Memory::read(Path::new("/nowhere")), Memory::default());
    }

    #[test]
    fn the_tightest_group_above_a_process_limits_its_memory() {
        let found = within(&[
            (
                "proc/self/cgroup",
                "1:name=systemd:/\n0::/system.slice/worker\n",
            ),
            ("sys/fs/cgroup/system.slice/worker/memory.max", "max\n"),
            ("sys/fs/cgroup/system.slice/worker/memory.current", "5\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "4096000\n"),
            ("sys/fs/cgroup/system.slice/memory.current", "96000\n"),
        ]);
        assert_eq!(found, (4_096_000, 4_000_000));
    }

    #[test]
    fn a_container_is_limited_by_the_root_of_its_groups() {
        let version2 = within(&[
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "3000000\n"),
            ("sys/fs/cgroup/memory.current", "1000000\n"),
        ]);
        assert_eq!(version2, (3_000_000, 2_000_000));
        // The path is the host's.
        let version1 = within(&[
            (
                "proc/self/cgroup",
                "5:cpuset:/docker/ab\n4:cpu,memory:/docker/ab\n1:name=systemd:/docker/ab\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n"),
            (
                "sys/fs/cgroup/memory/memory.stat",
                "inactive_file 7\ntotal_inactive_file 400000\ntotal_active_file 100000\n",
            ),
        ]);
        assert_eq!(version1, (3_000_000, 2_000_000));
        let unlimited = within(&[
            ("proc/self/cgroup", "4:memory:/\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n"),
        ]);
        assert_eq!(unlimited, (8000 << 10, 6000 << 10));
    }

    #[test]
    fn cached_files_do_not_use_a_limit_up_and_throttling_is_a_limit() {
        let found = within(&[
            ("proc/self/cgroup", "0::/worker\n"),
            ("sys/fs/cgroup/worker/memory.max", "5000000\n"),
            ("sys/fs/cgroup/worker/memory.high", "4000000\n"),
            ("sys/fs/cgroup/worker/memory.current", "4000000\n"),
            (
                "sys/fs/cgroup/worker/memory.stat",
                "anon 1000000\nfile 3000000\nactive_file 1000000\ninactive_file 1900000\nslab_reclaimable 100000\n",
            ),
        ]);
        assert_eq!(found, (4_000_000, 3_000_000));
    }

    #[test]
    fn nonsense_is_unknown() {
        let odd = tree(&[
            (
                "proc/meminfo",
                "MemTotal: 99999999999999999999 kB\nMemAvailable: x kB\n",
            ),
            (
                "proc/self/cgroup",
                "0::/../../etc\n0::relative\n:::\n4:memory\n",
            ),
        ]);
        assert_eq!(Memory::read(odd.path()), Memory::default());
        let found = within(&[
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "-1\n"),
            ("sys/fs/cgroup/memory.max", "1000\n"),
            ("sys/fs/cgroup/memory.current", "18446744073709551615\n"),
            (
                "sys/fs/cgroup/memory.stat",
                "active_file x\nactive_file\n\n",
            ),
        ]);
        assert_eq!(found, (1000, 0));
    }
}
