#!/usr/bin/env python3
"""Writes the golden files in tests/data with diffusers 0.35.2, transformers 4.57.3 and torch 2.11.0, on CPU.

    make_goldens.py VOCAB      (VOCAB: folder with CLIP's vocab.json and merges.txt, as `scripts/fetch.py clip` fetches them)

- samplers.json: the latents after each step of each scheduler. The model is a formula of the scaled latents and the timestep
  (`predict`), which tests/samplers.rs repeats. All random numbers are torch's.
- timesteps.json: for each number of steps, sums over the timesteps and sigmas, each weighted with its place.
- randn.json: normal numbers of torch's CPU generator.
- clip.json: prompts and their tokens by transformers' CLIPTokenizer (the slow one, without ftfy).
"""

import json
import random
import sys
from pathlib import Path

import diffusers
import numpy
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

DATA = Path(__file__).resolve().parent.parent / "data"
SHAPE = (1, 4, 2, 2)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
KINDS = {
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "lcm": LCMScheduler,
}


def scheduler(kind, config):
    cls = KINDS[kind]
    known = set(cls.__init__.__wrapped__.__code__.co_varnames) if hasattr(cls.__init__, "__wrapped__") else set(config)
    return cls(**{key: value for key, value in config.items() if key in known})


def predict(latents, t):
    """Something like a prediction: bounded, smooth, different for each latent."""
    place = torch.arange(latents.numel(), dtype=torch.float32).reshape(latents.shape)
    return 0.7 * latents / (1 + 0.1 * latents.abs()) + 0.2 * torch.cos(0.37 * place + 0.001 * float(t))


def run(case):
    s = scheduler(case["sampler"], case["config"])
    generator = torch.Generator("cpu").manual_seed(case["seed"])
    steps, strength, mask = case["steps"], case.get("strength"), case.get("mask")
    s.set_timesteps(steps)
    timesteps = s.timesteps
    image = torch.linspace(-1.5, 1.5, torch.Size(SHAPE).numel()).reshape(SHAPE)
    noise = torch.randn(SHAPE, generator=generator)
    if strength is None:
        if hasattr(s, "set_begin_index"):
            s.set_begin_index(0)  # else a run whose first two timesteps are equal begins with the second
        latents = noise * s.init_noise_sigma
    else:
        start = max(steps - min(int(steps * strength), steps), 0)
        timesteps = timesteps[start:]
        if hasattr(s, "set_begin_index"):
            s.set_begin_index(start)
        latents = s.add_noise(image, noise, timesteps[:1])
    keep = None
    if mask:
        keep = (torch.arange(latents.numel()) % 3 == 0).reshape(SHAPE)
    # The same numbers once more, in the order in which the scheduler draws its own.
    again = torch.Generator("cpu").manual_seed(case["seed"])
    draws = 1 + {"euler_a": len(timesteps), "lcm": len(timesteps) - 1}.get(case["sampler"], 0)
    noises = [numpy.float32(torch.randn(SHAPE, generator=again).flatten().numpy()) for _ in range(draws)]
    out = {"noise": [[float(str(x)) for x in noise] for noise in noises]}
    out |= {"start": latents.flatten().tolist(), "latents": []}
    for i, t in enumerate(timesteps):
        scaled = s.scale_model_input(latents, t)
        extra = {"generator": generator} if case["sampler"] in ("euler_a", "lcm") else {}
        latents = s.step(predict(scaled, t), t, latents, return_dict=False, **extra)[0]
        if keep is not None:
            proper = image
            if i < len(timesteps) - 1:
                proper = s.add_noise(image, noise, torch.tensor([timesteps[i + 1]]))
            latents = torch.where(keep, proper, latents)
        out["latents"].append([round(x, 5) for x in latents.flatten().tolist()])
    out["timesteps"] = [float(t) for t in timesteps]
    return out


def samplers():
    cases = []

    def add(sampler, steps=6, **rest):
        config = {**SD, **rest.pop("config", {})}
        cases.append({"sampler": sampler, "steps": steps, "seed": len(cases) + 1, "config": config, **rest})

    for sampler in KINDS:
        for prediction in ("epsilon", "v_prediction", "sample"):
            if (sampler, prediction) != ("euler_a", "sample"):
                add(sampler, config={"prediction_type": prediction})
        if sampler != "lcm":
            for spacing in ("leading", "linspace", "trailing"):
                add(sampler, steps=5, config={"timestep_spacing": spacing})
        add(sampler, steps=9, strength=0.7)
        add(sampler, steps=5, strength=1.0, mask=True)
        add(sampler, steps=7, strength=0.5, mask=True)
        add(sampler, steps=1)
        zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        add(sampler, config=zero)
        add(sampler, config={"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"})
        add(sampler, config={"beta_schedule": "squaredcos_cap_v2"})
    add("dpmpp_2m", steps=20)
    for sampler in ("dpmpp_2m", "euler"):
        add(sampler, steps=8, config={"use_karras_sigmas": True})
        add(sampler, steps=8, strength=0.6, config={"use_karras_sigmas": True})
    add("dpmpp_2m", steps=8, config={"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"})
    for sampler in ("ddim", "lcm"):
        add(sampler, config={"clip_sample": True, "clip_sample_range": 0.8})
        add(sampler, config={"set_alpha_to_one": True})
    return [{**case, **run(case)} for case in cases]


