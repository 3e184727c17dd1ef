//! `hydramesh token offer` and `hydramesh token fetch`: a join token handed over the LAN against a short code that a person reads
//! on one screen and types at the other.
//!
//! The offer is found by multicast DNS (`_hydramesh-offer._tcp`) and taken over TLS 1.3 with an unverified
//! certificate. The code takes the certificate's place: both sides derive a key from it and from the TLS
//! session's exporter (RFC 8446, section 7.5) by PBKDF2, the taker proves first that it has the key, then the
//! offerer. An attacker in the middle has two sessions with two exporters, and so cannot reuse the proof of
//! one side toward the other. To guess the code from a proof, it would have to try some 2^49 codes at 600,000
//! hashes each before the offer ends. Guessing at the offer itself ends it after three wrong codes.
//!
//! | bytes | from the taker | bytes | from the offerer |
//! |---|---|---|---|
//! | 32 | HMAC-SHA-256 of `taker` | 32 | HMAC-SHA-256 of `offerer` |
//! | | | 2 | length of what follows, big endian |
//! | | | ≤ 1024 | JSON: `token`, and `port`, the head's for workers |

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use aws_lc_rs::{hmac, pbkdf2};
use mdns_sd::{ServiceDaemon, ServiceEvent, ServiceInfo};
use mesh_base::addresses::source;
use mesh_base::places::Places;
use mesh_base::random;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, DigitallySignedStruct, ServerConfig,
    ServerConnection, SideData, SignatureScheme, StreamOwned,
};
use serde::{Deserialize, Serialize};

/// The token and the port that are handed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Gift {
    /// The join token of the offer.
    pub(crate) token: String,
    /// The head's port for workers; its host is where the offer was found.
    pub(crate) port: u16,
}

/// Reasons why a token was not handed over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PairError {
    #[error("the code is wrong, or somebody else answers in the head's place")]
    WrongCode,
    #[error("{MOST_MISSES} wrong codes were tried, so the offer is over; make another")]
    TooManyMisses,
    #[error("nobody took the offer in time; make another")]
    Expired,
    #[error(
        "no offer is found on this network: is `hydramesh token offer` (key p on a live image) waiting on the head, with TCP port 7782 \
             and UDP port 5353 open there?"
    )]
    NotFound,
    #[error("a code has {CODE_LENGTH} letters and digits, such as K7QXM-4TR9H")]
    NoCode,
    #[error("the offer makes no sense: {0}")]
    Malformed(String),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("multicast DNS: {0}")]
    Mdns(#[from] mdns_sd::Error),
}

/// A code: 50 bits, in letters and digits that are hard to mistake for each other.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Code([u8; CODE_LENGTH]);

impl Code {
    pub(crate) fn random() -> Self {
        // 32 characters: no remainder that would favour some.
        Self(random::bytes().map(|byte| ALPHABET[usize::from(byte) % ALPHABET.len()]))
    }

    /// Reads a typed code: case, dashes and spaces do not matter.
    pub(crate) fn parse(text: &str) -> Result<Self, PairError> {
        let typed = text.bytes().map(|byte| byte.to_ascii_uppercase());
        let typed = typed.filter(|byte| !byte.is_ascii_whitespace() && *byte != b'-');
        let typed: Vec<u8> = typed.take(CODE_LENGTH + 1).collect();
        let code: [u8; CODE_LENGTH] = typed.try_into().map_err(|_| PairError::NoCode)?;
        let is_one = code.iter().all(|byte| ALPHABET.contains(byte));
        is_one.then_some(Self(code)).ok_or(PairError::NoCode)
    }

    fn key<S: SideData>(&self, session: &ConnectionCommon<S>) -> Result<hmac::Key, PairError> {
        let exporter = session.export_keying_material([0; 32], EXPORTER, None)?;
        let mut key = [0; 32];
        let algorithm = pbkdf2::PBKDF2_HMAC_SHA256;
        pbkdf2::derive(algorithm, ROUNDS, &exporter, &self.0, &mut key);
        Ok(hmac::Key::new(hmac::HMAC_SHA256, &key))
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = String::from_utf8_lossy(&self.0);
        let (first, second) = text.split_at(CODE_LENGTH / 2);
        write!(f, "{first}-{second}")
    }
}

