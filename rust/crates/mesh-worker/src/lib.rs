//! The worker: hosts engines, answers tasks.
