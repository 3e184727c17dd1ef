use std::net::SocketAddr;
use std::time::Duration;

use super::*;

#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    state_dir: PathBuf,
    models: Vec<String>,
    threads: Option<usize>,
    token: String,
    #[serde(with = "units::duration")]
    timeout: Duration,
    #[serde(with = "units::optional_bytes")]
    kv_memory: Option<u64>,
    mode: Mode,
    http: Http,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    Fast,
    Careful,
}

#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Http {
    listen: SocketAddr,
    open: bool,
    ratio: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/hydramesh/test".into(),
            models: Vec::new(),
            threads: None,
            token: String::new(),
            timeout: Duration::from_secs(10),
            kv_memory: None,
            mode: Mode::Fast,
            http: Http::default(),
        }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 8080).into(),
            open: false,
            ratio: 0.5,
        }
    }
}

fn loader() -> Loader<Config> {
    Loader::new("test").environment::<&str, &str>([])
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    std::fs::write(file.path(), text).expect("write temporary file");
    file
}

fn error_of(loader: Loader<Config>) -> String {
    loader.load().expect_err("must be refused").to_string()
}

#[test]
fn without_any_layer_the_defaults_hold() {
    let loaded = loader().load().expect("defaults");
    assert_eq!(loaded.value, Config::default());
    assert_eq!(loaded.file, None);
}

#[test]
fn each_layer_overrides_the_one_below() {
    let file =
        file("mode = \"careful\"\nmodels = [\"a\"]\n[http]\nlisten = \"127.0.0.1:1\"\nratio = 1\n");
    let environment = [
        ("TEST_PORT", "127.0.0.1:2"),
        ("HYDRAMESH_TEST__MODELS", "b, c"),
        ("HYDRAMESH_OTHER__X", "1"),
    ];
    let below = || {
        loader()
            .file(file.path())
            .env("TEST_PORT", "http.listen")
            .environment(environment)
    };

    let value = below().load().expect("file and environment").value;
    assert_eq!(value.mode, Mode::Careful);
    assert_eq!(value.models, ["b", "c"]);
    assert_eq!(value.http.listen.port(), 2);
    assert_eq!(value.http.ratio, 1.0);

    let value = below()
        .flag("--http", "http.listen", Some("127.0.0.1:3"))
        .load()
        .expect("flag")
        .value;
    assert_eq!(value.http.listen.port(), 3);
    assert_eq!(value.mode, Mode::Careful);
}

#[test]
fn the_generic_variable_wins_over_the_named_one_in_any_order() {
    let named = ("TEST_PORT", "127.0.0.1:2");
    let generic = ("HYDRAMESH_TEST__HTTP__LISTEN", "127.0.0.1:4");
    for variables in [[named, generic], [generic, named]] {
        let loaded = loader()
            .env("TEST_PORT", "http.listen")
            .environment(variables)
            .load()
            .expect("environment");
        assert_eq!(loaded.value.http.listen.port(), 4);
    }
}

#[test]
fn text_is_read_as_the_type_of_its_key() {
    let args = CommonArgs {
        set: [
            "threads=4",
            "http.open=true",
            "http.ratio=2",
            "timeout=250ms",
            "kv_memory=1GiB",
            "mode=careful",
            "models=[\"x,y\", \"z\"]",
            "token=123",
        ]
        .map(String::from)
        .to_vec(),
        state_dir: Some("/tmp/state".into()),
        ..CommonArgs::default()
    };
    let value = loader().common(&args).load().expect("flags").value;
    let expected = Config {
        state_dir: "/tmp/state".into(),
        models: vec!["x,y".into(), "z".into()],
        threads: Some(4),
        token: "123".into(),
        timeout: Duration::from_millis(250),
        kv_memory: Some(1 << 30),
        mode: Mode::Careful,
        http: Http {
            open: true,
            ratio: 2.0,
            ..Http::default()
        },
    };
    assert_eq!(value, expected);
}

#[test]
fn empty_text_unsets_an_optional_key_and_empty_variables_count_as_unset() {
    let file = file("threads = 3\n");
    let unset = loader()
        .file(file.path())
        .flag("--threads", "threads", Some(""))
        .load()
        .expect("empty flag");
    assert_eq!(unset.value.threads, None);
    let kept = loader()
        .file(file.path())
        .environment([("HYDRAMESH_TEST__THREADS", "")])
        .load()
        .expect("empty variable");
    assert_eq!(kept.value.threads, Some(3));
}

/// `limit` is the old name of `timeout`, `web` of the table `http`, `port` of the port in `http.listen`.
fn with_old_names() -> Loader<Config> {
    loader()
        .renamed("limit", "timeout")
        .renamed("web", "http")
        .renamed("port", "http.listen:port")
}

