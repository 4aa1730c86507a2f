//! Quantizes a model to int8, loads the result and asks it:
//! `cargo run --example quantize-then-load SOURCE TARGET`.

use lowbit::{
    v1::{scheme, Int8Scheme, LoadPhase},
    Client, Options,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let source = arguments.next().ok_or("which model?")?;
    let target = arguments.next().ok_or("which new name?")?;
    let client = Client::new("", Options::default())?;

    let scheme = scheme::Kind::Int8(Int8Scheme::default());
    let job = client.quantize((&*source, &*target, scheme)).await?;
    let mut events = client.watch_job(job.id.clone());
    while let Some(event) = events.next().await {
        let job = event?.job.unwrap_or_default();
        let progress = job.progress.unwrap_or_default();
        println!("{:?} {:?} {}/{}", job.state(), progress.phase(), progress.done, progress.total);
    }
    let job = client.wait_job(job.id).await?; // fails with the job's own reason
    println!("made {}", job.model);

    let mut progress = client.load(target.clone());
    while let Some(message) = progress.next().await {
        let message = message?;
        println!("{:?} {:.0} %", message.phase(), message.fraction * 100.0);
        if message.phase() == LoadPhase::Live {
            println!("{} bytes on {}", message.live_bytes, message.device);
        }
    }
    let mut stream = client.generate((&*target, "The capital of France is"));
    println!("{}", stream.text().await?);
    Ok(())
}