def timesteps():
    lists = {}
    for kind in KINDS:
        for spacing in ("leading", "linspace", "trailing"):
            for karras in (False, True):
                if (karras and kind not in ("dpmpp_2m", "euler")) or (kind == "lcm" and spacing != "leading"):
                    continue
                sums = []
                for steps in range(1, 51 if kind == "lcm" else 151):
                    s = scheduler(kind, {**SD, "timestep_spacing": spacing, "use_karras_sigmas": karras})
                    s.set_timesteps(steps)
                    weighted = lambda values: sum((i + 1) * float(x) for i, x in enumerate(values))
                    sigmas = s.sigmas if hasattr(s, "sigmas") else []
                    sums.append([len(s.timesteps), round(weighted(s.timesteps), 3), round(weighted(sigmas), 4)])
                lists[f"{kind} {spacing}{' karras' if karras else ''}"] = sums
    return lists


def randn():
    cases = []
    for seed in (0, 1, 42, (7 << 32) + 42, 2**64 - 1):
        for counts in ([1, 2, 3, 16, 2], [5, 15, 17], [16, 31], [33, 1], [64]):
            generator = torch.Generator("cpu").manual_seed(seed)
            arrays = [torch.randn(count, generator=generator).tolist() for count in counts]
            cases.append({"seed": seed, "arrays": arrays})
    generator = torch.Generator("cpu").manual_seed(7)
    large = torch.randn((1, 4, 64, 64), generator=generator).flatten()
    many = {"seed": 7, "count": large.numel(), "every_1000th": large[::1000].tolist(), "largest": large.abs().max().item()}
    return {"cases": cases, "large": many}


SUBJECTS = """a cat|an astronaut riding a horse|the quick brown fox|portrait of an old fisherman|a castle on a hill|Tokyo at night
two dogs playing chess|a bowl of fruit|an abandoned railway station|a red sports car|mountains and a lake|a robot gardener
Ein Fuchs im Schnee|une forêt enchantée|el niño y el mar|人物画 山水|富士山の夕焼け|кот в шляпе|γάτα ΣΊΣΥΦΟΣ|고양이 한 마리|שלום עולם|قطة صغيرة
it's a dog's life|I'll say we've got they're won't|don't CAN'T Isn't|supercalifragilisticexpialidocious|pneumonoultramicroscopic
naïve café façade|Åse Ørsted Ñandú|ﬁne ﬂuﬀy ligatures|½ cup of ² tea|number 1234567890|3.14159 and 2,718|x=y+z*2|a_b-c/d\\e""".replace("\n", "|").split("|")
STYLES = """oil painting|trending on artstation|8k, highly detailed|by Greg Rutkowski|studio lighting|black & white photo!!!|(masterpiece)|[blurry]
digital art -- wide|f/1.8 85mm|cinematic; moody|unreal engine 5|low poly :)|😀 happy|🏳️‍🌈 flag|👩🏽‍🚀|🇩🇪 ★ ☂ ♞|~~ ^^ ``|"quoted" 'single'|<lora:thing:0.8>
#hashtag @name $5 %20|e-mail: me@example.org|https://example.org/a?b=c|ALL CAPS|CamelCaseWords|mixed123numbers456|…ellipsis…|— dash – dash|«guillemets»
\u200bzero\u200bwidth|soft\u00adhyphen|tab\there|new\nline|no\u00a0break|e\u0301 combined|\ufb01|\u0130stanbul|stra\u00dfe \u1e9e|\u2028separator\u2029|\x07bell\x1b[0m|\ufffd bad \x00 nul
𝔉𝔯𝔞𝔨𝔱𝔲𝔯|ａｆｕｌｌｗｉｄｔｈ|Ⅷ roman ⅷ|١٢٣ digits ४५|ก็ไทย|हिन्दी चित्र|Tiếng Việt|漢字と仮名""".replace("\n🜀", "|").split("|")


def clip(vocab):
    tokenizer = transformers.CLIPTokenizer(f"{vocab}/vocab.json", f"{vocab}/merges.txt", model_max_length=77)
    assert tokenizer.fix_text is None, "this needs a Python without ftfy"
    rng = random.Random(5)
    prompts = ["", " ", "!", "a", *SUBJECTS, *STYLES]
    while len(prompts) < 500:
        parts = [rng.choice(SUBJECTS)] + rng.sample(STYLES, rng.randint(0, 2))
        prompt = rng.choice([", ", " ", ",", "  ", ". "]).join(parts)
        if rng.random() < 0.15:
            prompt = "".join(rng.choice(prompt) for _ in range(12))
        prompts.append(prompt)
    ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    padded = tokenizer("a cat", padding="max_length", truncation=True).input_ids
    return {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "prompts": prompts, "ids": ids, "a_cat": padded}


def write(name, value):
    path = DATA / name
    if isinstance(value, list):
        text = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]\n"
    else:
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "\n}\n"
    path.write_text(text)
    print(name, path.stat().st_size)


def main():
    assert diffusers.__version__ == "0.35.2" and transformers.__version__ == "4.57.3", (diffusers.__version__, transformers.__version__)
    DATA.mkdir(exist_ok=True)
    write("samplers.json", samplers())
    write("timesteps.json", timesteps())
    write("randn.json", randn())
    write("clip.json", clip(sys.argv[1]))


if __name__ == "__main__":
    main()
