//! Nodes on real sockets: how they join, and the links between them.

mod common;
mod expulsion;
mod identities;
mod intermediates;
mod joining;
mod links;
mod roots;
mod strangers;
