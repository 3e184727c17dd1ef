//! Passes over a whole row of logits, written so that the compiler turns them into vector code.
//!
//! Every comparison is false for NaN, so NaN logits drop out of all of them.

/// The largest number in `row`; minus infinity if `row` is empty.
pub(super) fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let larger = |m: f32, &x: &f32| if x > m { x } else { m };
    rest.iter()
        .fold(lanes.iter().fold(f32::NEG_INFINITY, larger), larger)
}

/// Index of the first largest number in `row`; `None` if all are minus infinity or NaN.
pub(super) fn argmax(row: &[f32]) -> Option<u32> {
    let max = max(row);
    if max == f32::NEG_INFINITY {
        return None;
    }
    let block = row
        .chunks(SEARCH_BLOCK)
        .position(|block| block.iter().fold(false, |found, &x| found | (x == max)))?;
    let start = block * SEARCH_BLOCK;
    let offset = row[start..].iter().position(|&x| x == max)?;
    Some((start + offset) as u32)
}

/// Sum of `exp((x - max) * scale)` over `row`.
pub(super) fn sum_exp(row: &[f32], max: f32, scale: f32) -> f64 {
    let blocks = row.chunks(SUM_BLOCK);
    blocks.map(|block| block_sum_exp(block, max, scale)).sum()
}

/// The token at `uniform` of the cumulative distribution over all of `row`, in order of ids.
pub(super) fn draw_from_all(
    row: &[f32],
    max: f32,
    scale: f32,
    uniform: f64,
    block_sums: &mut Vec<f64>,
) -> Option<u32> {
    block_sums.clear();
    let blocks = row.chunks(SUM_BLOCK);
    block_sums.extend(blocks.map(|block| block_sum_exp(block, max, scale)));
    let mut rest = uniform * block_sums.iter().sum::<f64>();
    let mut last_possible = None;
    for (b, (block, &sum)) in row.chunks(SUM_BLOCK).zip(block_sums.iter()).enumerate() {
        if sum <= 0.0 {
            continue;
        }
        // Rounding may put the point just past this block's last token; then that token it is.
        if rest >= sum {
            rest -= sum;
            last_possible = Some(b);
            continue;
        }
        return draw_from_block(block, max, scale, rest).map(|i| (b * SUM_BLOCK + i) as u32);
    }
    let b = last_possible?;
    let block = &row[b * SUM_BLOCK..row.len().min((b + 1) * SUM_BLOCK)];
    draw_from_block(block, max, scale, f64::INFINITY).map(|i| (b * SUM_BLOCK + i) as u32)
}

/// `exp(x)` for `x <= 0` within 3e-7 of it; 0 below -87 and for NaN. Branch-free.
pub(super) fn exp(x: f32) -> f32 {
    let clamped = if x > -87.0 { x } else { -87.0 };
    // Adding 1.5 * 2^23 rounds to the nearest integer, which then sits in the low bits.
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = clamped - k * LN_2_HIGH - k * LN_2_LOW;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let power = f32::from_bits((exponent.wrapping_add(127) << 23) as u32);
    if x > -87.0 { p * power } else { 0.0 }
}

fn block_sum_exp(block: &[f32], max: f32, scale: f32) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let (groups, rest) = block.as_chunks::<LANES>();
    for group in groups {
        for (lane, &x) in lanes.iter_mut().zip(group) {
            *lane += exp((x - max) * scale);
        }
    }
    let rest: f32 = rest.iter().map(|&x| exp((x - max) * scale)).sum();
    lanes.iter().map(|&x| f64::from(x)).sum::<f64>() + f64::from(rest)
}

fn draw_from_block(block: &[f32], max: f32, scale: f32, mut rest: f64) -> Option<usize> {
    let mut last_possible = None;
    for (i, &x) in block.iter().enumerate() {
        let weight = f64::from(exp((x - max) * scale));
        if weight > 0.0 {
            last_possible = Some(i);
            rest -= weight;
            if rest < 0.0 {
                break;
            }
        }
    }
    last_possible
}

const LANES: usize = 16;
const SEARCH_BLOCK: usize = 256;
const SUM_BLOCK: usize = 1024;
const ROUND: f32 = 12_582_912.0;
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_whole_range() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::NAN), 0.0);
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals_and_skips_nan() {
        let mut row = vec![1.0; 1000];
        assert_eq!(argmax(&row), Some(0));
        row[0] = f32::NAN;
        assert_eq!(argmax(&row), Some(1));
        row[700] = 2.0;
        row[998] = 2.0;
        assert_eq!(argmax(&row), Some(700));
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(argmax(&[]), None);
    }
}
