//! Answers of more than 400 kB over UDP: whole and byte for byte, directly and through the shim, to clients with the
//! system's own buffers, and over a line that loses datagrams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use dcf::chunk::{Chunk, Limits, Reassembler};
use dcf::{Message, MsgType};
use mesh_testkit::client::dcf_udp::DcfClient;
use mesh_testkit::{Mesh, paths};
use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio::task::AbortHandle;

const LIMIT: Duration = Duration::from_secs(30);
/// More than twice the default size of a socket's buffer.
const LARGE: usize = 400_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_answers_arrive_over_udp_as_they_do_over_http() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder().shim().start().await?;
    let worker = format!("models = {:?}\n", [paths::minilm()?]);
    mesh.start_worker(&worker).await?;
    mesh.wait_for_workers(1).await?;
    let head = mesh.head.address("dcf.clients")?;
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;

    let texts: Vec<String> = (0..300).map(|number| format!("Text {number}.")).collect();
    let task = json!({"kind": "embed", "input": texts, "encoding_format": "base64"});
    let whole: Value = mesh
        .client()?
        .post(mesh_api::paths::EMBEDDINGS, &task)
        .await?;
    let is_whole = |text: &str| -> Result<()> {
        ensure!(text.len() >= LARGE, "only {} bytes", text.len());
        ensure!(
            serde_json::from_str::<Value>(text)? == whole,
            "other vectors than over HTTP"
        );
        Ok(())
    };

    for (way, target) in [("the head", head), ("the shim", shim)] {
        let mut client = DcfClient::connect(&target.to_string()).await?;
        let answer = client.ask(&task, LIMIT, &mut |_| {}).await;
        let answer = answer.with_context(|| format!("our client toward {way}"))?;
        is_whole(&answer.text)?;
        println!(
            "our client toward {way}: {} bytes in {:?}, {} repeats",
            answer.text.len(),
            answer.total,
            answer.repeats
        );

        let started = Instant::now();
        let (text, repeats) = ask_without_comfort(target, &task)
            .await
            .with_context(|| format!("a bare client toward {way}"))?;
        is_whole(&text)?;
        println!(
            "a bare client toward {way}: {:?}, {repeats} repeats",
            started.elapsed()
        );

        let line = LossyLine::toward(target, 5).await?;
        let mut client = DcfClient::connect(&line.address.to_string()).await?;
        let answer = client.ask(&task, LIMIT, &mut |_| {}).await;
        let answer = answer.with_context(|| format!("a lossy line to {way}"))?;
        is_whole(&answer.text)?;
        ensure!(answer.repeats > 0, "nothing was lost");
        println!(
            "a lossy line to {way}: {:?}, {} repeats",
            answer.total, answer.repeats
        );
    }
    let started = Instant::now();
    mesh.shutdown().await?;
    let took = started.elapsed();
    ensure!(
        took < Duration::from_secs(20),
        "the services took {took:?} to stop: something still sends"
    );
    Ok(())
}

/// Asks from a socket with the buffer that the system gives to everybody; the Task is repeated every 2 s.
async fn ask_without_comfort(target: SocketAddr, task: &Value) -> Result<(String, u32)> {
    const SEQUENCE: u32 = 5;
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    socket.connect(target).await?;
    let task = Message::new(MsgType::TASK, SEQUENCE, 0, task.to_string()).encode_datagram();
    let mut pieces = Reassembler::new(Limits {
        timeout: LIMIT,
        ..Limits::default()
    });
    let mut buffer = vec![0; dcf::MAX_DATAGRAM];
    let mut repeats = 0;
    let started = Instant::now();
    socket.send(&task).await?;
    loop {
        ensure!(started.elapsed() < LIMIT, "not whole within {LIMIT:?}");
        let receive = tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut buffer));
        let Ok(received) = receive.await else {
            socket.send(&task).await?;
            repeats += 1;
            continue;
        };
        let message = Message::decode_datagram(buffer[..received?].to_vec().into())?;
        ensure!(
            (message.kind, message.sequence) == (MsgType::CHUNK, SEQUENCE),
            "{message:?}"
        );
        let chunk = Chunk::parse(&message.payload)?;
        if let Some(whole) = pieces.push((), &chunk, Instant::now())? {
            return Ok((String::from_utf8(whole.to_vec())?, repeats));
        }
    }
}

/// A relay for one client that loses some of the datagrams toward it.
struct LossyLine {
    address: SocketAddr,
    relay: AbortHandle,
}

impl LossyLine {
    /// Loses about one of `one_of` datagrams.
    async fn toward(target: SocketAddr, one_of: u64) -> Result<Self> {
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await?);
        let far = UdpSocket::bind("127.0.0.1:0").await?;
        far.connect(target).await?;
        let address = near.local_addr()?;
        let relay = tokio::spawn(async move {
            let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
            let mut client = None;
            let mut random = fastrand::Rng::with_seed(7);
            loop {
                tokio::select! {
                    Ok((len, from)) = near.recv_from(&mut asked) => {
                        client = Some(from);
                        let _ = far.send(&asked[..len]).await;
                    }
                    Ok(len) = far.recv(&mut answered) => {
                        if let Some(client) = client && random.u64(..one_of) > 0 {
                            let _ = near.send_to(&answered[..len], client).await;
                        }
                    }
                }
            }
        });
        Ok(Self {
            address,
            relay: relay.abort_handle(),
        })
    }
}

impl Drop for LossyLine {
    fn drop(&mut self) {
        self.relay.abort();
    }
}
