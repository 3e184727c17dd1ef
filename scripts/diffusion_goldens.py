#!/usr/bin/env python3
"""Writes what diffusers and transformers compute with the tests' tiny models, for the tests of mesh-engine-tch.

    cargo run -p mesh-diffusion --features synth --example random_diffusion -- tiny FOLDER        (in rust/)
    scripts/diffusion_goldens.py FOLDER [--check]

Needs torch, diffusers 0.35.2, transformers 4.57.3, numpy and safetensors. Inputs are made by the same function of name and index
as the weights (mesh_diffusion::synth). With --check nothing is written: the single files are converted by diffusers' own functions
and compared with the folders.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as single
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

TARGET = Path(__file__).resolve().parent.parent / "rust/crates/engine/mesh-engine-tch/tests/data/golden.safetensors"
FAMILIES = ("sd1", "sd2", "xl")
START, END = 998, 999
# Two chunks of a prompt, as token ids.
CHUNKS = ([5, 77, 340, 999 - 4, 12], [800, 3])
LATENTS = (4, 9, 12)
TIMESTEP, GUIDANCE = 481, 2.5
# Rows of hidden states that are kept.
EVERY = 7


def randoms(name, shape):
    seed = np.uint64(0xCBF29CE484222325)
    with np.errstate(over="ignore"):
        for byte in name.encode():
            seed = (seed ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        z = seed + np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    values = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return torch.from_numpy(values.reshape(shape))


def ids(pad, chunks):
    rows = [[START, *chunk, END] for chunk in chunks]
    return torch.tensor([row + [pad] * (77 - len(row)) for row in rows])


def encode(folder, family, chunks=CHUNKS):
    """Hidden rows of all chunks and the pooled row of the first."""
    one = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    if family != "xl":
        return one(ids(0 if family == "sd2" else END, chunks))[0], None
    two = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval()
    first = one(ids(END, chunks), output_hidden_states=True)
    second = two(ids(0, chunks), output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0][:1]


def predict(folder, family):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    width = unet.config.cross_attention_dim
    texts = [randoms(f"input/{name}", (77, width)) for name in ("negative", "prompt")]
    added = None
    if family == "xl":
        pooled = [randoms(f"input/{name} pooled", (64,)) for name in ("negative", "prompt")]
        height, width = 2 * LATENTS[1], 2 * LATENTS[2]
        times = torch.tensor([[height, width, 0, 0, height, width]] * 2, dtype=torch.float32)
        added = {"text_embeds": torch.stack(pooled), "time_ids": times}
    latents = 1.7 * randoms("input/latents", (1, *LATENTS))
    out = unet(latents.expand(2, -1, -1, -1), TIMESTEP, torch.stack(texts), added_cond_kwargs=added).sample
    return out[1], out[0] + GUIDANCE * (out[1] - out[0])


def bytes_of(picture):
    picture = (picture / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return (picture * 255).round().astype("uint8")


def picture():
    values = ((randoms("input/picture", (16, 24, 3)).numpy() + 1) * 127).astype("uint8")
    return torch.from_numpy(values.astype("float32") / 255 * 2 - 1).permute(2, 0, 1)[None]


def painted(root, family, **inpainting):
    """A whole picture, with the noise of a seed."""
    kind = {"sd1": DPMSolverMultistepScheduler, "sd2": DDIMScheduler, "xl": EulerDiscreteScheduler}[family]
    scheduler = kind.from_config(DDIMScheduler.load_config(root / "scheduler"))
    parts = {
        "vae": AutoencoderKL.from_pretrained(root / "vae"),
        "unet": UNet2DConditionModel.from_pretrained(root / "unet"),
        "scheduler": scheduler,
        "tokenizer": None,
        "text_encoder": None,
    }
    texts = {}
    for name, tokens in (("prompt", CHUNKS[0]), ("negative_prompt", [7])):
        hidden, pooled = encode(root, family, [tokens])
        texts[f"{name}_embeds"] = hidden
        if family == "xl":
            texts["pooled_prompt_embeds" if name == "prompt" else "negative_pooled_prompt_embeds"] = pooled
    if family == "xl":
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    else:
        kind = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
        pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    options = {"height": 32, "width": 48, "num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    picture = pipe(**texts, **options, **inpainting, generator=generator).images[0]
    return torch.from_numpy((picture * 255).round().astype("uint8"))


def inpainted(root, family, strength):
    """A picture painted over a mask by a model for inpainting: from column 20 on."""
    values = ((randoms("input/inpainting", (32, 48, 3)).numpy() + 1) * 127).astype("uint8")
    mask = np.zeros((32, 48), dtype="uint8")
    mask[:, 20:] = 255
    return painted(root, family, image=Image.fromarray(values), mask_image=Image.fromarray(mask), strength=strength)


def goldens(folder):
    out = {}
    for family in FAMILIES:
        root = folder / family
        hidden, pooled = encode(root, family)
        out[f"{family}.hidden"] = hidden.reshape(-1, hidden.shape[-1])[::EVERY]
        if pooled is not None:
            out[f"{family}.pooled"] = pooled[0]
        out[f"{family}.predicted"], out[f"{family}.guided"] = predict(root, family)
        vae = AutoencoderKL.from_pretrained(root / "vae").eval()
        latents = 0.5 * randoms("input/latents", (1, *LATENTS))
        out[f"{family}.decoded"] = torch.from_numpy(bytes_of(vae.decode(latents / vae.config.scaling_factor).sample))
        moments = vae.encode(picture()).latent_dist
        sample = moments.mean + moments.std * randoms("input/noise", (1, 4, 8, 12))
        out[f"{family}.painted"] = painted(root, family)
        out[f"{family}.encoded"] = sample[0] * vae.config.scaling_factor
    for family, strength in (("sd1", 1.0), ("sd2", 0.6)):
        out[f"{family}.inpainted"] = inpainted(folder / f"{family}-inpainting", family, strength)
    tiny = AutoencoderTiny.from_pretrained(folder / "taesd").eval()
    latents = 2 * randoms("input/latents", (1, *LATENTS))
    out["taesd.pixels"] = tiny.decode(latents).sample[0]
    out["taesd.encoded"] = tiny.encode(picture()).latents[0]
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in out.items()}


def same(name, converted, expected):
    missing = [key for key in expected if key not in converted]
    differing = [key for key in expected if key not in missing and not torch.equal(converted[key], expected[key])]
    if missing or differing:
        sys.exit(f"{name}: missing {missing[:5]}, differing {differing[:5]}")
    print(f"{name}: {len(expected)} tensors are the same")


def check(folder):
    for family in FAMILIES:
        root = folder / family
        stored = load_file(folder / f"{family}.safetensors")
        for module, convert in (("unet", single.convert_ldm_unet_checkpoint), ("vae", single.convert_ldm_vae_checkpoint)):
            kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[module]
            config = dict(kind.load_config(root / module))
            converted = convert(dict(stored), config=dict(kind.from_config(config).config))
            same(f"{family} {module}", converted, load_file(root / module / "diffusion_pytorch_model.safetensors"))
        text = load_file(root / "text_encoder/model.safetensors")
        if family == "sd2":
            model = CLIPTextModel.from_pretrained(root / "text_encoder")
            converted = single.convert_open_clip_checkpoint(model, dict(stored), prefix="cond_stage_model.model.")
        else:
            prefix = "conditioner.embedders.0.transformer." if family == "xl" else "cond_stage_model.transformer."
            converted = single.convert_ldm_clip_checkpoint(dict(stored), remove_prefix=prefix)
        same(f"{family} text_encoder", converted, text)
        if family == "xl":
            model = CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2")
            converted = single.convert_open_clip_checkpoint(model, dict(stored), prefix="conditioner.embedders.1.model.")
            same("xl text_encoder_2", converted, load_file(root / "text_encoder_2/model.safetensors"))


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    folder = Path(arguments[0])
    with torch.no_grad():
        if "--check" in arguments:
            check(folder)
            return
        out = goldens(folder)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, TARGET)
    print(f"{TARGET}: {len(out)} tensors, {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