/// Tells the LAN of an offer until it is dropped.
pub(crate) struct Announced(ServiceDaemon);

impl Announced {
    pub(crate) fn start(port: u16) -> Result<Self, PairError> {
        let daemon = ServiceDaemon::new()?;
        // The name says nothing about the machine. It is random because a taker tells offers apart by it.
        let name = format!("offer-{:08x}", u32::from_be_bytes(random::bytes()));
        let host = format!("hydramesh-{name}.local.");
        let service = ServiceInfo::new(SERVICE, &name, &host, "", port, None)?.enable_addr_auto();
        daemon.register(service)?;
        Ok(Self(daemon))
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let _ = self.0.shutdown();
    }
}

/// Waits until a machine that has the code has taken `gift`, and returns that machine.
///
/// Each conversation has its own thread, so that a silent connection delays no other.
pub(crate) fn offer(
    listener: &TcpListener,
    code: &Code,
    gift: &Gift,
    patience: Duration,
) -> Result<IpAddr, PairError> {
    let offer = Arc::new(Offer {
        config: server_config()?,
        code: code.clone(),
        gift: gift.clone(),
        end: Instant::now() + patience,
        state: Mutex::new(State::Open { misses: 0 }),
        silent: Mutex::new(Places::new(MOST_SILENT, MOST_SILENT / 2)),
        turn: Mutex::new(()),
    });
    listener.set_nonblocking(true)?;
    while Instant::now() < offer.end && offer.state().is_open().is_ok() {
        // Every conversation holds the offer. Those that have sent their proof are few: three wrong ones are the end.
        let conversations = Arc::strong_count(&offer) - 1;
        // An error here concerns one connection, or passes: files may be short for a moment.
        let accepted = (conversations < MOST_CONVERSATIONS).then(|| listener.accept());
        match accepted {
            Some(Ok((stream, peer))) => converse(&offer, stream, peer.ip().to_canonical()),
            _ => thread::sleep(POLL),
        }
    }
    match std::mem::replace(&mut *offer.state(), State::Expired) {
        State::Taken(taker) => Ok(taker),
        State::TooManyMisses => Err(PairError::TooManyMisses),
        State::Open { .. } | State::Expired => Err(PairError::Expired),
    }
}

/// Starts a conversation. A connection that cannot be closed later, or that gets no thread, is closed.
fn converse(offer: &Arc<Offer>, stream: TcpStream, peer: IpAddr) {
    let Ok(handle) = stream.try_clone() else {
        return;
    };
    let (place, silent) = lock(&offer.silent).enter(source(peer), handle);
    if let Some(silent) = silent {
        let _ = silent.shutdown(Shutdown::Both);
    }
    let conversation = Arc::clone(offer);
    let started = thread::Builder::new()
        .name("offer".to_owned())
        .spawn(move || {
            let _ = hand_over(stream, peer, place, &conversation);
            lock(&conversation.silent).leave(place);
        });
    if started.is_err() {
        lock(&offer.silent).leave(place);
    }
}

/// An offer, shared by its conversations.
struct Offer {
    config: Arc<ServerConfig>,
    code: Code,
    gift: Gift,
    end: Instant,
    state: Mutex<State>,
    /// Connections without a proof so far. One of them makes room for a newcomer.
    silent: Mutex<Places<IpAddr, TcpStream>>,
    /// Keys are computed one after the other, so that no more are than proofs count.
    turn: Mutex<()>,
}

impl Offer {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Open { misses: u32 },
    Taken(IpAddr),
    TooManyMisses,
    Expired,
}

impl State {
    fn is_open(&mut self) -> Result<&mut u32, PairError> {
        match self {
            Self::Open { misses } => Ok(misses),
            Self::TooManyMisses => Err(PairError::TooManyMisses),
            Self::Taken(_) | Self::Expired => Err(PairError::Expired),
        }
    }

    /// Checks a taker's proof and counts it if it is wrong. Only an open offer looks at proofs.
    fn check(&mut self, key: &hmac::Key, proof: &[u8]) -> Result<(), PairError> {
        let misses = self.is_open()?;
        // In constant time.
        if hmac::verify(key, TAKER, proof).is_ok() {
            return Ok(());
        }
        *misses += 1;
        if *misses == MOST_MISSES {
            *self = Self::TooManyMisses;
        }
        Err(PairError::WrongCode)
    }
}

