//! Short forms of requests, for the common case.

use crate::v1::*;

/// Requests that need one name.
macro_rules! named {
    ($($request:ident.$field:ident)*) => { $(
        impl From<&str> for $request {
            fn from(name: &str) -> Self {
                name.to_owned().into()
            }
        }
        impl From<String> for $request {
            #[allow(clippy::needless_update)] // some have no other field
            fn from($field: String) -> Self {
                Self { $field, ..Self::default() }
            }
        }
    )* };
}

named! {
    GetModelRequest.model DeleteModelRequest.model VerifyModelRequest.model EstimateLoadRequest.model
    LoadRequest.model UnloadRequest.model WatchModelRequest.model EvaluateRequest.model
    GetJobRequest.id CancelJobRequest.id ResumeJobRequest.id DeleteJobRequest.id WatchJobRequest.id
}

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

impl From<(&str, &str)> for SetAliasRequest {
    /// The alias and its model.
    fn from((alias, model): (&str, &str)) -> Self {
        Self { alias: alias.into(), model: model.into() }
    }
}
