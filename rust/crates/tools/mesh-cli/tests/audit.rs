//! `hydramesh audit` on a trail on this machine, as a process.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mesh_audit::home::{Lock, Tier};
use mesh_audit::kept::{Keeper, SHOWN, ShownEpochs};
use mesh_audit::keys::Identity;
use mesh_audit::record::Event;
use mesh_audit::store::Limits;
use mesh_audit::writer::{Audit, Settings};
use mesh_net::trust::{Applicant, DenyList, MeshRoot, NodeIdentity, Role, Subject, Validity};
use serde_json::Value;
use tempfile::TempDir;

/// A head's state folder with a trail, and room for files.
struct Home(TempDir);

impl Home {
    fn new(names: &[&str]) -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        let audit = Audit::start(&home.path("state/audit"), Settings::default(), None).unwrap();
        for name in names {
            let event = Event::Leave {
                node: "ab12".into(),
                name: name.into(),
                reason: "it was sold".into(),
            };
            audit.record(Tier::Master, event.clone());
            audit.record(Tier::GrimoirePublic, event);
        }
        audit.stop();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hydramesh"))
            .arg("audit")
            .args(arguments)
            .arg("--state-dir")
            .arg(self.path("state"))
            .current_dir(self.0.path())
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn output(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn failure(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {output:?}"
        );
        String::from_utf8(output.stderr).unwrap() + &String::from_utf8(output.stdout).unwrap()
    }
}