fn hand_over(stream: TcpStream, peer: IpAddr, place: u64, offer: &Offer) -> Result<(), PairError> {
    let limited = Limited::new(stream, SILENCE, offer.end)?;
    let session = ServerConnection::new(Arc::clone(&offer.config))?;
    let mut tls = StreamOwned::new(session, limited);
    let mut proof = [0; PROOF];
    tls.read_exact(&mut proof)?;
    // From here on it cannot be sent away, so that a wrong proof always counts.
    if lock(&offer.silent).leave(place).is_none() {
        return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
    }
    let _turn = lock(&offer.turn);
    offer.state().is_open()?;
    let key = offer.code.key(&tls.conn)?;
    let content =
        serde_json::to_vec(&offer.gift).map_err(|error| PairError::Malformed(error.to_string()))?;
    let length =
        u16::try_from(content.len()).map_err(|_| PairError::Malformed("too long".to_owned()))?;
    // Locked until the token is sent: of two takers at once, one gets it.
    let mut state = offer.state();
    state.check(&key, &proof)?;
    tls.write_all(hmac::sign(&key, OFFERER).as_ref())?;
    tls.write_all(&length.to_be_bytes())?;
    tls.write_all(&content)?;
    tls.conn.send_close_notify();
    tls.flush()?;
    *state = State::Taken(peer);
    Ok(())
}

/// Takes the token from the first of these offers that has the code. Each offer is a list of addresses.
pub(crate) fn fetch_any(
    offers: &[Vec<SocketAddr>],
    code: &Code,
) -> Result<(SocketAddr, Gift), PairError> {
    let mut reason = PairError::NotFound;
    for addresses in offers {
        for &address in addresses {
            match fetch(address, code) {
                Ok(gift) => return Ok((address, gift)),
                // Another address of this offer would only use up its tries.
                Err(PairError::WrongCode) => {
                    reason = PairError::WrongCode;
                    break;
                }
                Err(_) if matches!(reason, PairError::WrongCode) => {}
                Err(error) => reason = error,
            }
        }
    }
    Err(reason)
}

/// Takes the offer at `address`.
fn fetch(address: SocketAddr, code: &Code) -> Result<Gift, PairError> {
    let stream = TcpStream::connect_timeout(&address, CONNECT)?;
    let name = ServerName::IpAddress(address.ip().into());
    let connection = ClientConnection::new(client_config()?, name)?;
    // The offerer may be slow, and compute keys for others, too.
    let limited = Limited::new(stream, CONVERSATION, Instant::now() + CONVERSATION)?;
    let mut tls = StreamOwned::new(connection, limited);
    while tls.conn.is_handshaking() {
        tls.conn.complete_io(&mut tls.sock)?;
    }
    let key = code.key(&tls.conn)?;
    tls.write_all(hmac::sign(&key, TAKER).as_ref())?;
    tls.flush()?;
    let mut proof = [0; PROOF];
    // An offerer that does not believe us hangs up.
    tls.read_exact(&mut proof)
        .map_err(|_| PairError::WrongCode)?;
    hmac::verify(&key, OFFERER, &proof).map_err(|_| PairError::WrongCode)?;
    let mut length = [0; 2];
    tls.read_exact(&mut length)?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > MOST_CONTENT {
        return Err(PairError::Malformed(format!("{length} bytes")));
    }
    let mut content = vec![0; length];
    tls.read_exact(&mut content)?;
    serde_json::from_slice(&content).map_err(|error| PairError::Malformed(error.to_string()))
}

