//! The front ends: [`http`] speaks the OpenAI API, [`dcf`] answers DCF clients over UDP.

pub(crate) mod dcf;
pub(crate) mod http;
