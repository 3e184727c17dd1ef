//! The processor's cache, and its load by other processes. Unreadable values are unknown, never an error.

use std::path::Path;

use crate::files::kernel_text;

/// Bytes of last-level cache over all processors; 32 MiB where the system does not report it.
pub(crate) fn last_level_cache(root: &Path, cpus: usize) -> u64 {
    const CACHES: &str = "sys/devices/system/cpu/cpu0/cache";
    let largest = (0..8)
        .filter_map(|index| {
            let text = |file| kernel_text(&root.join(format!("{CACHES}/index{index}/{file}")));
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
    let parts = list.split(',').filter_map(part);
    parts.fold(0, usize::saturating_add)
}

/// Processes ready to run per core beside this one's own, over about a minute. This process's time so far is taken as used within
/// the last minute.
pub(crate) fn load(root: &Path) -> f32 {
    let used = kernel_text(&root.join("proc/self/stat")).and_then(|text| processor_seconds(&text));
    let text = kernel_text(&root.join("proc/loadavg")).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    others(&text, used.unwrap_or(0.0).min(60.0) / 60.0, cores)
}

/// The load average without `own`, per core.
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
    use crate::files::tests::tree;

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
        let root = tree(&[
            ("proc/loadavg", "100.50 2.00 1.00 5/600 1234\n"),
            ("proc/self/stat", stat),
        ]);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        assert_eq!(load(root.path()), (100.45 / cores as f64) as f32);
        assert_eq!(load(Path::new("/nowhere")), 0.0);
    }
}
