//! A real shim on loopback sockets.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use mesh_shim::{Config, Shim, ShimHandle, config::RateLimit};

/// Answers every Task with its own text in capitals, and Health with Health, until dropped.
struct EchoHead {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EchoHead {
    fn start(name: &'static str, delay: Duration) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            socket
                .set_read_timeout(Some(Duration::from_millis(20)))
                .unwrap();
            let mut due: Vec<(Instant, SocketAddr, Message)> = Vec::new();
            let mut buffer = [0; 1 << 16];
            while !stopped.load(Ordering::SeqCst) {
                if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                    let message =
                        Message::decode_datagram(Bytes::copy_from_slice(&buffer[..len])).unwrap();
                    match message.kind {
                        MsgType::HEALTH => {
                            socket.send_to(&message.encode_datagram(), from).unwrap();
                        }
                        MsgType::TASK => {
                            let text = String::from_utf8(message.payload.to_vec()).unwrap();
                            let text = format!("{name}: {}", text.to_uppercase());
                            let answer = Message::new(MsgType::RESULT, message.sequence, 0, text);
                            due.push((Instant::now() + delay, from, answer));
                        }
                        other => panic!("a head got {other}"),
                    }
                }
                due.retain(|(at, to, answer)| {
                    let wait = *at > Instant::now();
                    if !wait {
                        socket.send_to(&answer.encode_datagram(), to).unwrap();
                    }
                    wait
                });
            }
        });
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for EchoHead {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let panicked = self.thread.take().unwrap().join().is_err();
        assert!(!panicked || thread::panicking(), "the head panicked");
    }
}

fn shim(heads: &[&EchoHead], change: impl FnOnce(&mut Config)) -> ShimHandle {
    let mut config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        heads: heads.iter().map(|head| head.address.to_string()).collect(),
        probe_interval: Duration::from_millis(50),
        head_timeout: Duration::from_millis(300),
        ..Config::default()
    };
    change(&mut config);
    Shim::spawn(config).unwrap()
}

fn client(shim: &ShimHandle) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(shim.addr()).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

fn ask(socket: &UdpSocket, sequence: u32, text: &str) {
    let task = Message::new(MsgType::TASK, sequence, 1, text.to_owned());
    socket.send(&task.encode_datagram()).unwrap();
}