fn change(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_trail_is_verified_shown_exported_and_proven() {
    let home = Home::new(&["attic", "barn"]);
    let told = home.output(&["verify"]);
    assert!(
        told.contains("master: hydramesh/audit/master/") && told.contains("4 records"),
        "{told}"
    );
    assert_eq!(told.matches("as it was signed").count(), 2, "{told}");
    let shown = home.output(&["show", "--tier", "master", "--kind", "leave", "--last", "1"]);
    assert!(
        shown.starts_with("2  20")
            && shown.contains("name=barn")
            && shown.contains("reason=it was sold"),
        "{shown}"
    );
    let json: Value = serde_json::from_str(&home.output(&[
        "show",
        "--tier",
        "grimoire-public",
        "--last",
        "1",
        "--json",
    ]))
    .unwrap();
    assert_eq!(
        (&json["n"], &json["name"]),
        (&Value::from(1), &Value::from("barn"))
    );

    home.output(&["export", "out"]);
    let verified = [
        "verify",
        "--trail",
        "out",
        "--key",
        "out/master/keys",
        "--key",
        "out/grimoire-public/keys",
        "--since",
        "out/master/checkpoint",
        "--tier",
        "master",
    ];
    home.output(&verified);
    home.failure(&["export", "out"], 1);
    let proof = home.output(&["prove", "1", "--tier", "master"]);
    std::fs::write(home.path("proof"), &proof).unwrap();
    let check = ["prove", "--check", "proof", "--key", "out/master/keys"];
    assert!(home.output(&check).contains("name=attic"));
    std::fs::write(home.path("proof"), proof.replacen("index 1", "index 2", 1)).unwrap();
    home.failure(&check, 1);
    home.failure(&["prove", "1"], 2);
    home.failure(&["prove", "99", "--tier", "master"], 1);

    change(&home.path("out/master/tile/entries/000.p/4"), 40);
    let told = home.failure(&["verify", "--trail", "out"], 1);
    assert!(
        told.contains("tile/entries/000.p/4")
            && told.contains("record 0")
            && told.contains("1 place"),
        "{told}"
    );
    let json = home.run(&["verify", "--trail", "out", "--json"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json[1]["findings"][0]["records"], serde_json::json!([0, 0]));
    let nothing = home.failure(&["verify", "--trail", "nowhere"], 1);
    assert!(nothing.contains("holds no audit trail"), "{nothing}");
}

#[test]
fn a_trail_is_compared_with_the_epochs_that_a_worker_kept() {
    let home = Home::new(&["laptop"]);
    home.output(&["key", "--tier", "master", "chain.key"]);
    let folder = Lock::take(&home.path("state/audit")).unwrap();
    let opened = folder.open(Tier::Master, "mesh", None, Limits::default(), 0);
    let store = opened.unwrap().store;
    let shown = ShownEpochs {
        tier: Tier::Master,
        trail: store.origin().to_owned(),
        epochs: store.ended_epochs(SHOWN).unwrap(),
    };
    drop((store, folder));
    std::fs::create_dir(home.path("worker")).unwrap();
    let mut keeper = Keeper::open(&home.path("worker"));
    let (name, value) = (shown.record_name(), shown.to_value());
    assert_eq!(keeper.take("aa", 1, (name.as_bytes(), &value)), []);
    keeper.unsaved().unwrap().write();
    let text = home.output(&["verify", "--tier", "master", "--epochs", "worker"]);
    assert!(
        text.contains("compared with 1 epochs that nodes kept"),
        "{text}"
    );

    let kept = home.path("worker/audit-epochs.json").display().to_string();
    let other = Home::new(&["laptop"]);
    let arguments = ["verify", "--tier", "master", "--epochs", &kept];
    let text = other.failure(&arguments, 1);
    assert!(text.contains("of head aa, which is another one"), "{text}");
}

#[test]
fn keys_of_the_chain_witnesses_and_merges_are_checked() {
    let home = Home::new(&["attic"]);
    home.output(&["key", "chain", "--tier", "master"]);
    home.failure(&["key", "chain", "--tier", "master"], 2);
    let told = home.output(&["verify", "--chain-key", "chain"]);
    assert!(told.contains("1 epochs signed"), "{told}");
    let told = home.output(&[
        "cosign",
        "--tier",
        "master",
        "--name",
        "barn/witness",
        "--witness-dir",
        "witness",
    ]);
    std::fs::write(home.path("cosigned"), &told).unwrap();
    home.output(&["cosign", "--tier", "master", "--keep", "cosigned"]);
    let again = home.run(&[
        "cosign",
        "--tier",
        "master",
        "--name",
        "barn/witness",
        "--witness-dir",
        "witness",
    ]);
    let key = String::from_utf8(again.stderr).unwrap();
    let key = key.trim().rsplit(' ').next().unwrap();
    std::fs::write(home.path("witness.key"), key).unwrap();
    let told = home.output(&["verify", "--witness", "witness.key"]);
    assert!(told.contains("records cosigned by barn/witness"), "{told}");

    let other = Home::new(&["cellar", "roof"]);
    other.output(&["export", "out"]);
    let other_trail = other.path("out/master");
    let other_trail = other_trail.to_str().unwrap();
    home.output(&["merge", other_trail, "--tier", "master"]);
    let told = home.output(&["verify", "--tier", "master", "--merged", other_trail]);
    assert!(
        told.contains("binds a head that is in the other trail"),
        "{told}"
    );
    let running = Audit::start(&home.path("state/audit"), Settings::default(), None).unwrap();
    let told = home.failure(&["key", "another", "--tier", "master"], 1);
    assert!(told.contains("another process writes"), "{told}");
    home.output(&["verify"]);
    running.stop();
}

/// A head of a mesh, whose identity endorses a trail.
struct Head(NodeIdentity);

impl Head {
    fn of(root: &MeshRoot, dir: &Path) -> Self {
        let applicant = Applicant::open(dir).unwrap();
        let subject = Subject {
            request: &applicant.request().unwrap(),
            name: "head",
            role: Role::Head,
            identity: applicant.public_key(),
        };
        let now = std::time::SystemTime::now();
        let issued = root.issue(&subject, &Validity::default(), now).unwrap();
        let deny_list = DenyList::open(dir).unwrap();
        Self(NodeIdentity::store(dir, applicant, issued, deny_list).unwrap())
    }
}

impl Identity for Head {
    fn public_key(&self) -> Vec<u8> {
        self.0.public_key().unwrap().as_bytes().to_vec()
    }

    fn sign(&self, context: &'static [u8], message: &[u8]) -> Vec<u8> {
        self.0.identity_key().unwrap().sign(context, message)
    }

    fn document(&self) -> Option<Vec<u8>> {
        self.0.papers()
    }
}

#[test]
fn verification_tells_which_head_endorses_a_trail_and_which_root_signed_that_heads_document() {
    let home = Home::new(&["attic"]);
    let told = home.output(&["verify"]);
    assert!(told.contains("keys not endorsed by a node"), "{told}");
    let roots = ["attic", "barn"].map(|mesh| {
        let root = MeshRoot::load_or_create(&home.path(mesh), mesh).unwrap();
        let head = Head::of(&root, &home.path(mesh));
        (root, head)
    });
    let [(root, head), _] = roots;
    let id = head.0.node_id();
    let audit = home.path("state/audit");
    let audit = Audit::start(&audit, Settings::default(), Some(Box::new(head))).unwrap();
    audit.stop();

    let master = ["--tier", "master"];
    let verify = |more: &[&'static str]| [&["verify"], &master[..], more].concat();
    let digest: String = root
        .sha256()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let told = home.output(&verify(&[]));
    for part in [
        format!("keys endorsed by node {id}"),
        "the head head of the mesh attic".to_owned(),
        format!("signed by the mesh root {digest} (not compared"),
    ] {
        assert!(told.contains(&part), "{part} is not in {told}");
    }
    let told = home.output(&verify(&["--root", "attic/root.crt"]));
    assert!(told.contains("the one that was given"), "{told}");
    let shown = home.output(&verify(&["--json"]));
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown[0]["endorsed"]["node"], id);
    assert_eq!(shown[0]["endorsed"]["document"]["root"], digest);

    // Another mesh's root, another head's document, and a changed one.
    let told = home.failure(&verify(&["--root", "barn/root.crt"]), 1);
    assert!(told.contains("another mesh root signed it"), "{told}");
    let told = home.failure(&verify(&["--document", "barn/identity.doc"]), 1);
    assert!(told.contains("it is about"), "{told}");
    home.output(&["export", "exported"]);
    let exported =
        |more: &[&'static str]| [&["verify", "--trail", "exported/master"], more].concat();
    home.output(&exported(&["--root", "attic/root.crt"]));
    let document = home.path("exported/master/identity.doc");
    change(&document, 3000);
    let told = home.failure(&exported(&[]), 1);
    assert!(told.contains("WRONG identity.doc"), "{told}");
    std::fs::remove_file(document).unwrap();
    let told = home.output(&exported(&[]));
    assert!(told.contains("without a document"), "{told}");
    let told = home.failure(&exported(&["--root", "attic/root.crt"]), 1);
    assert!(told.contains("there is no document"), "{told}");
    home.output(&exported(&[
        "--root",
        "attic/root.crt",
        "--document",
        "attic/identity.doc",
    ]));
}
