//! A progress bar: bytes, rate, time left.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on standard error for `bytes` bytes, where that is a terminal and it takes long enough to look at.
pub(super) fn bar(what: &str, bytes: u64) -> ProgressBar {
    /// Read in well under a second.
    const SHORT: u64 = 256 << 20;
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::hidden());
    if bytes < SHORT || !std::io::stderr().is_terminal() {
        return bar;
    }
    let style = "{msg} {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_draw_target(ProgressDrawTarget::stderr());
    bar.set_message(what.to_owned());
    bar
}
