//! The quick start of README.md.

#[tokio::main]
async fn main() -> lowbit::Result<()> {
    let client = lowbit::Client::new("", lowbit::Options::default())?;
    let mut stream = client.generate(("smollm2", "Once upon a time"));
    while let Some(chunk) = stream.next().await {
        print!("{}", chunk?);
    }
    Ok(())
}