fn receive(socket: &UdpSocket) -> Message {
    let mut buffer = [0; 1 << 16];
    let len = socket.recv(&mut buffer).expect("an answer in time");
    Message::decode_datagram(Bytes::copy_from_slice(&buffer[..len])).unwrap()
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn many_clients_with_the_same_sequence_get_their_own_answers() {
    let head = EchoHead::start("a", Duration::ZERO);
    let shim = shim(&[&head], |_| {});
    let clients: Vec<UdpSocket> = (0..20).map(|_| client(&shim)).collect();
    for (number, client) in clients.iter().enumerate() {
        ask(client, 7, &format!("question {number}"));
    }
    for (number, client) in clients.iter().enumerate() {
        let answer = receive(client);
        assert_eq!((answer.kind, answer.sequence), (MsgType::RESULT, 7));
        assert_eq!(answer.payload, format!("a: QUESTION {number}"));
    }
}

#[test]
fn a_task_survives_the_death_of_its_head() {
    let slow = EchoHead::start("slow", Duration::from_secs(60));
    let other = EchoHead::start("other", Duration::ZERO);
    let shim = shim(&[&slow, &other], |_| {});
    wait_for("both heads", || shim.stats().live_heads.get() == 2);
    let client = client(&shim);
    ask(&client, 1, "still there?");
    wait_for("the task", || shim.stats().open_tasks.get() == 1);
    drop(slow);
    assert_eq!(receive(&client).payload, "other: STILL THERE?");
    assert_eq!(shim.stats().traffic.failovers.get(), 1);
}

#[test]
fn without_a_head_a_client_is_told_so() {
    let gone = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let head = EchoHead::start("unused", Duration::ZERO);
    let shim = shim(&[&head], |config| config.heads = vec![gone.to_string()]);
    wait_for("a probe", || shim.stats().traffic.probes.get() > 2);
    let client = client(&shim);
    ask(&client, 3, "anyone?");
    let answer = receive(&client);
    assert_eq!(answer.sequence, 3);
    assert_eq!(answer.error_body().unwrap().code, ErrorCode::NO_WORKERS);
}

#[test]
fn a_drain_lets_running_tasks_finish_and_refuses_new_ones() {
    let head = EchoHead::start("a", Duration::from_millis(300));
    let shim = shim(&[&head], |_| {});
    let (early, late) = (client(&shim), client(&shim));
    ask(&early, 1, "early");
    wait_for("the task", || shim.stats().open_tasks.get() == 1);
    shim.drain();
    thread::sleep(Duration::from_millis(50));
    ask(&late, 1, "late");
    assert_eq!(
        receive(&late).error_body().unwrap().code,
        ErrorCode::DRAINING
    );
    assert_eq!(receive(&early).payload, "a: EARLY");
    shim.join().unwrap();
}

#[test]
fn a_drain_ends_at_its_limit() {
    let head = EchoHead::start("a", Duration::from_secs(60));
    let shim = shim(&[&head], |config| {
        config.drain_limit = Duration::from_millis(200)
    });
    let client = client(&shim);
    ask(&client, 1, "too slow");
    wait_for("the task", || shim.stats().open_tasks.get() == 1);
    let begun = Instant::now();
    shim.drain();
    assert_eq!(
        receive(&client).error_body().unwrap().code,
        ErrorCode::DRAINING
    );
    shim.join().unwrap();
    assert!((200..2_000).contains(&begun.elapsed().as_millis()));
}

#[test]
fn a_taken_port_is_named() {
    let head = EchoHead::start("a", Duration::ZERO);
    let first = shim(&[&head], |_| {});
    let config = Config {
        listen: first.addr(),
        ..Config::default()
    };
    let error = Shim::spawn(config).unwrap_err().to_string();
    assert!(error.contains(&first.addr().to_string()), "{error}");
}

/// Random bytes, and good messages with random changes.
#[test]
fn two_hundred_thousand_bad_datagrams_do_no_harm() {
    let head = EchoHead::start("a", Duration::ZERO);
    let unlimited = RateLimit {
        per_second: 0,
        ..RateLimit::default()
    };
    let shim = shim(&[&head], |config| config.rate_limit = unlimited);
    wait_for("the head", || shim.stats().live_heads.get() == 1);
    let vandal = UdpSocket::bind("127.0.0.1:0").unwrap();
    vandal.connect(shim.addr()).unwrap();
    let good = Message::new(MsgType::RESULT, 77, 1, "no client sends a Result").encode_datagram();
    let mut random = Random(1);
    let mut datagram = [0; 64];
    for round in 0..200_000u32 {
        let len = if round.is_multiple_of(2) {
            for byte in &mut datagram {
                *byte = random.next() as u8;
            }
            // Neither a Task nor anything else that the head of this test would have to know.
            datagram[0] |= 0x40;
            random.next() as usize % datagram.len()
        } else {
            datagram[..good.len()].copy_from_slice(&good);
            datagram[5 + random.next() as usize % (good.len() - 5)] ^= random.next() as u8;
            good.len()
        };
        vandal.send(&datagram[..len]).unwrap();
        if round.is_multiple_of(10_000) {
            let client = client(&shim);
            ask(&client, round, "well?");
            let answer = receive(&client);
            assert_eq!(
                (answer.sequence, &answer.payload[..]),
                (round, &b"a: WELL?"[..])
            );
        }
    }
    wait_for("the last of them", || shim.stats().dropped() > 100_000);
    assert!(shim.is_running());
    assert_eq!(shim.stats().traffic.tasks.get(), 20);
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
