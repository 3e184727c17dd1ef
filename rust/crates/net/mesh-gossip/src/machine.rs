//! The condition of a machine, and the epoch in its state directory. The only part of this crate that touches files.

use std::fs;
use std::io;
use std::path::Path;

use crate::pulse::Pulse;

impl Pulse {
    /// The condition of the machine whose `/proc` and `/sys` are below `root`, with the file system of `state_dir`.
    pub fn read(root: &Path, state_dir: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).ok();
        let memory = |name: &str| {
            let all = text("proc/meminfo")?;
            let line = all.lines().find_map(|line| line.strip_prefix(name))?;
            let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
            kibibytes.checked_mul(1024)
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let first =
            |path: &str| -> Option<f64> { text(path)?.split_whitespace().next()?.parse().ok() };
        let load = first("proc/loadavg").map(|load| 100.0 * load / processors as f64);
        let disk = nix::sys::statvfs::statvfs(state_dir).ok();
        let size = |blocks: u64| disk.map(|disk| blocks.saturating_mul(disk.fragment_size()));
        let (battery_percent, on_battery) = battery(&root.join("sys/class/power_supply"));
        Self {
            load_percent: load.map(|percent| percent as u32),
            temperature_celsius: temperature(&root.join("sys/class/thermal")),
            memory_available: memory("MemAvailable"),
            memory_total: memory("MemTotal"),
            disk_available: disk.and_then(|disk| size(disk.blocks_available())),
            disk_total: disk.and_then(|disk| size(disk.blocks())),
            uptime_seconds: first("proc/uptime").map(|seconds| seconds as u64),
            battery_percent,
            on_battery,
        }
    }
}

/// The highest of all thermal zones.
fn temperature(zones: &Path) -> Option<i32> {
    let read = |entry: fs::DirEntry| -> Option<i32> {
        let text = fs::read_to_string(entry.path().join("temp")).ok()?;
        Some(text.trim().parse::<i32>().ok()? / 1000)
    };
    let entries = fs::read_dir(zones).ok()?.take(MOST_ENTRIES).flatten();
    entries.filter_map(read).max()
}

/// Charge of the first battery, and whether the machine runs on it.
fn battery(supplies: &Path) -> (Option<u32>, Option<bool>) {
    let Ok(entries) = fs::read_dir(supplies) else {
        return (None, None);
    };
    for entry in entries.take(MOST_ENTRIES).flatten() {
        let text = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        // Those of mice and keyboards do not run the machine.
        if text("type").trim() == "Battery" && text("scope").trim() != "Device" {
            let charge = text("capacity").trim().parse().ok();
            return (charge, Some(text("status").trim() == "Discharging"));
        }
    }
    (None, None)
}

/// The epoch of this start: the time, or one more than that of the start before, if the clock was set back since.
///
/// # Errors
/// If the file in the state directory cannot be written.
pub fn next_epoch(state_dir: &Path, unix: u64) -> io::Result<u64> {
    let path = state_dir.join("gossip.epoch");
    let last = fs::read_to_string(&path).ok();
    let last: u64 = last.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    // A file from a time when the clock was far ahead would make peers refuse this node.
    let epoch = match last >= unix && last - unix < LONGEST_SETBACK {
        true => last + 1,
        false => unix,
    };
    mesh_base::files::replace(&path, epoch.to_string().as_bytes(), 0o600)?;
    Ok(epoch)
}

const MOST_ENTRIES: usize = 64;
/// Seconds. Peers take epochs that are two days ahead.
const LONGEST_SETBACK: u64 = 24 * 3600;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_of_a_machine_is_read_and_a_poor_one_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(
            Pulse::read(dir.path(), Path::new("/nowhere")),
            Pulse::default()
        );
        write(
            "proc/meminfo",
            "MemTotal:  4096 kB\nMemAvailable:  1024 kB\n",
        );
        write("proc/uptime", "77.5 100.0\n");
        write("sys/class/thermal/thermal_zone0/temp", "41000\n");
        write("sys/class/thermal/thermal_zone1/temp", "63999\n");
        write("sys/class/power_supply/AC/type", "Mains\n");
        write("sys/class/power_supply/BAT0/type", "Battery\n");
        write("sys/class/power_supply/BAT0/capacity", "55\n");
        write("sys/class/power_supply/BAT0/status", "Discharging\n");
        let pulse = Pulse::read(dir.path(), dir.path());
        assert_eq!(
            (pulse.memory_total, pulse.memory_available),
            (Some(4 << 20), Some(1 << 20))
        );
        assert_eq!(
            (pulse.uptime_seconds, pulse.temperature_celsius),
            (Some(77), Some(63))
        );
        assert_eq!(
            (pulse.battery_percent, pulse.on_battery),
            (Some(55), Some(true))
        );
        assert!(pulse.disk_total > Some(0));
    }

    #[test]
    fn epochs_grow_even_if_the_clock_is_set_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(next_epoch(dir.path(), 1000).unwrap(), 1000);
        assert_eq!(next_epoch(dir.path(), 1000).unwrap(), 1001);
        assert_eq!(next_epoch(dir.path(), 900).unwrap(), 1002);
        assert_eq!(next_epoch(dir.path(), 2000).unwrap(), 2000);
        fs::write(dir.path().join("gossip.epoch"), "9999999999").unwrap();
        assert_eq!(next_epoch(dir.path(), 3000).unwrap(), 3000);
    }
}
