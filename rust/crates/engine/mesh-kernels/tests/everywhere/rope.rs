//! Rotation against its definition.

use mesh_kernels::{Rope, RopeOptions, RopeStyle};

#[test]
fn pairs_turn_by_their_angle() {
    let factors = [1.0, 2.0, 4.0];
    for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
        let rope = Rope::new(&RopeOptions {
            style,
            dim: 6,
            base: 100.0,
            scale: 0.5,
            factors: Some(&factors),
            positions: 20,
        })
        .expect("sane options");
        let head: Vec<f32> = (0..8_u8).map(|i| f32::from(i) - 3.0).collect();
        let mut got = head.clone();
        rope.rotate(&mut got, 17).expect("within the table");
        for (i, factor) in factors.iter().enumerate() {
            let (a, b) = match style {
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                RopeStyle::Halves => (i, i + 3),
            };
            let angle = 17.0 * 0.5 * 100_f32.powf(-2.0 * i as f32 / 6.0) / factor;
            let (sin, cos) = angle.sin_cos();
            assert!((got[a] - (head[a] * cos - head[b] * sin)).abs() < 1e-5);
            assert!((got[b] - (head[a] * sin + head[b] * cos)).abs() < 1e-5);
        }
        assert_eq!(got[6..], head[6..], "behind the rotated part");
        assert!(rope.rotate(&mut got, 20).is_err(), "beyond the context");
        assert!(rope.rotate(&mut got[..5], 0).is_err());
    }
}

#[test]
fn impossible_options_are_errors() {
    let good = RopeOptions {
        style: RopeStyle::Halves,
        dim: 64,
        base: 10_000.0,
        scale: 1.0,
        factors: None,
        positions: 4,
    };
    assert!(Rope::new(&good).is_ok());
    for bad in [
        RopeOptions { dim: 0, ..good },
        RopeOptions { dim: 63, ..good },
        RopeOptions {
            factors: Some(&[1.0; 31]),
            ..good
        },
        RopeOptions {
            positions: usize::MAX,
            ..good
        },
    ] {
        assert!(Rope::new(&bad).is_err());
    }
}
