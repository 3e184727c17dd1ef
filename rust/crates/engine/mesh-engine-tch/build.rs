//! Links libtorch into this crate's tests and examples, so that they find its libraries where they were at build time.
//!
//! `libtorch.so` stands for the others. Without a reference to it the linker leaves out the library for GPUs, of which only
//! static constructors are used.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_LIB");
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
