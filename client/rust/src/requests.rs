//! Short forms of requests with more than a name, for the common case.

use crate::v1::*;

impl From<&[(Role, &str)]> for Chat {
    fn from(messages: &[(Role, &str)]) -> Self {
        let message = |&(role, content): &(Role, &str)| ChatMessage {
            role: role.into(),
            content: content.into(),
        };
        Self { messages: messages.iter().map(message).collect(), ..Self::default() }
    }
}

impl<const N: usize> From<[(Role, &str); N]> for Chat {
    fn from(messages: [(Role, &str); N]) -> Self {
        messages.as_slice().into()
    }
}

/// Requests with a model and a text or a chat.
macro_rules! prompted {
    ($($request:ident $module:ident;)*) => { $(
        impl From<(&str, &str)> for $request {
            fn from((model, text): (&str, &str)) -> Self {
                let input = Some($module::Input::Text(text.into()));
                Self { model: model.into(), input, ..Self::default() }
            }
        }

        impl<C: Into<Chat>> From<(&str, C)> for $request {
            fn from((model, chat): (&str, C)) -> Self {
                let input = Some($module::Input::Chat(chat.into()));
                Self { model: model.into(), input, ..Self::default() }
            }
        }
    )* };
}

prompted! {
    GenerateRequest generate_request;
    TokenizeRequest tokenize_request;
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
