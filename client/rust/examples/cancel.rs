//! Leaves a stream early, by dropping it and from another task; the slot is free at once:
//! `cargo run --example cancel MODEL`.

use lowbit::{Client, Kind, Options};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("which model?")?;
    let client = Client::new("", Options::default())?;

    let mut stream = client.generate((&*model, "Once upon a time"));
    for _ in 0..5 {
        if let Some(chunk) = stream.next().await {
            print!("{}", chunk?);
        }
    }
    drop(stream);
    println!("\nleft early");

    let mut stream = client.generate((&*model, "Once upon a time"));
    let canceller = stream.canceller();
    tokio::spawn(async move { canceller.cancel() });
    match stream.text().await {
        Err(error) if error.is(Kind::Cancelled) => println!("cancelled"),
        other => println!("{other:?}"),
    }
    Ok(())
}
