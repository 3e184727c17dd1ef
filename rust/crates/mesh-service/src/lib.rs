//! What every service shares: layered configuration, telemetry, systemd, signals, health.
