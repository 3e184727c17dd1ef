//! The contracts of engines as checks, which every engine passes on every device: [`stage`] for layers of language
//! models, [`encoder`] for embeddings, [`diffuser`] for images.
//!
//! A test program makes a way to open the engine and calls the suite; the suite panics with the name of the
//! subject and of the check that failed. Numbers of engines are not compared with each other here: that is the
//! business of tests against references.

pub mod diffuser;
pub mod encoder;
pub mod stage;

use std::fmt::Debug;

/// Panics unless `found` is `expected`.
#[track_caller]
pub(crate) fn same<T: PartialEq + Debug>(subject: &str, check: &str, found: T, expected: T) {
    assert!(
        found == expected,
        "{subject}: {check}: {found:?} instead of {expected:?}"
    );
}
