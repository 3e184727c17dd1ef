//! Quantised matrix products, attention and a thread pool for CPUs.
