//! Short forms of requests with more than a name, for the common case.

use crate::v1::*;

/// Requests with a model and a text or a chat.
macro_rules! prompted {
    ($($request:ident $input:path;)*) => { $(
        impl From<(&str, &str)> for $request {
            fn from((model, text): (&str, &str)) -> Self {
                use $input as Input;
                let (model, input) = (model.into(), Some(Input::Text(text.into())));
                Self { model, input, ..Self::default() }
            }
        }
        impl From<(&str, &[(Role, &str)])> for $request {
            fn from((model, messages): (&str, &[(Role, &str)])) -> Self {
                use $input as Input;
                let message = |&(role, content): &(Role, &str)| ChatMessage { role: role.into(), content: content.into() };
                let messages = messages.iter().map(message).collect();
                let chat = Chat { messages, ..Chat::default() };
                Self { model: model.into(), input: Some(Input::Chat(chat)), ..Self::default() }
            }
        }
        impl<const N: usize> From<(&str, [(Role, &str); N])> for $request {
            fn from((model, messages): (&str, [(Role, &str); N])) -> Self {
                (model, messages.as_slice()).into()
            }
        }
    )* };
}

prompted! {
    GenerateRequest generate_request::Input;
    TokenizeRequest tokenize_request::Input;
}

impl From<(&str, &str)> for ImportModelRequest {
    /// The name of the new model and a path on the server.
    fn from((model, path): (&str, &str)) -> Self {
        let source = ModelSource { kind: Some(model_source::Kind::Path(path.into())) };
        Self { model: model.into(), source: Some(source), ..Self::default() }
    }
}

impl From<(&str, &str, scheme::Kind)> for QuantizeRequest {
    /// The source, the name of the new model and how its weights are stored.
    fn from((source, target, kind): (&str, &str, scheme::Kind)) -> Self {
        let scheme = Some(Scheme { kind: Some(kind) });
        Self { source: source.into(), target: target.into(), scheme, ..Self::default() }
    }
}
