//! Cookies that prove that a source receives datagrams at its address, without state per source.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use aws_lc_rs::{constant_time, hmac};

/// Bytes of a cookie: when it was made (u32, seconds), then the first [`MAC_LEN`] bytes of an HMAC-SHA-256 over that and
/// the address.
pub const COOKIE_LEN: usize = 4 + MAC_LEN;

/// Makes and checks cookies with one secret key.
#[derive(Debug)]
pub struct Cookies {
    key: hmac::Key,
}

impl Cookies {
    /// Creates cookies with this secret key.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
        }
    }

    /// Makes a cookie for `source`; `uptime` is the time since a fixed moment of the caller's choice.
    #[must_use]
    pub fn make(&self, source: SocketAddr, uptime: Duration) -> [u8; COOKIE_LEN] {
        let made = (uptime.as_secs() as u32).to_be_bytes();
        let mut cookie = [0; COOKIE_LEN];
        cookie[..4].copy_from_slice(&made);
        cookie[4..].copy_from_slice(&self.mac(source, made));
        cookie
    }

    /// True if `cookie` was made for `source` at most [`LIFETIME_S`] seconds ago.
    #[must_use]
    pub fn check(&self, cookie: &[u8], source: SocketAddr, uptime: Duration) -> bool {
        let Ok(cookie) = <&[u8; COOKIE_LEN]>::try_from(cookie) else {
            return false;
        };
        let [t0, t1, t2, t3, mac @ ..] = *cookie;
        let made = [t0, t1, t2, t3];
        let age = (uptime.as_secs() as u32).wrapping_sub(u32::from_be_bytes(made));
        age <= LIFETIME_S
            && constant_time::verify_slices_are_equal(&mac, &self.mac(source, made)).is_ok()
    }

    fn mac(&self, source: SocketAddr, made: [u8; 4]) -> [u8; MAC_LEN] {
        let ip = match source.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let mut input = [0; 22];
        input[..4].copy_from_slice(&made);
        input[4..20].copy_from_slice(&ip.octets());
        input[20..].copy_from_slice(&source.port().to_be_bytes());
        let tag = hmac::sign(&self.key, &input);
        let mac = tag.as_ref().first_chunk();
        *mac.expect("an HMAC-SHA-256 has 32 bytes")
    }
}

const MAC_LEN: usize = 12;
const LIFETIME_S: u32 = 30;

#[cfg(test)]
mod tests {
    use super::*;

    const MADE: Duration = Duration::from_secs(1_000);

    fn source(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_cookie_holds_for_its_address_and_its_time() {
        let cookies = Cookies::new(&[7; 32]);
        let cookie = cookies.make(source("192.0.2.1:40000"), MADE);
        assert!(cookies.check(
            &cookie,
            source("192.0.2.1:40000"),
            MADE + Duration::from_secs(30)
        ));
        assert!(!cookies.check(
            &cookie,
            source("192.0.2.1:40000"),
            MADE + Duration::from_secs(31)
        ));
        assert!(!cookies.check(&cookie, source("192.0.2.1:40001"), MADE));
        assert!(!cookies.check(&cookie, source("192.0.2.2:40000"), MADE));
        assert!(!cookies.check(
            &cookie,
            source("192.0.2.1:40000"),
            MADE - Duration::from_secs(1)
        ));
    }

    #[test]
    fn every_changed_bit_spoils_a_cookie() {
        let cookies = Cookies::new(&[7; 32]);
        let cookie = cookies.make(source("[2001:db8::1]:9"), MADE);
        for bit in 0..COOKIE_LEN * 8 {
            let mut changed = cookie;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !cookies.check(&changed, source("[2001:db8::1]:9"), MADE),
                "bit {bit}"
            );
        }
        assert!(!cookies.check(&cookie[1..], source("[2001:db8::1]:9"), MADE));
        assert!(!Cookies::new(&[8; 32]).check(&cookie, source("[2001:db8::1]:9"), MADE));
    }
}
