//! Names and detection of instruction sets.

use mesh_kernels::Isa;

#[test]
fn names_are_understood_and_others_are_not() {
    for isa in Isa::ALL {
        let found = isa.is_available().then_some(isa);
        assert_eq!(Isa::named(isa.name()).ok(), found);
        assert_eq!(Isa::named(&isa.name().to_uppercase()).ok(), found);
    }
    assert!(Isa::named("sse9").is_err());
}

#[test]
fn a_name_that_cannot_be_used_is_an_error_that_lists_the_others() {
    assert_eq!(Isa::named("Scalar"), Ok(Isa::Scalar));
    let foreign = if cfg!(target_arch = "aarch64") {
        "avx2"
    } else {
        "neon"
    };
    for name in [foreign, "sse9"] {
        let error = Isa::named(name).expect_err("not of this CPU").to_string();
        assert!(error.contains(&format!("{name:?}")), "{error}");
        assert!(error.contains("it has scalar"), "{error}");
    }
}

#[test]
fn what_is_detected_can_run() {
    assert!(Isa::detect().is_available());
    assert!(Isa::current().is_available());
    assert!(Isa::available().contains(&Isa::Scalar));
}
