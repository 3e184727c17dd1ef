//! The front ends: [`http`] speaks the OpenAI API, [`dcf`] answers DCF clients over UDP.

pub mod dcf;
pub mod http;
