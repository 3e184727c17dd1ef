#!/usr/bin/env python3
"""Writes what the NixOS module generates as files: units, configurations, tmpfiles rules.

    scripts/nix_units.py --out DIR [--bin /usr/local/bin] [--etc /etc/hydramesh] [--configuration FILE.nix | --live-image]

For each case of nix/tests/units.nix it makes DIR/<case> with etc/systemd/system/*.service, <etc>/*.toml and
etc/tmpfiles.d/hydramesh.conf: copied onto any machine with systemd, they are what a NixOS machine would run. With
--configuration, a NixOS module of yours is evaluated instead, and its case is called `custom`. With --live-image, it is what the
live image `iso` has: its units, enabled as there, its scripts, its udev rule.

With --check each configuration is read by its own program in --bin, as the build of a NixOS machine does. Needs
nix-instantiate (Debian: nix-bin).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def evaluate(options: argparse.Namespace) -> dict:
    """The files of every case, by evaluation alone: no store is written to."""
    arguments = ["--argstr", "bin", options.bin, "--argstr", "etc", options.etc]
    if options.configuration:
        arguments += ["--argstr", "configuration", str(Path(options.configuration).resolve())]
    expression = "nix/tests/iso-files.nix" if options.live_image else "nix/tests/units.nix"
    command = ["nix-instantiate", "--store", "dummy://", "--eval", "--strict", "--json"]
    with tempfile.TemporaryDirectory() as home:
        run = subprocess.run(
            [*command, str(ROOT / expression), *arguments],
            env={**os.environ, "HOME": home},
            capture_output=True,
            text=True,
        )
    if run.returncode:
        sys.exit(f"nix_units: {run.stderr.strip()}")
    return json.loads(run.stdout)


def write(folder: Path, case: dict, options: argparse.Namespace) -> None:
    etc = options.etc
    files = {f"etc/systemd/system/{name}": text for name, text in case["units"].items()}
    files |= {f"{etc.strip('/')}/{name}": text for name, text in case["configs"].items()}
    files["etc/tmpfiles.d/hydramesh.conf"] = case["tmpfiles"]
    scripts = {f"{options.bin.strip('/')}/{name}": text for name, text in case.get("scripts", {}).items()}
    if "udev" in case:
        files["etc/udev/rules.d/99-local.rules"] = case["udev"]
    for name, text in (files | scripts).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if name in scripts else 0o644)
    if options.live_image:
        enable(folder / "etc/systemd/system", case)


def enable(system: Path, case: dict) -> None:
    """What NixOS does with wantedBy and with units that are not to be there."""
    for unit, text in case["units"].items():
        for line in text.splitlines():
            target = line.removeprefix("WantedBy=")
            if target != line:
                wants = system / f"{target}.wants"
                wants.mkdir(exist_ok=True)
                (wants / unit).symlink_to(f"../{unit}")
    for unit in case["disabled"]:
        (system / f"{unit}.service").symlink_to("/dev/null")


def check(folder: Path, case: dict, options: argparse.Namespace) -> list[str]:
    """What the programs say against their configurations."""
    complaints = []
    for service, variables in case["environments"].items():
        config = folder / options.etc.strip("/") / f"{service}.toml"
        role = service.partition("-")[0]
        clean = {name: text for name, text in os.environ.items() if not name.startswith("HYDRAMESH_")}
        run = subprocess.run(
            [f"{options.bin}/mesh-{role}", "--config", str(config), "--check-config"],
            env=clean | variables,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            complaints.append(f"{folder.name}: {run.stderr.strip()}")
    return complaints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for the files")
    parser.add_argument("--bin", default="/usr/bin", help="folder of the programs, as the units shall name it")
    parser.add_argument("--etc", default="/etc/hydramesh", help="folder of the configurations")
    parser.add_argument("--configuration", help="a NixOS module to evaluate")
    parser.add_argument("--live-image", action="store_true", help="what the live image has")
    parser.add_argument("--check", action="store_true", help="let the programs check their configurations")
    options = parser.parse_args()
    if Path(options.bin).name != "bin":
        parser.error(f"--bin is {options.bin}; the folder must be called bin, as in every package")

    complaints = []
    for name, case in evaluate(options).items():
        write(options.out / name, case, options)
        for warning in case["warnings"]:
            print(f"nix_units: {name}: warning: {warning}", file=sys.stderr)
        if options.check:
            complaints += check(options.out / name, case, options)
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
