//! Images of scripted workers: each is a function of its task, so that a mix-up shows.

use mesh_proto::ImageTask;

pub(super) fn first_state(task: &ImageTask) -> Vec<u8> {
    let text = format!(
        "{}|{}|{}|{}",
        task.prompt, task.negative_prompt, task.seed, task.guidance
    );
    next_state(text.as_bytes(), task.width)
}

pub(super) fn next_state(state: &[u8], step: u32) -> Vec<u8> {
    let mut hash = 0xCBF2_9CE4_8422_2325 ^ u64::from(step);
    let bytes = state.iter().cycle().take(state.len().max(256));
    let next = bytes.enumerate().map(|(index, byte)| {
        hash = (hash ^ u64::from(*byte) ^ index as u64).wrapping_mul(0x100_0000_01B3);
        (hash >> 32) as u8
    });
    next.take(256).collect()
}

pub(super) fn png_of(state: &[u8], width: u32, height: u32) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().unwrap();
    let colours = state.iter().copied().cycle();
    let colours: Vec<u8> = colours.take((width * height * 3) as usize).collect();
    writer.write_image_data(&colours).unwrap();
    writer.finish().unwrap();
    file
}

/// The file that any worker makes of this task without a disturbance.
pub(crate) fn undisturbed(task: &ImageTask) -> Vec<u8> {
    let mut state = first_state(task);
    for step in 1..=task.steps {
        state = next_state(&state, step);
    }
    png_of(&state, task.width, task.height)
}
