//! RMS norm against its definition.

use mesh_kernels::{Isa, Pool, PoolOptions, add_rms_norm, rms_norm};

#[test]
fn rows_are_divided_by_their_root_mean_square() {
    for k in [1, 15, 16, 33, 576] {
        let x: Vec<f32> = (0..5 * k)
            .map(|i| (i * 37 % 101) as f32 / 25.0 - 2.0)
            .collect();
        let weight: Vec<f32> = (0..k).map(|i| 0.5 + i as f32 / k as f32).collect();
        for isa in Isa::available() {
            let pool = Pool::with_options(PoolOptions {
                threads: 2,
                isa: Some(isa),
                ..PoolOptions::default()
            });
            let mut out = vec![0.0; x.len()];
            rms_norm(&pool, &x, &weight, 1e-5, &mut out).expect("whole rows");
            let mut added = x.clone();
            add_rms_norm(&pool, &x, &weight, 1e-5, &mut added).expect("whole rows");
            let sums = x.iter().zip(&out).map(|(x, out)| x + out);
            assert!(sums.eq(added), "{k} on {isa:?}");
            for (x, out) in x.chunks(k).zip(out.chunks(k)) {
                let square = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / k as f64;
                for i in 0..k {
                    let want = f64::from(x[i]) / (square + 1e-5).sqrt() * f64::from(weight[i]);
                    assert!((f64::from(out[i]) - want).abs() < 1e-5, "{k} on {isa:?}");
                }
            }
            assert!(rms_norm(&pool, &x, &weight, 1e-5, &mut out[1..]).is_err());
            assert!(rms_norm(&pool, &x, &[], 1e-5, &mut out).is_err());
        }
    }
}