/// Looks for offers on the LAN, for at most `patience`, and returns the addresses of each.
///
/// Anybody can announce one, so the search goes on for a moment after the first.
pub(crate) fn find(patience: Duration) -> Result<Vec<Vec<SocketAddr>>, PairError> {
    let daemon = ServiceDaemon::new()?;
    let events = daemon.browse(SERVICE)?;
    let mut end = Instant::now() + patience;
    let mut found = Found::default();
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        match events.recv_timeout(left) {
            Ok(ServiceEvent::ServiceResolved(service)) => {
                let addresses = service.addresses.iter();
                let addresses = addresses.map(|ip| SocketAddr::new(ip.to_ip_addr(), service.port));
                found.add(&service.fullname, addresses);
                if !found.0.is_empty() {
                    end = end.min(Instant::now() + GATHER);
                }
            }
            Ok(ServiceEvent::ServiceRemoved(_, name)) => found.0.retain(|offer| offer.0 != name),
            Ok(_) => {}
            // Not even an idle daemon ends by itself.
            Err(_) => break,
        }
    }
    let _ = daemon.shutdown();
    Ok(found.into_addresses())
}

/// The name and the addresses of each offer that was found, in the order of the finds.
#[derive(Default)]
struct Found(Vec<(String, Vec<SocketAddr>)>);

impl Found {
    fn add(&mut self, name: &str, addresses: impl Iterator<Item = SocketAddr>) {
        // A link-local address needs the link's name.
        let addresses: Vec<SocketAddr> = addresses
            .filter(|address| !matches!(address.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local()))
            .collect();
        match self.0.iter().position(|offer| offer.0 == name) {
            Some(index) => self.0[index].1.extend(addresses),
            None if addresses.is_empty() || self.0.len() == MOST_OFFERS => {}
            None => self.0.push((name.to_owned(), addresses)),
        }
    }

    fn into_addresses(self) -> Vec<Vec<SocketAddr>> {
        let mut offers: Vec<Vec<SocketAddr>> = self.0.into_iter().map(|offer| offer.1).collect();
        for addresses in &mut offers {
            addresses
                .sort_by_key(|address| (address.ip().is_loopback(), address.is_ipv6(), *address));
            addresses.dedup();
            addresses.truncate(MOST_ADDRESSES);
        }
        offers
    }
}

/// A connection that ends after `CONVERSATION`, at `end` or when the other side is silent, however slowly it sends.
struct Limited {
    stream: TcpStream,
    silence: Duration,
    end: Instant,
}

impl Limited {
    fn new(stream: TcpStream, silence: Duration, end: Instant) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let end = end.min(Instant::now() + CONVERSATION);
        Ok(Self {
            stream,
            silence,
            end,
        })
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.end.checked_duration_since(Instant::now());
        let left = left.filter(|left| !left.is_zero());
        let left = left.ok_or(io::ErrorKind::TimedOut)?;
        Ok(left.min(self.silence))
    }
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Limited {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The configuration for one offer, with a new key that is never used again.
fn server_config() -> Result<Arc<ServerConfig>, PairError> {
    let made = rcgen::generate_simple_self_signed(vec!["hydramesh-offer".to_owned()])
        .map_err(|error| io::Error::other(format!("making a certificate: {error}")))?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())?;
    Ok(Arc::new(config))
}

