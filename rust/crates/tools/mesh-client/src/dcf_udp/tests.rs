use super::*;

fn incoming() -> (Incoming, Instant) {
    let now = Instant::now();
    (Incoming::new(7, now, Duration::from_secs(60)), now)
}

fn feed(incoming: &mut Incoming, message: Message, seen: &mut String) -> Result<Step, DcfError> {
    let now = incoming.started + Duration::from_millis(5);
    incoming.take(&message, now, &mut |text| seen.push_str(text))
}

fn result(text: &str) -> Message {
    Message::new(MsgType::RESULT, 7, 0, text.to_owned())
}

#[test]
fn partials_in_any_order_and_repeated_give_the_text_once() {
    let (mut incoming, _) = incoming();
    let mut seen = String::new();
    for (offset, text) in [
        (2, "llo"),
        (0, "he"),
        (2, "llo"),
        (9, "lost its turn"),
        (5, " w"),
    ] {
        feed(
            &mut incoming,
            Message::partial(7, 0, offset, text),
            &mut seen,
        )
        .expect("text");
    }
    assert_eq!(seen, "hello w");
    let done = feed(&mut incoming, result("hello world"), &mut seen).expect("an answer");
    assert_eq!(seen, "hello world");
    let Step::Done(answer) = done else {
        panic!("not done")
    };
    assert_eq!((answer.text.as_str(), answer.partials), ("hello world", 5));
}

#[test]
fn a_partial_that_cuts_a_character_of_ours_is_left_out() {
    let (mut incoming, _) = incoming();
    let mut seen = String::new();
    feed(&mut incoming, Message::partial(7, 0, 0, "e"), &mut seen).expect("text");
    feed(&mut incoming, Message::partial(7, 0, 0, "é"), &mut seen).expect("ignored");
    assert_eq!(seen, "e");
}

#[test]
fn answers_to_other_tasks_are_not_ours() {
    let (mut incoming, _) = incoming();
    let other = Message::new(MsgType::RESULT, 8, 0, "no");
    let step = feed(&mut incoming, other, &mut String::new()).expect("ignored");
    assert!(matches!(step, Step::Nothing));
}

#[test]
fn a_result_that_contradicts_its_partials_is_an_error() {
    let (mut incoming, _) = incoming();
    let mut seen = String::new();
    feed(&mut incoming, Message::partial(7, 0, 0, "hel"), &mut seen).expect("text");
    let error = feed(&mut incoming, result("other"), &mut seen).err();
    assert!(matches!(error, Some(DcfError::Broken(_))));
}

#[test]
fn a_long_answer_in_chunks_is_put_together() {
    let (mut incoming, _) = incoming();
    let mut seen = String::new();
    let text = "a long answer ".repeat(10_000);
    let chunks = dcf::chunk::split(7, 0, text.clone().into()).expect("fits");
    let mut last = Step::Nothing;
    for chunk in chunks {
        last = feed(&mut incoming, chunk, &mut seen).expect("a chunk");
    }
    assert!(matches!(last, Step::Done(_)));
    assert_eq!(seen, text);
}

#[test]
fn chunks_of_several_sendings_make_one_answer_however_long_it_takes() {
    let (mut incoming, start) = incoming();
    let mut seen = String::new();
    let text = "a long answer ".repeat(10_000);
    let chunks: Vec<Message> = dcf::chunk::split(7, 0, text.clone().into())
        .expect("fits")
        .collect();
    let mut last = Step::Nothing;
    for (round, seconds) in [(0, 1), (1, 30), (2, 59)] {
        for chunk in chunks.iter().skip(round).step_by(3) {
            let now = start + Duration::from_secs(seconds);
            let step = incoming.take(chunk, now, &mut |text| seen.push_str(text));
            last = step.expect("a chunk");
        }
    }
    assert!(matches!(last, Step::Done(_)));
    assert_eq!(seen, text);
}