#[test]
fn old_names_of_keys_work_in_every_layer_with_a_warning() {
    let file = file("limit = \"1s\"\nport = 1\n\n[web]\nopen = true\nratio = 2\n");
    let loaded = with_old_names().file(file.path()).load().expect("file");
    let expected = Config {
        timeout: Duration::from_secs(1),
        http: Http {
            listen: ([127, 0, 0, 1], 1).into(),
            open: true,
            ratio: 2.0,
        },
        ..Config::default()
    };
    assert_eq!(loaded.value, expected);
    let path = file.path().display();
    let warnings = [
        format!("`limit` ({path}, line 1) is an old name: use `timeout`"),
        format!("`web` ({path}, line 4) is an old name: use `http`"),
        format!("`port` ({path}, line 2) is an old name: set the port in `http.listen`"),
    ];
    assert_eq!(loaded.warnings, warnings);

    let variables = [
        ("HYDRAMESH_TEST__LIMIT", "2s"),
        ("HYDRAMESH_TEST__WEB__RATIO", "3"),
        ("HYDRAMESH_TEST__PORT", "2"),
    ];
    let loaded = with_old_names()
        .file(file.path())
        .environment(variables)
        .load()
        .expect("environment");
    assert_eq!(loaded.value.timeout, Duration::from_secs(2));
    assert_eq!(
        (loaded.value.http.ratio, loaded.value.http.open),
        (3.0, true)
    );
    assert_eq!(loaded.value.http.listen.port(), 2);
    assert_eq!(loaded.warnings.len(), 6);

    let args = CommonArgs {
        set: ["limit=3s", "web.ratio=4", "port=3"]
            .map(String::from)
            .to_vec(),
        ..CommonArgs::default()
    };
    let loaded = with_old_names().common(&args).load().expect("flags");
    assert_eq!(loaded.value.timeout, Duration::from_secs(3));
    assert_eq!(loaded.value.http.ratio, 4.0);
    assert_eq!(loaded.value.http.listen, ([127, 0, 0, 1], 3).into());
    assert_eq!(
        loaded.warnings[0],
        "`limit` (flag --set) is an old name: use `timeout`"
    );

    let loaded = loader()
        .old_flag("--address", "--http", "http.listen", Some("127.0.0.1:4"))
        .load()
        .expect("old flag");
    assert_eq!(loaded.value.http.listen.port(), 4);
    assert_eq!(loaded.warnings, ["--address is an old name: use --http"]);
}

#[test]
fn the_new_name_of_a_key_wins_within_a_layer_and_the_later_layer_wins_by_any_name() {
    let file = file("limit = \"1s\"\ntimeout = \"2s\"\nhttp.ratio = 1\nweb.ratio = 2\n");
    let value = |variables: &[(&str, &str)]| {
        let loader = with_old_names().file(file.path());
        loader
            .environment(variables.to_vec())
            .load()
            .expect("good")
            .value
    };
    assert_eq!(value(&[]).timeout, Duration::from_secs(2));
    assert_eq!(value(&[]).http.ratio, 1.0);
    let (old, new) = (
        ("HYDRAMESH_TEST__LIMIT", "3s"),
        ("HYDRAMESH_TEST__TIMEOUT", "4s"),
    );
    assert_eq!(value(&[old]).timeout, Duration::from_secs(3));
    assert_eq!(value(&[new, old]).timeout, Duration::from_secs(4));
}

#[test]
fn a_variable_of_a_key_adds_to_one_of_its_table_in_any_order_and_by_its_old_name_too() {
    let table = ("HYDRAMESH_TEST__HTTP", "{ ratio = 2, open = false }");
    for name in ["HYDRAMESH_TEST__HTTP__OPEN", "HYDRAMESH_TEST__OPEN"] {
        let key = (name, "true");
        for variables in [[table, key], [key, table]] {
            let loaded = loader()
                .renamed("open", "http.open")
                .environment(variables)
                .load()
                .expect("environment");
            let http = loaded.value.http;
            assert_eq!((http.open, http.ratio), (true, 2.0), "{variables:?}");
        }
    }
}

#[test]
fn a_port_variable_keeps_the_address_that_is_set() {
    let value = |text: &str, variables: &[(&str, &str)]| {
        let file = file(text);
        let loader = loader().file(file.path()).env("PORT", "http.listen:port");
        let loaded = loader.environment(variables.to_vec()).load();
        loaded.map(|loaded| loaded.value.http.listen.to_string())
    };
    let port = ("PORT", " 9 ");
    let listen = ("HYDRAMESH_TEST__HTTP__LISTEN", "[::1]:7");
    assert_eq!(value("", &[port]).expect("default"), "127.0.0.1:9");
    let file = "http.listen = \"[::]:8\"";
    assert_eq!(value(file, &[port]).expect("file"), "[::]:9");
    assert_eq!(value(file, &[port, listen]).expect("both"), "[::1]:9");
    let error = value("", &[("PORT", "many")]).expect_err("not a port");
    assert!(
        error
            .to_string()
            .starts_with("`http.listen` (environment variable PORT): "),
        "{error}"
    );
}

