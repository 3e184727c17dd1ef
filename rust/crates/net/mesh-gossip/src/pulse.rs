//! `pulse`: the condition of each machine, and that of the fleet.
//!
//! A node puts its pulse into its own frames, so nobody else can claim it. The fleet pulse is computed by each node from
//! those that it heard.

use mesh_proto::GossipPulse;

/// Condition of a machine. Absent values are those that the machine does not report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Load average of one minute, in hundredths of all processors.
    pub load_percent: Option<u32>,
    /// Highest temperature of a processor, degrees Celsius.
    pub temperature_celsius: Option<i32>,
    /// Memory that programs can still get, bytes.
    pub memory_available: Option<u64>,
    /// Memory of the machine, bytes.
    pub memory_total: Option<u64>,
    /// Free space in the file system of the state directory, bytes.
    pub disk_available: Option<u64>,
    /// Size of that file system, bytes.
    pub disk_total: Option<u64>,
    /// Time since the machine was started, seconds.
    pub uptime_seconds: Option<u64>,
    /// Charge of the battery, percent; absent without one.
    pub battery_percent: Option<u32>,
    /// True while the machine runs on its battery.
    pub on_battery: Option<bool>,
}

impl Pulse {
    pub(crate) fn to_wire(self) -> GossipPulse {
        GossipPulse {
            load_percent: self.load_percent,
            temperature_celsius: self.temperature_celsius,
            memory_available: self.memory_available,
            memory_total: self.memory_total,
            disk_available: self.disk_available,
            disk_total: self.disk_total,
            uptime_seconds: self.uptime_seconds,
            battery_percent: self.battery_percent,
            on_battery: self.on_battery,
        }
    }

    /// A peer's claim, cut to values that a machine can have.
    pub(crate) fn from_wire(wire: &GossipPulse) -> Self {
        let memory_total = wire.memory_total.map(|bytes| bytes.min(MOST_BYTES));
        let disk_total = wire.disk_total.map(|bytes| bytes.min(MOST_BYTES));
        let part = |value: Option<u64>, total: Option<u64>| {
            value.map(|bytes| bytes.min(total.unwrap_or(MOST_BYTES)))
        };
        Self {
            load_percent: wire.load_percent.map(|percent| percent.min(100_000)),
            temperature_celsius: wire
                .temperature_celsius
                .map(|celsius| celsius.clamp(-100, 200)),
            memory_available: part(wire.memory_available, memory_total),
            memory_total,
            disk_available: part(wire.disk_available, disk_total),
            disk_total,
            uptime_seconds: wire.uptime_seconds.map(|seconds| seconds.min(1 << 40)),
            battery_percent: wire.battery_percent.map(|percent| percent.min(100)),
            on_battery: wire.on_battery,
        }
    }
}

/// Smallest, mean and greatest of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// Smallest value.
    pub least: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Greatest value.
    pub most: f64,
}

impl Range {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let (mut least, mut most, mut sum, mut count) = (f64::INFINITY, f64::NEG_INFINITY, 0.0, 0);
        for value in values {
            (least, most) = (least.min(value), most.max(value));
            (sum, count) = (sum + value, count + 1);
        }
        (count > 0).then(|| Self {
            least,
            mean: sum / f64::from(count),
            most,
        })
    }
}

/// Condition of all machines that were heard.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FleetPulse {
    /// Machines that it comprises.
    pub nodes: usize,
    /// Load, in percent of all processors of a machine.
    pub load_percent: Option<Range>,
    /// Temperature, degrees Celsius.
    pub temperature_celsius: Option<Range>,
    /// Free memory of all machines, bytes.
    pub memory_available: u64,
    /// Memory of all machines, bytes.
    pub memory_total: u64,
    /// Free space of all machines, bytes.
    pub disk_available: u64,
    /// Size of all file systems of state directories, bytes.
    pub disk_total: u64,
    /// Shortest time since a machine was started, seconds.
    pub shortest_uptime_seconds: Option<u64>,
    /// Machines that run on their battery.
    pub on_battery: usize,
    /// Lowest charge among the machines that run on their battery, percent.
    pub lowest_battery_percent: Option<u32>,
}

impl FleetPulse {
    pub(crate) fn of(pulses: &[Pulse]) -> Self {
        let all = || pulses.iter();
        let sum = |value: fn(&Pulse) -> Option<u64>| all().filter_map(value).sum();
        let on_battery = || all().filter(|pulse| pulse.on_battery == Some(true));
        Self {
            nodes: pulses.len(),
            load_percent: Range::of(all().filter_map(|pulse| pulse.load_percent).map(f64::from)),
            temperature_celsius: Range::of(
                all()
                    .filter_map(|pulse| pulse.temperature_celsius)
                    .map(f64::from),
            ),
            memory_available: sum(|pulse| pulse.memory_available),
            memory_total: sum(|pulse| pulse.memory_total),
            disk_available: sum(|pulse| pulse.disk_available),
            disk_total: sum(|pulse| pulse.disk_total),
            shortest_uptime_seconds: all().filter_map(|pulse| pulse.uptime_seconds).min(),
            on_battery: on_battery().count(),
            lowest_battery_percent: on_battery().filter_map(|pulse| pulse.battery_percent).min(),
        }
    }
}

/// No machine has more; sums of a thousand of them do not overflow.
const MOST_BYTES: u64 = 1 << 50;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_pulse_adds_up_machines_and_bounds_their_claims() {
        let laptop = Pulse {
            load_percent: Some(50),
            temperature_celsius: Some(70),
            memory_available: Some(1 << 30),
            memory_total: Some(4 << 30),
            battery_percent: Some(30),
            on_battery: Some(true),
            uptime_seconds: Some(60),
            ..Pulse::default()
        };
        let claim = GossipPulse {
            load_percent: Some(u32::MAX),
            memory_available: Some(u64::MAX),
            memory_total: Some(8 << 30),
            battery_percent: Some(900),
            ..GossipPulse::default()
        };
        let liar = Pulse::from_wire(&claim);
        assert_eq!(
            (liar.memory_available, liar.battery_percent),
            (Some(8 << 30), Some(100))
        );
        let fleet = FleetPulse::of(&[laptop, liar]);
        assert_eq!((fleet.nodes, fleet.on_battery), (2, 1));
        assert_eq!(fleet.memory_total, 12 << 30);
        assert_eq!(fleet.memory_available, 9 << 30);
        assert_eq!(fleet.lowest_battery_percent, Some(30));
        assert_eq!(fleet.load_percent.unwrap().least, 50.0);
        assert_eq!(fleet.temperature_celsius.unwrap().mean, 70.0);
        assert_eq!(Pulse::from_wire(&laptop.to_wire()), laptop);
        assert_eq!(FleetPulse::of(&[]), FleetPulse::default());
    }
}
