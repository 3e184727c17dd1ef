//! HTTPS at the head: the command line, OpenSSL, and a certificate that is renewed while the head runs.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_testkit::Mesh;
use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::Value;

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(folder: &Path, name: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        std::fs::write(folder.join(name), issuer.pem())?;
        Ok(Self(issuer))
    }

    fn issue(&self, folder: &Path) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        // Of the same name as its authority it would pass for self-signed.
        params.distinguished_name.push(DnType::CommonName, "head");
        let certificate = params.signed_by(&key, &self.0)?;
        std::fs::write(folder.join("head.key"), key.serialize_pem())?;
        std::fs::write(folder.join("head.pem"), certificate.pem())?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_with_a_certificate_speaks_https_with_ml_kem_and_takes_a_renewed_one() -> Result<()>
{
    let folder = tempfile::tempdir()?;
    let files = folder.path();
    let (first, second) = (
        Authority::new(files, "first.pem")?,
        Authority::new(files, "second.pem")?,
    );
    first.issue(files)?;
    let config = format!(
        "[http.tls]\ncertificate_file = {:?}\nkey_file = {:?}",
        files.join("head.pem"),
        files.join("head.key")
    );
    let mesh = Mesh::builder()
        .workers(0)
        .head_config(&config)
        .start()
        .await?;
    let http = mesh.head.address("http")?;
    let launcher = mesh.launcher();
    let status = |authority: &str| -> Result<String> {
        let output = Command::new(launcher.binary("hydramesh"))
            .args(["status", "--url", &format!("https://{http}"), "--ca-file"])
            .arg(files.join(authority))
            .output()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok(format!("{} {text}", output.status.code().unwrap_or(-1)))
    };
    let seen = status("first.pem")?;
    ensure!(seen.contains("workers"), "{seen}");
    let refused = status("second.pem")?;
    ensure!(refused.contains("certificate"), "{refused}");
    // Health checks of this machine go on as they were.
    mesh.client()?.mesh().await?;

    second.issue(files)?;
    mesh.head.signal(Signal::SIGHUP)?;
    let reloaded = Instant::now();
    while !mesh.head.log().contains("HTTPS certificate") {
        ensure!(reloaded.elapsed() < Duration::from_secs(10), "no reload");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let seen = status("second.pem")?;
    ensure!(seen.contains("workers"), "{seen}");

    let Some(openssl) = openssl(http, &files.join("second.pem"))? else {
        println!("SKIPPED: OpenSSL with ML-KEM cannot be had here");
        return mesh.shutdown().await;
    };
    ensure!(openssl["hybrid"]["group"] == "X25519MLKEM768", "{openssl}");
    ensure!(openssl["hybrid"]["version"] == "TLSv1.3", "{openssl}");
    ensure!(openssl["hybrid"]["status"] == 200, "{openssl}");
    ensure!(openssl["classical"]["error"].is_string(), "{openssl}");
    mesh.shutdown().await
}

/// Findings of `scripts/openssl_client.py`; `None` where it cannot run.
fn openssl(head: SocketAddr, authority: &Path) -> Result<Option<Value>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(4);
    let script = root.context("a root")?.join("scripts/openssl_client.py");
    let output = Command::new("python3")
        .arg(script)
        .args([&head.to_string(), "/health"])
        .arg(authority)
        .output()?;
    if output.status.code() == Some(3) {
        return Ok(None);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}");
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}
