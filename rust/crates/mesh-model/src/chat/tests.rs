use super::*;

fn render(source: &str, messages: &[Message]) -> Result<String, ChatError> {
    ChatTemplate::new(source, "<s>", "</s>")?.render(messages, true)
}

fn hello() -> Vec<Message> {
    vec![
        Message::new("system", "Be brief."),
        Message::new("user", "Hello <b>&amp;</b>"),
    ]
}

#[test]
fn the_fallback_writes_chatml_and_leaves_the_text_as_it_is() {
    assert_eq!(
        render(CHATML, &hello()).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello <b>&amp;</b><|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn gemmas_turns_have_no_system_role() {
    let mut messages = hello();
    messages.extend([
        Message::new("assistant", " Hi. "),
        Message::new("user", "Bye"),
    ]);
    assert_eq!(
        render(GEMMA, &messages).unwrap(),
        "<s><start_of_turn>user\nBe brief.\n\nHello <b>&amp;</b><end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n\
         <start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    );
}

#[test]
fn python_methods_and_block_trimming_work_as_in_transformers() {
    let source = "{% for m in messages %}\n    {% if m.role.startswith('u') %}\n{{ m['content'].upper().strip() }}\n    {% endif %}\n{% endfor %}";
    assert_eq!(render(source, &hello()).unwrap(), "HELLO <B>&AMP;</B>\n");
}

#[test]
fn begin_and_end_tokens_are_known() {
    assert_eq!(
        render("{{ bos_token }}{{ eos_token }}", &[]).unwrap(),
        "<s></s>"
    );
}

#[test]
fn a_template_that_raises_an_exception_gives_its_words() {
    let error = render("{{ raise_exception('roles must alternate') }}", &hello()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the model's chat template refuses this conversation: roles must alternate"
    );
}

#[test]
fn a_template_that_loops_is_stopped() {
    let source = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
    let begun = std::time::Instant::now();
    assert!(matches!(render(source, &[]), Err(ChatError::OutOfFuel)));
    assert!(begun.elapsed() < std::time::Duration::from_secs(10));
}

#[test]
fn a_template_that_writes_without_end_is_stopped() {
    let source = "{% for a in range(10000) %}{{ messages[0].content }}{% endfor %}";
    let long = [Message::new("user", "x".repeat(100_000))];
    assert!(matches!(
        render(source, &long),
        Err(ChatError::OutputTooLong { .. })
    ));
}

#[test]
fn a_template_that_does_not_parse_is_named() {
    let error = ChatTemplate::new("{% if %}", "", "").unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("the model's chat template is invalid: "),
        "{error}"
    );
}

#[test]
fn json_is_written_as_python_writes_it() {
    let source = "{{ messages[1] | tojson }}";
    assert_eq!(
        render(source, &hello()).unwrap(),
        r#"{"role": "user", "content": "Hello <b>&amp;</b>"}"#
    );
    let indented = render("{{ [1, 2] | tojson(indent=2) }}", &[]).unwrap();
    assert_eq!(indented, "[\n  1,\n  2\n]");
}

#[test]
fn dates_are_written_as_strftime_writes_them() {
    assert_eq!(
        functions::strftime("%d %b %Y, %A %H:%M:%S %% %Q", 951_782_400 + 3_661),
        "29 Feb 2000, Tuesday 01:01:01 % %Q"
    );
    assert_eq!(functions::strftime("%Y-%m-%d", 0), "1970-01-01");
    assert!(render("{{ strftime_now('%Y') }}", &[]).unwrap().len() >= 4);
}