#[test]
fn an_old_name_of_a_port_may_be_empty_and_is_named_when_it_is_no_port() {
    let load = |text: &str| {
        let file = file(text);
        with_old_names().file(file.path()).load()
    };
    let loaded = load("port = \"\"").expect("not set");
    assert_eq!(loaded.value, Config::default());
    assert_eq!(loaded.warnings.len(), 1);
    for text in ["port = [9]", "[port]\nhttp = 9"] {
        let error = load(text).expect_err("not a port").to_string();
        assert!(error.starts_with("`port` ("), "{error}");
        assert!(error.ends_with("line 1): expected a port"), "{error}");
    }
}

#[test]
fn an_unknown_key_in_a_file_is_named_with_its_line_and_the_nearest_key() {
    let file = file("mode = \"fast\"\n\n[http]\nlisen = \"127.0.0.1:1\"\n");
    let message = error_of(loader().file(file.path()));
    let expected = format!(
        "unknown key `http.lisen` ({}, line 4); did you mean `http.listen`?",
        file.path().display()
    );
    assert_eq!(message, expected);
}

#[test]
fn an_unknown_key_in_the_environment_or_a_flag_names_the_variable_or_the_flag() {
    let message = error_of(loader().environment([("HYDRAMESH_TEST__HTTP__OPNE", "true")]));
    assert_eq!(
        message,
        "unknown key `http.opne` (environment variable HYDRAMESH_TEST__HTTP__OPNE); did you mean `http.open`?"
    );
    let message = error_of(loader().flag("--set", "listen", Some("x")));
    assert_eq!(
        message,
        "unknown key `listen` (flag --set); did you mean `http.listen`?"
    );
    let message = error_of(loader().flag("--set", "http.colour_of_sky", Some("x")));
    assert_eq!(
        message,
        "unknown key `http.colour_of_sky` (flag --set); valid keys here: http.listen, http.open, http.ratio"
    );
}

#[test]
fn a_value_of_the_wrong_type_names_key_origin_and_expectation() {
    let file = file("[http]\nlisten = 8080\n");
    let message = error_of(loader().file(file.path()));
    assert!(message.starts_with("`http.listen` ("), "{message}");
    assert!(
        message.contains("line 2") && message.contains("socket address"),
        "{message}"
    );

    let message = error_of(loader().environment([("HYDRAMESH_TEST__THREADS", "many")]));
    assert!(
        message.contains("`threads` (environment variable HYDRAMESH_TEST__THREADS)"),
        "{message}"
    );
    assert!(message.contains("got `many`"), "{message}");

    let message = error_of(loader().flag("--set", "mode", Some("slow")));
    assert!(
        message.contains("`mode` (flag --set)") && message.contains("careful"),
        "{message}"
    );

    let message = error_of(loader().flag("--set", "timeout", Some("soon")));
    assert!(
        message.contains("invalid duration \"soon\": use"),
        "{message}"
    );

    let message = error_of(loader().flag("--set", "http", Some("x")));
    assert!(message.contains("`http"), "{message}");
}

#[test]
fn a_file_that_is_missing_or_no_toml_is_named() {
    let message = error_of(loader().file("/nonexistent/test.toml"));
    assert!(message.contains("/nonexistent/test.toml"), "{message}");
    let file = file("mode = \n");
    let message = error_of(loader().file(file.path()));
    assert!(
        message.contains(&file.path().display().to_string()) && message.contains("line 1"),
        "{message}"
    );
    let args = CommonArgs {
        set: vec!["threads".into()],
        ..CommonArgs::default()
    };
    assert_eq!(
        error_of(loader().common(&args)),
        "--set takes KEY=VALUE, got `threads`"
    );
}

#[test]
fn the_printed_configuration_hides_secrets_and_reads_back() {
    let loaded = loader()
        .flag("--set", "token", Some("hunter2"))
        .load()
        .expect("flags");
    let printed = loaded.to_toml().expect("printable");
    assert!(!printed.contains("hunter2"), "{printed}");

    let file = file(
        &loader()
            .load()
            .expect("defaults")
            .to_toml()
            .expect("printable"),
    );
    assert_eq!(
        loader()
            .file(file.path())
            .load()
            .expect("printed file")
            .value,
        Config::default()
    );
}

proptest::proptest! {
    #[test]
    fn no_text_panics_the_loader(text: String, key in "[a-z.]{0,12}", value: String) {
        let file = file(&text);
        let _ = loader().file(file.path()).flag("--set", &key, Some(value)).load();
    }
}
