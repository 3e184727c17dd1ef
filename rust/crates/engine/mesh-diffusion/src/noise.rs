//! The normal numbers of torch's CPU generator, so that a seed gives the picture that it gives elsewhere.
//!
//! torch draws 32-bit numbers from a Mersenne Twister (MT19937), which it seeds with the low 32 bits of the seed. Arrays of
//! [`BLOCK`] and more f32 take one each, of which 24 bits become a uniform number, and turn blocks of 16 into normal
//! numbers by Box and Muller's method; shorter arrays take pairs of 53-bit numbers and keep the second normal number for
//! the next one. Logarithm, cosine and sine are computed in f64 here, so the numbers are the same on every machine; torch's own
//! differ by 1e-6 at most.

use std::f64::consts::TAU;

/// The state of a generator, from which another one goes on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseState {
    /// The seed.
    pub seed: u64,
    /// 32-bit numbers drawn.
    pub drawn: u64,
    /// A normal number that is kept for the next short array.
    pub kept: Option<f64>,
}

/// A generator of normal numbers.
#[derive(Clone)]
pub struct Noise {
    seed: u64,
    drawn: u64,
    kept: Option<f64>,
    twister: Twister,
}

impl Noise {
    /// A generator as after torch's `manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        Noise {
            seed,
            drawn: 0,
            kept: None,
            twister: Twister::new(seed as u32),
        }
    }

    /// The generator with a `state`. It skips the numbers that one had drawn, some 600 million in a second, so bound
    /// [`NoiseState::drawn`] first if the state came from elsewhere.
    pub fn resume(state: NoiseState) -> Self {
        let mut noise = Noise::new(state.seed);
        noise.skip(state.drawn);
        noise.kept = state.kept;
        noise
    }

    /// The state of this generator.
    pub fn state(&self) -> NoiseState {
        NoiseState {
            seed: self.seed,
            drawn: self.drawn,
            kept: self.kept,
        }
    }

    /// An array of `count` normal numbers, as `torch.randn(count, generator=…)`.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| self.single() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform()).collect();
        let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
        blocks.iter_mut().for_each(box_muller);
        if !rest.is_empty() {
            // The last block is drawn anew and overlaps the one before.
            let last = values.last_chunk_mut::<BLOCK>();
            let last = last.expect("there are at least as many values as a block has");
            last.iter_mut().for_each(|value| *value = self.uniform());
            box_muller(last);
        }
        values
    }

    /// 32-bit numbers that an array of `count` takes if no number is kept for it.
    pub fn draws(count: usize) -> u64 {
        let count = count as u64;
        let block = BLOCK as u64;
        match count {
            0..16 => count.div_ceil(2) * 4,
            count if count.is_multiple_of(block) => count,
            count => count + block,
        }
    }

    /// Draws 32-bit numbers and drops them.
    pub fn skip(&mut self, count: u64) {
        self.twister.skip(count);
        self.drawn += count;
    }

    fn next(&mut self) -> u32 {
        self.drawn += 1;
        self.twister.next()
    }

    /// At least 0 and below 1, of 24 bits.
    fn uniform(&mut self) -> f32 {
        const BITS: u32 = 24;
        (self.next() & ((1 << BITS) - 1)) as f32 / (1u32 << BITS) as f32
    }

    /// The same of 53 bits. The first number drawn is the high half.
    fn uniform_53(&mut self) -> f64 {
        const BITS: u32 = 53;
        let high = u64::from(self.next());
        let both = high << 32 | u64::from(self.next());
        (both & ((1 << BITS) - 1)) as f64 / (1u64 << BITS) as f64
    }

    fn single(&mut self) -> f64 {
        if let Some(kept) = self.kept.take() {
            return kept;
        }
        let angle = TAU * self.uniform_53();
        let radius = (-2.0 * (-self.uniform_53()).ln_1p()).sqrt();
        self.kept = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

impl std::fmt::Debug for Noise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.state().fmt(f)
    }
}

/// Turns 16 uniform numbers into normal ones: the first eight are radii, the others angles. Products and roots are rounded to
/// f32 where torch rounds them.
fn box_muller(block: &mut [f32; BLOCK]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let log = f64::from(1.0 - *a).ln() as f32;
        let radius = (-2.0 * log).sqrt();
        let angle = f64::from(TAU as f32 * *b);
        *a = radius * angle.cos() as f32;
        *b = radius * angle.sin() as f32;
    }
}

/// MT19937 (Matsumoto and Nishimura, 1998).
#[derive(Clone)]
struct Twister {
    words: [u32; WORDS],
    /// Words used since the last renewal.
    used: usize,
}

const WORDS: usize = 624;
const MIDDLE: usize = 397;

impl Twister {
    fn new(seed: u32) -> Self {
        let mut words = [seed; WORDS];
        for at in 1..WORDS {
            let before = words[at - 1];
            let mixed = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30));
            words[at] = mixed.wrapping_add(at as u32);
        }
        Twister { words, used: WORDS }
    }

    fn next(&mut self) -> u32 {
        if self.used == WORDS {
            self.renew();
        }
        let mut word = self.words[self.used];
        self.used += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn skip(&mut self, mut count: u64) {
        while count > 0 {
            if self.used == WORDS {
                self.renew();
            }
            let step = count.min((WORDS - self.used) as u64);
            self.used += step as usize;
            count -= step;
        }
    }

    fn renew(&mut self) {
        for at in 0..WORDS {
            let high = self.words[at] & 0x8000_0000;
            let low = self.words[(at + 1) % WORDS] & 0x7fff_ffff;
            let both = high | low;
            let odd = if both & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[at] = self.words[(at + MIDDLE) % WORDS] ^ (both >> 1) ^ odd;
        }
        self.used = 0;
    }
}

/// Numbers that are turned into normal ones together.
pub const BLOCK: usize = 16;
