//! What the conformance suite cannot see: leaks, dropped streams, refused options, examples.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::LazyLock,
    time::Duration,
};

use lowbit::{
    v1::{GenerateRequest, Sampling, Stopping, WatchRuntimeRequest},
    Client, Kind, Options, Tls,
};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// A real server with the scripted models smollm2 and slow; it ends with this process.
static SERVER: LazyLock<(String, Child)> = LazyLock::new(|| {
    let mut server = Command::new(Path::new(ROOT).join(".venv/bin/python"))
        .args([
            "-m",
            "tests.conformance.serve",
            r#"smollm2={"step_ms":1}"#,
            r#"slow={"step_ms":5}"#,
        ])
        .current_dir(ROOT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("make sets the environment up");
    let mut address = String::new();
    let output = server.stdout.take().expect("a pipe");
    BufReader::new(output).read_line(&mut address).expect("a line");
    (address.trim().to_owned(), server)
});

fn connect() -> Client {
    Client::new(&SERVER.0, Options::default()).expect("the defaults make sense")
}

fn endless(model: &str) -> GenerateRequest {
    let stopping = Stopping { ignore_eos: Some(true), ..Default::default() };
    GenerateRequest { stopping: Some(stopping), ..(model, "Once upon a time").into() }
}

/// Waits until the request of a name no longer runs; the server shows only numbers.
async fn idle(client: &Client) {
    let interval = Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 });
    let mut snapshots = client.watch_runtime(WatchRuntimeRequest { interval });
    while snapshots.next().await.expect("no end").expect("a snapshot").admitted_requests > 0 {}
}

async fn tasks_end() {
    let metrics = tokio::runtime::Handle::current().metrics();
    let ended = async {
        while metrics.num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ended).await.expect("no task is left");
}

/// One test, because each part waits until the server is idle.
#[tokio::test]
async fn leaving_a_stream_frees_the_slot_and_leaves_no_task() {
    let client = connect();
    let other = connect();

    let mut dropped = client.generate(endless("slow"));
    dropped.next().await.expect("a chunk").expect("no failure");
    drop(dropped);
    idle(&other).await;

    let mut cancelled = client.generate(endless("slow"));
    cancelled.next().await.expect("a chunk").expect("no failure");
    cancelled.canceller().cancel(); // though nobody reads on
    idle(&other).await;
    let error = cancelled.next().await.expect("an error").expect_err("an error");
    assert_eq!((error.kind, &*error.reason), (Kind::Cancelled, ""));
    assert!(cancelled.next().await.is_none());
    assert_eq!(cancelled.partial_text(), "O");

    let mut waiting = client.generate(endless("slow"));
    let canceller = waiting.canceller();
    let reading = tokio::spawn(async move { waiting.text().await.map(str::to_owned) });
    canceller.cancel();
    let error = reading.await.expect("no panic").expect_err("an error");
    assert!(error.is(Kind::Cancelled));
    idle(&other).await;

    let mut running = client.generate(endless("slow"));
    running.next().await.expect("a chunk").expect("no failure");
    client.close(); // though nobody reads on
    idle(&other).await;
    assert!(running.next().await.expect("an error").expect_err("an error").is(Kind::Cancelled));
    assert!(client.devices().await.expect_err("closed").is(Kind::Cancelled));

    other.close();
    tasks_end().await;
    drop((client, other));
}

#[tokio::test]
async fn dropping_everything_leaves_no_task() {
    let client = connect();
    let mut stream = client.generate(endless("smollm2"));
    stream.next().await.expect("a chunk").expect("no failure");
    drop((client, stream));
    tasks_end().await;
}

#[tokio::test]
async fn each_output_has_its_text_and_its_end() {
    let sampling = Some(Sampling { n: Some(2), ..Default::default() });
    let stopping = Some(Stopping { max_tokens: Some(3), ..Default::default() });
    let request = GenerateRequest { sampling, stopping, ..("smollm2", "abc").into() };
    let mut stream = connect().generate(request);
    assert_eq!((stream.partial_text(), stream.finished()), ("", None));
    assert_eq!(stream.texts().await.expect("texts"), ["abc", "bca"]);
    assert_eq!(stream.text().await.expect("text"), "abc");
    assert_eq!(stream.finished().map(|end| end.output_index), Some(0));
    assert_eq!(stream.all_finished()[&1].output_index, 1);
}

#[tokio::test]
async fn a_deadline_ends_a_stream() {
    let client = connect().with_timeout(Duration::from_millis(200));
    let mut stream = client.generate(endless("slow"));
    let error = stream.text().await.expect_err("an error");
    assert_eq!(error.kind, Kind::DeadlineExceeded);
    assert!(stream.partial_text().starts_with("Once"));
}

