//! The `hydramesh` command.
fn main() {}
