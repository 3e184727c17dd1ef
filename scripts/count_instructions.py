#!/usr/bin/env python3
"""Instructions of the matrix products on an emulated CPU, counted by QEMU: for CPUs that are not at hand to measure time.

    scripts/count_instructions.py [aarch64|x86_64] [TYPE ...]        (default: aarch64, Q4_0 Q8_0)

Prints a table: instructions per row and block of 16 outputs times 32 inputs, for each instruction set of QEMU's CPU `max`, with
1 row (decoding) and with 8 rows (prefill). The figure is the difference between two products and one, so everything else drops
out. Needs rustup and QEMU's user emulation. Some minutes: QEMU writes a line for every instruction.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# As in examples/one_product.rs.
BLOCKS = (256 // 16) * (1024 // 32)
SETS = {
    "aarch64": ["scalar", "neonv8", "neon", "neoni8mm"],
    "x86_64": ["scalar", "sse2", "sse41", "avx", "avx2"],
}
TYPES = ["Q4_0", "Q8_0"]


def build(architecture):
    """The example's path, linked without libraries of the architecture."""
    target = f"{architecture}-unknown-linux-musl"
    variable = "CARGO_TARGET_" + target.upper().replace("-", "_") + "_LINKER"
    subprocess.run(["rustup", "target", "add", target], check=True)
    subprocess.run(
        ["cargo", "build", "--locked", "--package=mesh-kernels", "--example=one_product", f"--target={target}"],
        cwd=ROOT / "rust",
        env=os.environ | {variable: "rust-lld"},
        check=True,
    )
    folder = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "rust" / "target"))
    return folder / target / "debug" / "examples" / "one_product"


def count(architecture, program, *arguments):
    """All instructions of a run of the program. QEMU translates one at a time and writes a line before it runs."""
    log, end = os.pipe()
    lines = subprocess.Popen(["wc", "-l"], stdin=log, stdout=subprocess.PIPE, text=True)
    os.close(log)
    qemu = f"qemu-{architecture}-static"
    # QEMU 8.1 has renamed the option.
    options = subprocess.run([qemu, "-help"], check=True, capture_output=True, text=True).stdout
    one = "-one-insn-per-tb" if "-one-insn-per-tb" in options else "-singlestep"
    command = [qemu, "-cpu", "max", one, "-d", "exec,nochain", "-D", f"/dev/fd/{end}", program, *arguments]
    try:
        subprocess.run(command, pass_fds=[end], check=True)
    finally:
        os.close(end)
        total, _ = lines.communicate()
    return int(total)


def main():
    architecture = sys.argv[1] if len(sys.argv) > 1 else "aarch64"
    if architecture not in SETS:
        sys.exit(f"count_instructions: unknown architecture {architecture!r}: use {' or '.join(SETS)}")
    types = sys.argv[2:] or TYPES
    program = build(architecture)
    print(f"{'type':8} {'set':10} {'1 row':>8} {'8 rows':>8}")
    for kind in types:
        for isa in SETS[architecture]:
            line = f"{kind:8} {isa:10}"
            for rows in (1, 8):
                once, twice = (count(architecture, program, isa, kind, str(rows), times) for times in "12")
                line += f" {(twice - once) / rows / BLOCKS:8.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
