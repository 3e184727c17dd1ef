//! A DCF client in 20 lines: one Task datagram out, one Result or Error back.
//!
//! ```text
//! cargo run -p dcf --example udp_client -- 127.0.0.1:9999 "Why is the sky blue?"
//! ```

use std::{error::Error, net::UdpSocket, time::Duration};

use dcf::{MAX_DATAGRAM, Message, MsgType};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(server), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: udp_client HOST:PORT PROMPT".into());
    };
    println!("{}", ask(&server, &prompt)?);
    Ok(())
}

/// Sends `prompt` to a shim or head and waits up to a minute for an answer that fits one datagram.
pub(crate) fn ask(server: &str, prompt: &str) -> Result<String, Box<dyn Error>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let task = Message::new(MsgType::TASK, 1, 0, prompt.to_owned()).encode_datagram();
    let mut buffer = vec![0; MAX_DATAGRAM];
    for _ in 0..30 {
        socket.send(&task)?; // A datagram may be lost, and a repeated task does not run twice.
        let Ok(length) = socket.recv(&mut buffer) else {
            continue;
        };
        let answer = Message::decode_datagram(buffer[..length].to_vec().into())?;
        match answer.error_body() {
            Some(error) => return Err(error.to_string().into()),
            None if answer.kind == MsgType::RESULT => {
                return Ok(String::from_utf8(answer.payload.into())?);
            }
            None => {}
        }
    }
    Err(format!("no answer from {server} within a minute").into())
}
