//! Time of a decode step: of a loaded stage, and of a CPU's stage that is not loaded whole.

use std::ops::Range;
use std::time::{Duration, Instant};

use mesh_engine::Stage;
use mesh_model::Model;

use super::{CHECK_ROWS, run};
use crate::options::{LoadError, OrtOptions};
use crate::stage::OrtStage;

/// The shortest of a few decode steps of slot 0, which is empty before and after.
///
/// # Errors
/// The engine's error message.
pub(super) fn decode_step(stage: &mut dyn Stage) -> Result<Duration, String> {
    let rows = CHECK_ROWS
        .min(stage.info().context)
        .min(stage.info().max_rows);
    run(stage, 0, rows, rows)?;
    let (began, mut shortest, mut steps) = (Instant::now(), Duration::MAX, 0);
    while steps < LEAST_STEPS || (steps < MOST_STEPS && began.elapsed() < LIMIT) {
        let step = Instant::now();
        // The last row again and again: a stage overwrites rows from the position on.
        run(stage, rows - 1, rows, 1)?;
        shortest = shortest.min(step.elapsed());
        steps += 1;
    }
    stage.truncate(0, 0);
    Ok(shortest)
}

/// Time of a decode step of `layers` on the CPU. Of many layers only the last few are loaded, with the output
/// matrix if they end the model, and the last one alone: every further layer takes as long as those in between.
///
/// # Errors
/// Those of [`OrtStage::load`].
pub(super) fn cpu_step(
    model: &Model,
    layers: Range<u32>,
    options: &OrtOptions,
) -> Result<Duration, LoadError> {
    let options = OrtOptions {
        slots: 1,
        context: CHECK_ROWS.min(model.config().context),
        max_rows: CHECK_ROWS,
        profile: false,
        ..options.clone()
    };
    let of = |count: u32| {
        let range = layers.end - count..layers.end;
        let mut stage = OrtStage::load(model, range, options.clone())?;
        decode_step(&mut stage).map_err(|reason| ort::Error::new(reason).into())
    };
    let count = layers.len() as u32;
    match count > SAMPLE {
        false => of(count),
        true => Ok(whole(of(1)?, of(SAMPLE)?, count)),
    }
}

/// Time of `count` layers, by that of one and that of [`SAMPLE`].
fn whole(one: Duration, sample: Duration, count: u32) -> Duration {
    let layer = sample.saturating_sub(one) / (SAMPLE - 1);
    sample + layer * (count - SAMPLE)
}

/// Layers that are measured on the CPU.
const SAMPLE: u32 = 4;

/// Steps of a measurement: by number, or as many as fit the limit.
const LEAST_STEPS: u32 = 3;
const MOST_STEPS: u32 = 32;
const LIMIT: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_takes_what_the_sample_has_more_than_one() {
        let ms = Duration::from_millis;
        // An output matrix of 5 ms and layers of 2 ms.
        assert_eq!(whole(ms(7), ms(13), 30), ms(65));
        // Noise is not extrapolated below the sample.
        assert_eq!(whole(ms(9), ms(8), 30), ms(8));
    }
}