#[test]
fn chunks_of_another_answer_take_the_place_of_one_that_broke_off() {
    let (mut incoming, _) = incoming();
    let mut seen = String::new();
    let text = |word: &str| word.repeat(1_000);
    let split = |text: String| dcf::chunk::split(7, 0, text.into()).expect("fits");
    let old = split(text("old")).next().expect("a chunk");
    let step = feed(&mut incoming, old, &mut seen).expect("a chunk");
    assert!(matches!(step, Step::Piece));
    let mut last = Step::Nothing;
    for chunk in split(text("new")) {
        last = feed(&mut incoming, chunk, &mut seen).expect("a chunk");
    }
    assert!(matches!(last, Step::Done(_)));
    assert_eq!(seen, text("new"));
}

#[test]
fn a_task_is_repeated_ever_more_rarely_and_soon_when_an_answer_breaks_off() {
    let start = Instant::now();
    let mut now = start;
    let mut patience = Patience::new(now);
    let mut waits = Vec::new();
    for _ in 0..5 {
        assert!(!patience.is_over(patience.ends - Duration::from_nanos(1)));
        waits.push((patience.ends - now).as_millis());
        now = patience.ends;
        assert!(patience.is_over(now));
        patience.repeated(now);
    }
    assert_eq!(waits, [500, 1_000, 2_000, 4_000, 5_000]);
    patience.at_work(now);
    assert_eq!(patience.ends - now, LONGEST_REPEAT);
    patience.arriving(now);
    assert_eq!(patience.ends - now, FIRST_REPEAT);
}

#[test]
fn a_challenge_is_echoed_with_its_cookie() {
    let (mut incoming, _) = incoming();
    let challenge = Message::new(MsgType::CHALLENGE, 7, 1, vec![1, 2, 3]);
    let step = feed(&mut incoming, challenge, &mut String::new()).expect("a challenge");
    let Step::Challenge(reply) = step else {
        panic!("no reply")
    };
    assert_eq!(reply.kind, MsgType::CHALLENGE_REPLY);
    assert_eq!(&reply.payload[..], [1, 2, 3]);
}

#[tokio::test]
async fn of_several_addresses_the_one_that_answers_is_used() {
    let (silent, there) = (
        UdpSocket::bind("[::1]:0").await.expect("a port"),
        UdpSocket::bind("127.0.0.1:0").await.expect("a port"),
    );
    let closed = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let gone = closed.local_addr().expect("bound");
    drop(closed);
    let address = |socket: &UdpSocket| socket.local_addr().expect("bound");
    let (silent_at, there_at) = (address(&silent), address(&there));
    let sockets = |all: Vec<SocketAddr>| async move {
        let mut sockets = Vec::new();
        for address in all {
            sockets.push((address, connected(address).await.expect("a socket")));
        }
        sockets
    };
    let answer = tokio::spawn(async move {
        let (_, from) = there.recv_from(&mut [0; 64]).await.expect("a question");
        there.send_to(b"yes", from).await.expect("sent");
    });
    let all = sockets(vec![gone, silent_at, there_at]).await;
    let chosen = first_to_answer(all).await.map(|(address, _)| address);
    assert_eq!(chosen, Some(there_at));
    answer.await.expect("answered");
    // One that cannot answer the question is used if no other is left, and in the end anyway.
    let all = sockets(vec![gone, silent_at]).await;
    let chosen = first_to_answer(all).await.map(|(address, _)| address);
    assert_eq!(chosen, Some(silent_at));
    assert!(
        first_to_answer(sockets(vec![gone, gone]).await)
            .await
            .is_none_or(|(a, _)| a == gone)
    );
}

#[tokio::test]
async fn a_lost_task_is_repeated_with_the_same_sequence() {
    let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let address = server.local_addr().expect("bound").to_string();
    let serve = tokio::spawn(async move {
        let mut buffer = [0; 2048];
        let (len, from) = server.recv_from(&mut buffer).await.expect("first");
        let first = buffer[..len].to_vec();
        let (len, _) = server.recv_from(&mut buffer).await.expect("repeat");
        assert_eq!(first, buffer[..len], "the repeat is the same datagram");
        let task = Message::decode_datagram(first.into()).expect("a task");
        let answer = Message::new(MsgType::RESULT, task.sequence, 0, task.payload);
        server
            .send_to(&answer.encode_datagram(), from)
            .await
            .expect("sent");
    });
    let mut client = DcfClient::connect(&address).await.expect("a socket");
    let answer = client
        .ask_plain("hello", Duration::from_secs(10))
        .await
        .expect("an answer");
    assert_eq!((answer.text.as_str(), answer.repeats), ("hello", 1));
    serve.await.expect("the server");
}

