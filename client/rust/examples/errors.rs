//! Shows that what goes wrong has a kind and a reason: `cargo run --example errors`.

use lowbit::{
    v1::{GenerateRequest, Sampling},
    Client, Kind, Options,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::new("", Options::default())?;

    let question = ("no-such-model", "hello");
    if let Err(error) = client.generate(question).text().await {
        match error.kind {
            Kind::ModelNotFound => println!("{error}"),
            _ if error.is(Kind::NotFound) => println!("something else is missing: {error}"),
            _ => return Err(error.into()),
        }
    }

    let sampling = Sampling { temperature: Some(-1.0), top_p: Some(2.0), ..Default::default() };
    let wrong = GenerateRequest { sampling: Some(sampling), ..question.into() };
    if let Err(error) = client.generate(wrong).text().await {
        for violation in &error.violations {
            println!("{}: {}", violation.field, violation.description);
        }
    }

    if let Err(error) = client.get_model("no-such-model").await {
        let after = error.retry_after; // the client has tried again by itself
        println!("{:?} {} {:?} {:?}", error.code, error.reason, error.metadata, after);
    }
    Ok(())
}