fn client_config() -> Result<Arc<ClientConfig>, PairError> {
    let provider = Arc::new(provider::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Takes any certificate whose key signed the handshake: the code proves the identity.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 is the least".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

const SERVICE: &str = "_hydramesh-offer._tcp.local.";
const ALPHABET: &[u8; 32] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZ";
const CODE_LENGTH: usize = 10;
const EXPORTER: &[u8] = b"EXPORTER-hydramesh-offer-1";
const TAKER: &[u8] = b"taker";
const OFFERER: &[u8] = b"offerer";
const PROOF: usize = 32;
const ROUNDS: NonZeroU32 = NonZeroU32::new(600_000).expect("more than none");
const MOST_MISSES: u32 = 3;
const MOST_CONTENT: usize = 1024;
const CONNECT: Duration = Duration::from_secs(5);
/// Connections that have not sent their proof, and all of them.
const MOST_SILENT: usize = 16;
const MOST_CONVERSATIONS: usize = 2 * MOST_SILENT;
const CONVERSATION: Duration = Duration::from_secs(60);
/// A slow machine needs seconds for its key.
const SILENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
/// Time to wait for further offers after the first.
const GATHER: Duration = Duration::from_secs(2);
const MOST_OFFERS: usize = 16;
const MOST_ADDRESSES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &[u8; CODE_LENGTH]) -> Code {
        Code(*text)
    }

    fn limited(stream: TcpStream) -> Limited {
        Limited::new(stream, CONVERSATION, Instant::now() + CONVERSATION).expect("a stream")
    }

    fn gift() -> Gift {
        Gift {
            token: format!("hydra1.{}", "a".repeat(80)),
            port: 7780,
        }
    }

    /// An offer on loopback, and its outcome.
    fn offered(code: &Code) -> (SocketAddr, thread::JoinHandle<Result<IpAddr, PairError>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let code = code.clone();
        let outcome =
            thread::spawn(move || offer(&listener, &code, &gift(), Duration::from_secs(120)));
        (address, outcome)
    }

    #[test]
    fn who_has_the_code_gets_the_token() {
        let code = Code::random();
        let (address, outcome) = offered(&code);
        // A client that speaks no TLS, and one that says nothing, cost the offer nothing.
        drop(TcpStream::connect(address).expect("a connection"));
        let mut noise = TcpStream::connect(address).expect("a connection");
        noise.write_all(&[0xff; 64]).expect("sent");
        drop(noise);
        let typed = Code::parse(&format!(" {} ", code.to_string().to_lowercase()));
        let got = fetch(address, &typed.expect("a code")).expect("a token");
        assert_eq!(got, gift());
        let who = outcome.join().expect("no panic").expect("taken");
        assert_eq!(who, address.ip());
    }

    #[test]
    fn silent_connections_hold_up_nobody() {
        let code = Code::random();
        let (address, outcome) = offered(&code);
        let silent: Vec<TcpStream> = (0..5 * MOST_SILENT)
            .map(|_| TcpStream::connect(address).expect("a connection"))
            .collect();
        let begin = Instant::now();
        assert_eq!(fetch(address, &code).expect("a token"), gift());
        assert!(outcome.join().expect("no panic").is_ok());
        assert!(begin.elapsed() < SILENCE, "{:?}", begin.elapsed());
        drop(silent);
    }

    #[test]
    fn an_offer_ends_in_time_whoever_is_silent() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let _silent = TcpStream::connect(listener.local_addr().expect("an address"));
        let begin = Instant::now();
        let code = Code::random();
        let error = offer(&listener, &code, &gift(), Duration::from_secs(1)).expect_err("nobody");
        assert!(matches!(error, PairError::Expired), "{error}");
        assert!(begin.elapsed() < SILENCE, "{:?}", begin.elapsed());
    }

    #[test]
    fn three_wrong_codes_end_the_offer() {
        let (address, outcome) = offered(&code(b"AAAAAAAAAA"));
        for wrong in [b"AAAAAAAAAB", b"BAAAAAAAAA", b"2222222222"] {
            let error = fetch(address, &code(wrong)).expect_err("wrong");
            assert!(matches!(error, PairError::WrongCode), "{error}");
        }
        let error = outcome.join().expect("no panic").expect_err("over");
        assert!(matches!(error, PairError::TooManyMisses), "{error}");
        assert!(fetch(address, &code(b"AAAAAAAAAA")).is_err());
    }

    #[test]
    fn wrong_codes_at_once_end_the_offer_too() {
        let (address, outcome) = offered(&code(b"AAAAAAAAAA"));
        let guesses: Vec<_> = (0..5)
            .map(|_| thread::spawn(move || fetch(address, &code(b"BBBBBBBBBB"))))
            .collect();
        for guess in guesses {
            assert!(guess.join().expect("no panic").is_err());
        }
        let error = outcome.join().expect("no panic").expect_err("over");
        assert!(matches!(error, PairError::TooManyMisses), "{error}");
    }

    #[test]
    fn after_three_misses_no_proof_is_looked_at() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
        let right = hmac::sign(&key, TAKER);
        let mut state = State::Open { misses: 0 };
        for _ in 1..MOST_MISSES {
            let missed = state.check(&key, &[0; PROOF]);
            assert!(matches!(missed, Err(PairError::WrongCode)));
            assert!(state.check(&key, right.as_ref()).is_ok());
        }
        let last = state.check(&key, &[0; PROOF]);
        assert!(matches!(last, Err(PairError::WrongCode)));
        let late = state.check(&key, right.as_ref());
        assert!(matches!(late, Err(PairError::TooManyMisses)));
        let mut taken = State::Taken(IpAddr::from([192, 0, 2, 1]));
        assert!(taken.check(&key, right.as_ref()).is_err());
    }

    #[test]
    fn an_offer_with_another_code_does_not_hide_the_right_one() {
        let ours = Code::random();
        let (right, outcome) = offered(&ours);
        let (other, _) = offered(&code(b"AAAAAAAAAA"));
        // There is no listener at the first address; a second proof at `other` would be a second miss.
        let closed = SocketAddr::from(([127, 0, 0, 1], 1));
        let offers = [vec![closed, other, other], vec![right]];
        assert_eq!(fetch_any(&offers, &ours).expect("a token"), (right, gift()));
        assert!(outcome.join().expect("no panic").is_ok());
        let error = fetch_any(&[vec![other], vec![closed]], &ours).expect_err("wrong");
        assert!(matches!(error, PairError::WrongCode), "{error}");
        let error = fetch_any(&[], &ours).expect_err("nothing");
        assert!(matches!(error, PairError::NotFound), "{error}");
        // Two misses so far: the offer still stands.
        assert!(fetch(other, &code(b"AAAAAAAAAA")).is_ok());
    }

    #[test]
    fn addresses_are_grouped_by_offer() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let mut found = Found::default();
        found.add("link", [at("[fe80::1]:1")].into_iter());
        assert!(found.0.is_empty());
        found.add("a", [at("[2001:db8::1]:1")].into_iter());
        found.add("b", [at("192.0.2.2:2")].into_iter());
        found.add("a", [at("127.0.0.1:1"), at("192.0.2.1:1")].into_iter());
        found.add("a", [at("192.0.2.1:1")].into_iter());
        let a = ["192.0.2.1:1", "[2001:db8::1]:1", "127.0.0.1:1"].map(at);
        assert_eq!(
            found.into_addresses(),
            [a.to_vec(), vec![at("192.0.2.2:2")]]
        );
        let mut many = Found::default();
        for index in 0..1000 {
            many.add(&index.to_string(), [at("192.0.2.1:1")].into_iter());
        }
        assert_eq!(many.into_addresses().len(), MOST_OFFERS);
    }

    #[test]
    fn somebody_in_the_middle_gets_nothing_from_the_proof() {
        let code = Code::random();
        let (head, outcome) = offered(&code);
        // It speaks TLS with both and passes the proof on.
        let middle = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = middle.local_addr().expect("an address");
        let relay = thread::spawn(move || {
            let (stream, _) = middle.accept().expect("the taker");
            let config = server_config().expect("a certificate");
            let session = ServerConnection::new(config).expect("a session");
            let mut taker = StreamOwned::new(session, limited(stream));
            let mut proof = [0; PROOF];
            taker.read_exact(&mut proof).expect("the taker's proof");
            let stream = TcpStream::connect(head).expect("the head");
            let name = ServerName::IpAddress(head.ip().into());
            let session = ClientConnection::new(client_config().expect("a config"), name);
            let mut offerer = StreamOwned::new(session.expect("a session"), limited(stream));
            offerer.write_all(&proof).expect("passed on");
            offerer.read_exact(&mut [0; 1])
        });
        let error = fetch(address, &code).expect_err("nothing");
        assert!(matches!(error, PairError::WrongCode), "{error}");
        assert!(
            relay.join().expect("no panic").is_err(),
            "the head said something"
        );
        // The offer itself still stands.
        assert_eq!(fetch(head, &code).expect("a token"), gift());
        assert!(outcome.join().expect("no panic").is_ok());
    }

    #[test]
    fn a_code_is_read_as_people_type_it() {
        let code = code(b"K7QXM4TR9H");
        assert_eq!(code.to_string(), "K7QXM-4TR9H");
        for text in ["K7QXM-4TR9H", "k7qxm4tr9h", " k7qxm 4tr9h\n"] {
            assert!(
                Code::parse(text).is_ok_and(|parsed| parsed == code),
                "{text}"
            );
        }
        for text in [
            "",
            "K7QXM",
            "K7QXM-4TR9",
            "K7QXM-4TR9HH",
            "K7QXM-4TR91",
            "K7QXM-4TR9Ä",
            &"A".repeat(100_000),
        ] {
            assert!(Code::parse(text).is_err(), "{text:.20}");
        }
    }
}
