//! With the feature `images`: lets the program find libtorch where it was at build time.
//!
//! `libtorch.so` stands for the others. Without a reference to it the linker leaves out the library for GPUs, of which only static
//! constructors are used.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_LIB");
    if std::env::var_os("CARGO_FEATURE_IMAGES").is_none() {
        return;
    }
    let folder = std::env::var("LIBTORCH_LIB").or_else(|_| std::env::var("LIBTORCH"));
    if let Ok(folder) = folder {
        for argument in [
            &format!("-L{folder}/lib"),
            &format!("-Wl,-rpath,{folder}/lib"),
            "-Wl,--push-state,--no-as-needed",
            "-ltorch",
            "-Wl,--pop-state",
        ] {
            println!("cargo:rustc-link-arg={argument}");
        }
    }
}
