//! Reads streams at the same time and prints how many tokens came in how many seconds, as
//! a line of JSON: `throughput ADDRESS MODEL STREAMS TOKENS`.

use std::{env::args, time::Instant};

use lowbit::{
    v1::{GenerateRequest, Stopping},
    Client, Options,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = args().skip(1).collect();
    let [address, model, streams, tokens] = arguments.as_slice() else {
        return Err("throughput ADDRESS MODEL STREAMS TOKENS".into());
    };
    let (streams, tokens) = (streams.parse()?, tokens.parse()?);
    let client = Client::new(address, Options::default())?;
    read(client.clone(), model.clone(), 1).await?; // connects
    let began = Instant::now();
    let reads: Vec<_> = (0..streams)
        .map(|_: u32| tokio::spawn(read(client.clone(), model.clone(), tokens)))
        .collect();
    let mut sum = 0;
    for read in reads {
        sum += read.await??;
    }
    println!("{{\"tokens\": {sum}, \"seconds\": {}}}", began.elapsed().as_secs_f64());
    Ok(())
}

async fn read(client: Client, model: String, tokens: u32) -> lowbit::Result<u32> {
    let stopping =
        Stopping { max_tokens: Some(tokens), ignore_eos: Some(true), ..Default::default() };
    let mut stream = client
        .generate(GenerateRequest { stopping: Some(stopping), ..(&*model, "measure").into() });
    while let Some(chunk) = stream.next().await {
        chunk?;
    }
    let usage = stream.completed().and_then(|completed| completed.usage).unwrap_or_default();
    Ok(usage.output_tokens)
}
