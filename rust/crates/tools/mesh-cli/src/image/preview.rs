//! Pictures in the terminal, in terminals that have a protocol for them.
//!
//! Kitty's graphics protocol (kitty, Ghostty, Konsole, WezTerm) takes PNG files in escapes of at most 4,096 bytes of base64; iTerm2's
//! takes a file in one escape. Both are asked to scale the picture to [`ROWS`] lines, so that the next one can be drawn over it.

use std::fmt::Write as _;

/// A terminal that shows pictures.
#[derive(Debug)]
pub(super) struct Screen {
    protocol: Protocol,
    /// A picture stands above the cursor, which the next one replaces.
    shown: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Kitty,
    Iterm,
}

impl Screen {
    /// The terminal as its variables name it; `None` if it shows no pictures as far as is known.
    pub(super) fn of(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let says = |name: &str| variable(name).unwrap_or_default();
        // They pass escapes on only if they are told to.
        if !says("TMUX").is_empty() || says("TERM").starts_with("screen") {
            return None;
        }
        let (program, term) = (says("TERM_PROGRAM"), says("TERM"));
        let kitty = !says("KITTY_WINDOW_ID").is_empty()
            || ["xterm-kitty", "xterm-ghostty"].contains(&term.as_str())
            || ["ghostty", "WezTerm"].contains(&program.as_str())
            || !says("KONSOLE_VERSION").is_empty();
        let iterm = program == "iTerm.app" || says("LC_TERMINAL") == "iTerm2";
        let protocol = match (kitty, iterm) {
            (true, _) => Protocol::Kitty,
            (false, true) => Protocol::Iterm,
            (false, false) => return None,
        };
        Some(Self {
            protocol,
            shown: false,
        })
    }

    /// What draws a PNG file, given in base64, in the place of the picture before it. Anything else than base64 draws nothing.
    pub(super) fn draw(&mut self, base64: &str) -> String {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
        if base64.is_empty() || !base64.bytes().all(plain) {
            return String::new();
        }
        let mut out = String::with_capacity(base64.len() + 1024);
        if std::mem::replace(&mut self.shown, true) {
            let _ = write!(out, "\x1b[{ROWS}A\r\x1b[J");
        }
        match self.protocol {
            Protocol::Kitty => {
                let mut rest = base64;
                let mut keys = format!("a=T,f=100,q=2,r={ROWS},");
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(rest.len().min(PIECE));
                    rest = after;
                    let more = u8::from(!rest.is_empty());
                    let _ = write!(out, "\x1b_G{keys}m={more};{piece}\x1b\\");
                    keys.clear();
                }
            }
            Protocol::Iterm => {
                let keys = format!("inline=1;height={ROWS};preserveAspectRatio=1");
                let _ = write!(out, "\x1b]1337;File={keys}:{base64}\x07");
            }
        }
        out.push_str("\r\n");
        out
    }

    /// The picture that was drawn last stays.
    pub(super) fn keep(&mut self) {
        self.shown = false;
    }
}

/// Lines that a picture takes.
const ROWS: u32 = 16;
/// Bytes of base64 in one of kitty's escapes.
const PIECE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(variables: &[(&str, &str)]) -> Option<Screen> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Screen::of(variable)
    }

    #[test]
    fn terminals_are_known_by_their_variables() {
        for (variables, protocol) in [
            (&[("TERM", "xterm-kitty")][..], Some(Protocol::Kitty)),
            (&[("KITTY_WINDOW_ID", "1")], Some(Protocol::Kitty)),
            (&[("TERM_PROGRAM", "WezTerm")], Some(Protocol::Kitty)),
            (&[("TERM_PROGRAM", "iTerm.app")], Some(Protocol::Iterm)),
            (&[("LC_TERMINAL", "iTerm2")], Some(Protocol::Iterm)),
            (&[("TERM", "xterm-256color")], None),
            (&[("TERM", "xterm-kitty"), ("TMUX", "/tmp/x")], None),
            (&[], None),
        ] {
            let found = screen(variables).map(|screen| screen.protocol);
            assert_eq!(found, protocol, "{variables:?}");
        }
    }

    #[test]
    fn a_long_picture_is_cut_and_the_next_one_takes_its_place() {
        let mut kitty = screen(&[("TERM", "xterm-kitty")]).unwrap();
        let drawn = kitty.draw(&"A".repeat(2 * PIECE + 8));
        assert_eq!(drawn.matches("\x1b_G").count(), 3);
        assert!(drawn.starts_with("\x1b_Ga=T,f=100,q=2,r=16,m=1;A"));
        assert!(drawn.ends_with("\x1b_Gm=0;AAAAAAAA\x1b\\\r\n"), "{drawn:?}");
        assert!(kitty.draw("AAAA").starts_with("\x1b[16A\r"));
        kitty.keep();
        assert!(kitty.draw("AAAA").starts_with("\x1b_G"));
        let mut iterm = screen(&[("LC_TERMINAL", "iTerm2")]).unwrap();
        let drawn = iterm.draw("AA==");
        assert_eq!(
            drawn,
            "\x1b]1337;File=inline=1;height=16;preserveAspectRatio=1:AA==\x07\r\n"
        );
    }

    #[test]
    fn no_escape_comes_from_the_head() {
        let mut kitty = screen(&[("TERM", "xterm-kitty")]).unwrap();
        for junk in ["", "AA\x1b\\\x1b]0;title\x07", "AA\nAA", "ä"] {
            assert_eq!(kitty.draw(junk), "", "{junk:?}");
        }
    }
}
