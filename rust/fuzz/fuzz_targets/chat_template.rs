//! Any template from a file renders or fails, in bounded time and memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_model::chat::{ChatTemplate, Message};

fuzz_target!(|data: (String, String, String)| {
    let (source, role, content) = data;
    let Ok(template) = ChatTemplate::new(&source, "<s>", "</s>") else {
        return;
    };
    let _ = template.render(&[Message::new(role, content)], true);
});
