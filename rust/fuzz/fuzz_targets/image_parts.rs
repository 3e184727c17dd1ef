//! Anything as a picture's progress, a PNG file, a prompt or a tokenizer is taken within its limits, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_diffusion::sampler::{Plan, PlanOptions, Sampler};
use mesh_diffusion::{ClipTokenizer, SamplerConfig, SamplerKind, png, prompt};

fuzz_target!(|data: (u8, &[u8], &str)| {
    let (choice, bytes, text) = data;
    let config = SamplerConfig::stable_diffusion(Default::default());
    let options = PlanOptions {
        kind: SamplerKind::ALL[usize::from(choice) % SamplerKind::ALL.len()],
        karras: false,
        steps: 5,
        strength: (choice > 127).then_some(0.6),
    };
    let plan = Plan::new(&config, options).expect("the plan is sound");
    if let Ok(mut sampler) = Sampler::restore(plan.clone(), 16, bytes) {
        assert_eq!(sampler.save(), bytes);
        while sampler.timestep().is_some() {
            if sampler.advance(&[0.1; 16], Some(&[0.2; 16])).is_err() {
                break;
            }
        }
        assert!(sampler.latents().iter().all(|x| x.is_finite()));
    }
    if let Ok(config) = serde_json::from_slice::<SamplerConfig>(bytes)
        && let Ok(plan) = Plan::new(&config, options)
    {
        assert!(plan.timesteps().iter().all(|t| t.is_finite()));
        assert!(plan.steps() >= 1 && plan.steps() <= 5);
    }
    if let Ok(decoded) = png::decode(bytes, 4096) {
        let pixels = decoded.image.width as usize * decoded.image.height as usize;
        assert!(pixels <= 4096 && decoded.image.rgb.len() == pixels * 3);
        assert!(decoded.alpha.is_none_or(|alpha| alpha.len() == pixels));
    }
    if let Ok(segments) = prompt::parse(text) {
        assert!(segments.iter().all(|part| (0.0..=prompt::MOST_WEIGHT).contains(&part.weight)));
        assert!(segments.iter().map(|part| part.text.len()).sum::<usize>() <= text.len());
    }
    if let Ok(tokenizer) = ClipTokenizer::from_json(bytes)
        && let Ok(tokens) = tokenizer.encode(text, 600)
    {
        assert!(tokens.len() <= 600);
    }
});