#[tokio::test]
async fn options_that_make_no_sense_are_refused() {
    let default = Options::default;
    let token = Some("secret".to_owned());
    let half = Tls { certificate: Some("certificate".into()), ..Default::default() };
    for (name, address, options) in [
        ("call_timeout", "", Options { call_timeout: Duration::ZERO, ..default() }),
        ("stream_timeout", "", Options { stream_timeout: Some(Duration::ZERO), ..default() }),
        ("max_attempts", "", Options { max_attempts: 0, ..default() }),
        ("max_message_bytes", "", Options { max_message_bytes: 0, ..default() }),
        ("key", "", Options { tls: Some(half), ..default() }),
        ("token", "lowbit.example:50151", Options { token: token.clone(), ..default() }),
        ("token", "localhost.example:50151", Options { token: token.clone(), ..default() }),
        ("token", "", Options { token: Some("two\nlines".into()), ..default() }),
        ("token", "", Options { token: Some("two words".into()), ..default() }),
        ("token", "", Options { token: Some("garçon".into()), ..default() }),
        ("token", "", Options { token: Some("a=b".into()), ..default() }),
        ("token", "", Options { token: Some("=".into()), ..default() }),
        ("token", "", Options { token: Some(String::new()), ..default() }),
    ] {
        let error = Client::new(address, options).err().expect(name);
        assert!(error.kind == Kind::InvalidOptions && error.message.contains(name), "{error}");
        assert!(!error.message.contains("secret"));
    }
    for address in ["127.0.0.2:1", "localhost:1", "[::1]:1"] {
        Client::new(address, Options { token: token.clone(), ..default() }).expect(address);
    }
    let every = Some("aZ09._~+/-==".to_owned());
    Client::new("", Options { token: every, ..default() }).expect("a token");
    assert!(!format!("{:?}", Options { token, ..default() }).contains("secret"));
}

#[test]
fn a_client_needs_a_runtime() {
    assert_eq!(
        Client::new("", Options::default()).err().map(|e| e.kind),
        Some(Kind::InvalidOptions)
    );
}

#[tokio::test]
async fn errors_are_one_line_without_the_prompt() {
    let wrong = GenerateRequest { request_id: "no id\n".into(), ..("smollm2", "my secret").into() };
    let error = connect().generate(wrong).text().await.map(str::to_owned).expect_err("an error");
    let line = error.to_string();
    assert!(line.starts_with("INVALID_FIELD: ") && line.lines().count() == 1, "{line}");
    assert!(!format!("{error:?}").contains("secret"));
    assert_eq!(error.violations[0].field, "request_id");
}

/// Runs an example and returns what it printed.
fn printed(example: &str, arguments: &[&str]) -> String {
    let deps: PathBuf = env::current_exe().expect("a path");
    let folder = deps.ancestors().nth(2).expect("the profile's folder").join("examples");
    let mut program = Command::new(folder.join(example));
    let output = program.args(arguments).env("LOWBIT_ADDRESS", &SERVER.0).output().expect(example);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{example}: {told}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn the_quick_start_runs_as_printed() {
    let readme = fs::read_to_string(format!("{ROOT}/client/rust/README.md")).expect("a README");
    let source = fs::read_to_string(format!("{ROOT}/client/rust/examples/quickstart.rs"));
    let source = source.expect("an example");
    let (_, block) = readme.split_once("```rust,no_run\n").expect("a block");
    let (block, _) = block.split_once("```").expect("its end");
    assert_eq!(source.split_once("\n\n").expect("a comment").1, block);
    let text = printed("quickstart", &[]);
    assert!(text.starts_with("Once upon a timeOnce upon"), "{text}");
}

#[test]
fn the_examples_do_what_they_say() {
    let text = printed("chat", &["smollm2", "hello"]);
    assert!(text.contains("<user>hello") && text.ends_with("\n200 tokens\n"), "{text}");
    let text = printed("cancel", &["slow"]);
    assert_eq!(text, "Once \nleft early\ncancelled\n");
    let text = printed("errors", &[]);
    assert_eq!(text.matches("MODEL_NOT_FOUND").count(), 2, "{text}");
    assert!(text.contains("sampling.temperature: ") && text.contains("sampling.top_p: "), "{text}");
    let text = printed("throughput", &[&SERVER.0, "smollm2", "4", "50"]);
    assert!(text.starts_with(r#"{"tokens": 200, "seconds": "#), "{text}");
}

#[test]
fn the_version_is_that_of_the_python_client() {
    let project = fs::read_to_string(format!("{ROOT}/client/python/pyproject.toml"));
    let version = format!("version = \"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(project.expect("a project").contains(&version));
}