/// Answers Health and the Tasks of one version, and hears nothing else.
async fn peer_of(version: Version) -> (String, tokio::task::JoinHandle<()>) {
    let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let address = server.local_addr().expect("bound").to_string();
    let serve = tokio::spawn(async move {
        let mut buffer = [0; 2048];
        loop {
            let (len, from) = server.recv_from(&mut buffer).await.expect("a datagram");
            let datagram = Bytes::copy_from_slice(&buffer[..len]);
            let Ok((spoken, message)) = Message::decode_versioned(datagram) else {
                continue;
            };
            if spoken != version {
                continue;
            }
            let answer = match message.kind {
                MsgType::TASK => MsgType::RESULT,
                kind => kind,
            };
            let answer = Message::new(answer, message.sequence, 0, message.payload);
            let _ = server.send_to(&answer.encode_as(version), from).await;
        }
    });
    (address, serve)
}

#[tokio::test]
async fn a_peer_of_v5_1_is_found_out_and_remembered() {
    let (address, serve) = peer_of(Version::V5_1).await;
    let mut client = DcfClient::connect(&address).await.expect("a socket");
    for prompt in ["first", "second"] {
        let answer = client.ask_plain(prompt, Duration::from_secs(30)).await;
        assert_eq!(answer.expect("an answer").text, prompt);
        assert_eq!(client.version(), Some(Version::V5_1));
    }
    let again = DcfClient::connect(&address).await.expect("a socket");
    let mut told = again.speaking(Version::V5_1);
    let answer = told.ask_plain("told", Duration::from_secs(30)).await;
    assert_eq!(answer.expect("an answer").repeats, 0);
    serve.abort();
}

#[tokio::test]
async fn an_answer_may_take_long_while_the_head_says_that_it_works_on_it() {
    let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let address = server.local_addr().expect("bound").to_string();
    let serve = tokio::spawn(async move {
        let mut buffer = [0; 2048];
        let (len, from) = server.recv_from(&mut buffer).await.expect("the task");
        let task = Bytes::copy_from_slice(&buffer[..len]);
        let task = Message::decode_datagram(task).expect("a task");
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let ack = Message::new(MsgType::ACK, task.sequence, 0, "for a slot\x1b[2J");
            let _ = server.send_to(&ack.encode_datagram(), from).await;
        }
        let answer = Message::new(MsgType::RESULT, task.sequence, 0, "late");
        let _ = server.send_to(&answer.encode_datagram(), from).await;
        // Then it is gone.
        tokio::time::sleep(Duration::from_secs(30)).await;
    });
    let mut client = DcfClient::connect(&address).await.expect("a socket");
    let silence = Duration::from_millis(1_200);
    let mut waits = Vec::new();
    let task = serde_json::json!({"prompt": "x"});
    let answer = client
        .ask_and_watch(&task, silence, &mut |_| {}, &mut |what| {
            waits.push(what.to_owned())
        })
        .await
        .expect("an answer");
    assert_eq!(answer.text, "late");
    assert!(answer.total > silence, "{:?}", answer.total);
    assert_eq!(waits[0], "for a slot[2J");
    let lost = client.ask(&task, silence, &mut |_| {}).await;
    assert!(matches!(lost, Err(DcfError::Timeout { .. })), "{lost:?}");
    serve.abort();
}

#[tokio::test]
async fn a_task_that_is_not_an_object_is_refused() {
    let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let address = server.local_addr().expect("bound").to_string();
    let mut client = DcfClient::connect(&address).await.expect("a socket");
    let silence = Duration::from_secs(5);
    let error = client.ask(&"a prompt", silence, &mut |_| {}).await;
    assert!(matches!(error, Err(DcfError::Task(_))), "{error:?}");
}

#[tokio::test]
async fn a_port_nobody_listens_on_is_told_at_once() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("bound").to_string();
    drop(socket);
    let mut client = DcfClient::connect(&address).await.expect("a socket");
    let error = client.ask_plain("x", Duration::from_secs(5)).await;
    assert!(
        matches!(error, Err(DcfError::Unreachable { .. })),
        "{error:?}"
    );
}
