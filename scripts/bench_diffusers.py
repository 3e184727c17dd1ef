#!/usr/bin/env python3
"""mesh-engine-tch against diffusers: the same weights, the same libtorch, the same threads, in turn.

    scripts/bench_diffusers.py MODEL_FOLDER [--threads 2] [--rounds 3] [--steps 2] [--sizes 256,512] [--decode]
        [--device cuda] [--slicing] [--form FORM OFFLOAD]

Run it with a Python that has torch 2.11.0, diffusers 0.35.2 and transformers 4.57.3 (scripts/fetch_diffusers.py makes one). The
folder is that of `random_diffusion sd15 FOLDER`; the example `steps` must be built for release, with --device cuda against a libtorch
that has CUDA. CPUs compute with 32 bits, GPUs with 16. Prints for every size the ratio of
diffusers' time to ours (over 1: we are faster), and the ratio of our largest resident memory to that of diffusers.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "rust/target")


def anchor(folder, threads, device, slicing):
    """Answers the lines that the example `steps` answers, with diffusers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.perf_counter()
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    folder = Path(folder)
    dtype = torch.float32 if device == "cpu" else torch.float16
    place = {"device": device, "dtype": dtype}
    # All that a picture needs lies in memory, as in ours.
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device).eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device).eval()
    assert text is not None
    if slicing:
        unet.set_attention_slice("auto")
        vae.enable_slicing()
    print(f"ready {time.perf_counter() - started}", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["memory"]:
                status = Path("/proc/self/status").read_text()
                print(1024 * int(status.split("VmHWM:")[1].split()[0]), flush=True)
            case [what, side, count]:
                side = int(side) // 8
                context = torch.randn(2, 77, 768).to(**place)
                latents = torch.randn(1, 4, side, side).to(**place)
                started = time.perf_counter()
                for step in range(int(count)):
                    if what == "step":
                        both = unet(torch.cat([latents] * 2), 900 - 10 * step, encoder_hidden_states=context).sample
                        negative, positive = both.chunk(2)
                        # As ours, which hands the latents to the sampler after each step.
                        (negative + 7.5 * (positive - negative)).float().cpu()
                    else:
                        picture = vae.decode(latents / vae.config.scaling_factor).sample
                        ((picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype("uint8")
                print(time.perf_counter() - started, flush=True)


class Engine:
    """A process that loaded the model and does work for each line."""

    def __init__(self, name, command):
        self.name = name
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load = float(self.answer().split()[1])

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self.process.wait()}; its words are above")
        return line

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def compare(arguments):
    folder, threads, device = arguments.folder, arguments.threads, arguments.device
    os.environ["TORCH_DEVICE"] = device
    ours = Engine("ours", [arguments.ours or TARGET / "release/examples/steps", folder, threads, *arguments.form])
    anchored = ["--threads", threads, "--device", device, *["--slicing"] * arguments.slicing]
    theirs = Engine("diffusers", [sys.executable, __file__, folder, "--anchor", *anchored])
    print(f"load: ours {ours.load:.1f} s, diffusers {theirs.load:.1f} s")
    work = [(f"step {size} {arguments.steps}", arguments.steps) for size in arguments.sizes]
    if arguments.decode:
        work += [(f"decode {size} 1", 1) for size in arguments.sizes]
    for line, count in work:
        for engine in (ours, theirs):
            engine.ask(" ".join([*line.split()[:2], "1"]))
        ratios, times = [], []
        for _ in range(arguments.rounds):
            mine, other = ours.ask(line), theirs.ask(line)
            ratios.append(other / mine)
            times.append((mine / count, other / count))
        mine, other = (statistics.median(column) for column in zip(*times))
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        what = " ".join(line.split()[:2])
        best = [min(column) for column in zip(*times)]
        print(
            f"{what}: {statistics.median(ratios):.2f} ({spread}), of the best times {best[1] / best[0]:.2f}; "
            f"medians: ours {mine:.2f} s, diffusers {other:.2f} s",
            flush=True,
        )
        memory = [engine.ask("memory") / 1e9 for engine in (ours, theirs)]
        print(f"{what}: memory {memory[0] / memory[1]:.2f}; ours {memory[0]:.2f} GB, diffusers {memory[1]:.2f} GB", flush=True)
    ours.end()
    theirs.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[256, 512])
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--slicing", action="store_true", help="diffusers computes attention and pictures in slices")
    parser.add_argument("--form", nargs="*", default=[], help="ours: form of the weights and what is offloaded, as for steps")
    parser.add_argument("--ours", help="the example, if not that of the release build")
    parser.add_argument("--anchor", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.anchor:
        anchor(arguments.folder, arguments.threads, arguments.device, arguments.slicing)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
