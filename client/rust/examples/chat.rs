//! Streams a chat answer: `cargo run --example chat MODEL "question"`.

use std::io::Write;

use lowbit::{
    v1::{GenerateRequest, Role, Sampling, Stopping},
    Client, Options,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("which model?")?;
    let question = arguments.next().ok_or("which question?")?;
    let client = Client::new("", Options::default())?;

    let chat = (&*model, [(Role::User, &*question)]);
    let mut stream = client.generate(GenerateRequest {
        sampling: Some(Sampling { temperature: Some(0.7), seed: Some(1), ..Default::default() }),
        stopping: Some(Stopping { max_tokens: Some(200), ..Default::default() }),
        ..chat.into()
    });
    while let Some(chunk) = stream.next().await {
        print!("{}", chunk?);
        std::io::stdout().flush()?;
    }
    let usage = stream.completed().and_then(|completed| completed.usage).unwrap_or_default();
    println!("\n{} tokens", usage.output_tokens);
    Ok(())
}
