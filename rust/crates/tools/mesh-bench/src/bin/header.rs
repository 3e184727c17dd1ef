//! Nanoseconds to encode and to decode a DCF header, next to copying its 17 bytes, in one run.
//!
//! Prints the ratio to the copy for each; the three take turns, so that a change of clock speed meets all of them.

use std::{hint::black_box, time::Instant};

use clap::Parser;
use dcf::{HEADER_LEN, Header};

/// Measures encoding and decoding of the DCF header against a copy of 17 bytes
#[derive(Parser)]
struct Args {
    /// Rounds; each runs all three
    #[arg(long, default_value_t = 40)]
    rounds: usize,

    /// Headers per measurement
    #[arg(long, default_value_t = 1_000_000)]
    headers: u32,

    /// Exit with an error if encoding or decoding takes longer than this, nanoseconds
    #[arg(long)]
    limit_ns: Option<f64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (mut copy, mut encode, mut decode) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds.clamp(1, 10_000) {
        copy.push(measure(args.headers, copy_once));
        encode.push(measure(args.headers, encode_once));
        decode.push(measure(args.headers, decode_once));
    }
    // Other load only ever adds time, so the best round is the closest to the truth.
    let (copy, encode, decode) = (best(copy), best(encode), best(decode));
    println!("copy of {HEADER_LEN} bytes  {copy:6.2} ns");
    for (name, time) in [("encode", encode), ("decode", decode)] {
        let ratio = time / copy;
        println!("{name}            {time:6.2} ns  {ratio:5.2} x copy");
    }
    if let Some(limit) = args.limit_ns {
        let within = encode <= limit && decode <= limit;
        anyhow::ensure!(within, "over the limit of {limit} ns");
    }
    Ok(())
}

/// Nanoseconds for one of `count` calls.
fn measure(count: u32, mut once: impl FnMut(u32)) -> f64 {
    let start = Instant::now();
    for sequence in 0..count {
        once(sequence);
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(count.max(1))
}

fn copy_once(_: u32) {
    let bytes: [u8; HEADER_LEN] = *black_box(&BYTES);
    black_box(&bytes);
}

fn encode_once(sequence: u32) {
    let header = Header {
        msg_type: 2,
        sequence,
        timestamp_us: 1_767_830_400_000_000,
        payload_len: 20,
    };
    black_box(&black_box(&header).encode());
}

fn decode_once(_: u32) {
    let header = Header::decode(black_box(&BYTES[..]));
    black_box(&header).expect("17 bytes are a header");
}

fn best(values: Vec<f64>) -> f64 {
    values.into_iter().fold(f64::INFINITY, f64::min)
}

static BYTES: [u8; HEADER_LEN] = [
    2, 0, 0, 0, 1, 0, 6, 0x47, 0xD5, 0x17, 0x13, 0x22, 0x40, 0, 0, 0, 20,
];
