//! The head: registry, router, DCF and OpenAI front ends.
