//! One matrix product, some times over, for scripts/count_instructions.py.
//!
//! `one_product SET TYPE ROWS TIMES`, such as `one_product neonv8 Q4_0 1 2`: 256 outputs, 1024 inputs.

use mesh_kernels::{Isa, Linear, Pool, PoolOptions, QMatrix, WeightType, linear};

const OUTPUTS: usize = 256;
const INPUTS: usize = 1024;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [isa, ty, rows, times] = &args[..] else {
        panic!("usage: one_product SET TYPE ROWS TIMES");
    };
    let isa = Isa::available()
        .into_iter()
        .find(|set| set.name() == isa)
        .expect("SET is one of this CPU");
    let ty = WeightType::ALL
        .into_iter()
        .find(|known| format!("{known:?}") == *ty)
        .expect("TYPE is a GGUF type");
    let rows: usize = rows.parse().expect("ROWS is a number");
    let times: usize = times.parse().expect("TIMES is a number");
    let pool = Pool::with_options(PoolOptions {
        threads: 1,
        isa: Some(isa),
        ..PoolOptions::default()
    });
    let bytes = OUTPUTS * ty.row_bytes(INPUTS).expect("whole blocks");
    let matrix = QMatrix::pack(ty, OUTPUTS, INPUTS, &vec![0x11; bytes]).expect("packs");
    let x = vec![0.5; rows * INPUTS];
    let mut out = vec![0.0; rows * OUTPUTS];
    for _ in 0..times {
        linear(&pool, &matrix, &x, rows, &mut out, &Linear::default()).expect("fits");
    }
    std::hint::black_box(&out);
}
