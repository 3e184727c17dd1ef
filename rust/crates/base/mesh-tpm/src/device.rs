//! The way to a TPM: the kernel's device file, or the socket of a TPM in software.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tpm2_protocol::constant::TPM_MAX_COMMAND_SIZE;
use tpm2_protocol::data::{TpmCc, TpmRc, TpmRcBase, TpmRh, TpmSt, TpmaSession, TpmsAuthCommand};
use tpm2_protocol::frame::{TpmFrame, TpmResponse, TpmUnmarshalBody, tpm_marshal_command};
use tpm2_protocol::{TpmError, TpmWriter};

/// A TPM cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// It cannot be opened.
    #[error("cannot open the TPM at {path}: {source}{}", remedy(.source))]
    Open {
        /// Its device file or socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It does not answer.
    #[error("the TPM at {path} does not answer: {source}")]
    Io {
        /// Its device file or socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It refuses a command.
    #[error("the TPM refuses {command:?}: {code}")]
    Refused {
        /// The command.
        command: TpmCc,
        /// The TPM's reason.
        code: TpmRc,
    },
    /// Its answer cannot be read.
    #[error("the TPM's answer to {command:?} cannot be read: {source}")]
    Answer {
        /// The command.
        command: TpmCc,
        /// The reason.
        source: TpmError,
    },
    /// It has no SHA-256 bank.
    #[error(
        "the TPM gives no values of its registers in SHA-256: turn its SHA-256 bank on in the firmware's settings"
    )]
    NoBank,
    /// Its registers do not rest.
    #[error("the TPM's registers changed while they were quoted")]
    Changing,
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            ": let the worker's user read and write it (group `tss` on most systems), or set `tpm = \"off\"`"
        }
        _ => "",
    }
}

/// An open TPM.
pub(crate) struct Device {
    path: PathBuf,
    channel: Box<dyn Channel>,
}

trait Channel: Read + Write + Send {}

impl<T: Read + Write + Send> Channel for T {}

impl Device {
    pub(crate) fn open(path: &Path) -> Result<Self, DeviceError> {
        let opened = || -> io::Result<Box<dyn Channel>> {
            if fs::metadata(path)?.file_type().is_socket() {
                let socket = UnixStream::connect(path)?;
                socket.set_read_timeout(Some(SOCKET_TIMEOUT))?;
                socket.set_write_timeout(Some(SOCKET_TIMEOUT))?;
                return Ok(Box::new(socket));
            }
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            Ok(Box::new(file))
        };
        let path = path.to_owned();
        match opened() {
            Ok(channel) => Ok(Self { path, channel }),
            Err(source) => Err(DeviceError::Open { path, source }),
        }
    }

    /// Runs a command without authorisation.
    pub(crate) fn run<C: TpmFrame, R: TpmUnmarshalBody>(
        &mut self,
        command: &C,
    ) -> Result<R, DeviceError> {
        self.exchange(command, TpmSt::NoSessions, &[])
    }

    /// Runs a command with the empty password for its handle.
    pub(crate) fn run_authorised<C: TpmFrame, R: TpmUnmarshalBody>(
        &mut self,
        command: &C,
    ) -> Result<R, DeviceError> {
        let password = TpmsAuthCommand {
            session_handle: TpmRh::Pw.value().into(),
            session_attributes: TpmaSession::CONTINUE_SESSION,
            ..TpmsAuthCommand::default()
        };
        self.exchange(command, TpmSt::Sessions, &[password])
    }

    fn exchange<C: TpmFrame, R: TpmUnmarshalBody>(
        &mut self,
        command: &C,
        tag: TpmSt,
        sessions: &[TpmsAuthCommand],
    ) -> Result<R, DeviceError> {
        let code = command.cc();
        let unreadable = |source| DeviceError::Answer {
            command: code,
            source,
        };
        let mut buffer = [0; TPM_MAX_COMMAND_SIZE];
        let mut writer = TpmWriter::new(&mut buffer);
        tpm_marshal_command(command, tag, sessions, &mut writer).map_err(unreadable)?;
        for attempt in 0.. {
            let answer = self.transfer(writer.as_bytes());
            let answer = answer.map_err(|source| DeviceError::Io {
                path: self.path.clone(),
                source,
            })?;
            let response = TpmResponse::cast(&answer).map_err(unreadable)?;
            match response.rc().map_err(unreadable)? {
                TpmRc::Fmt0(TpmRcBase::Success) => return response.unmarshal().map_err(unreadable),
                TpmRc::Warn(TpmRcBase::Retry | TpmRcBase::Testing | TpmRcBase::Yielded)
                    if attempt < RETRIES =>
                {
                    std::thread::sleep(RETRY_AFTER);
                }
                refusal => {
                    return Err(DeviceError::Refused {
                        command: code,
                        code: refusal,
                    });
                }
            }
        }
        unreachable!("the last attempt returns")
    }

    fn transfer(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed answer");
        self.channel.write_all(command)?;
        let mut answer = vec![0; TPM_MAX_COMMAND_SIZE];
        let mut filled = 0;
        loop {
            // The kernel gives the whole answer at once, a socket perhaps in pieces.
            let read = self.channel.read(&mut answer[filled..])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += read;
            let Some(size) = answer[..filled].get(2..6) else {
                continue;
            };
            let size = u32::from_be_bytes(size.try_into().map_err(|_| malformed())?);
            let size = usize::try_from(size).map_err(|_| malformed())?;
            if size > answer.len() || filled > size {
                return Err(malformed());
            }
            if filled == size {
                answer.truncate(size);
                return Ok(answer);
            }
        }
    }
}

/// Time limit for an answer of a TPM in software. The kernel has limits of its own for the others.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(30);
const RETRIES: u32 = 20;
const RETRY_AFTER: Duration = Duration::from_millis(50);
