use serde_json::json;

use super::*;

fn chat(extra: Value) -> Result<Asked, Invalid> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    Asked::parse(Api::Chat, body.to_string().as_bytes(), 4)
}

fn completion(body: Value) -> Result<Asked, Invalid> {
    Asked::parse(Api::Completions, body.to_string().as_bytes(), 4)
}

#[test]
fn both_names_of_the_token_limit_are_read_and_the_newer_wins() {
    assert_eq!(
        chat(json!({"max_tokens": 5})).unwrap().params.max_tokens,
        Some(5)
    );
    assert_eq!(
        chat(json!({"max_tokens": 5, "max_completion_tokens": 7}))
            .unwrap()
            .params
            .max_tokens,
        Some(7)
    );
    assert_eq!(chat(json!({})).unwrap().params.max_tokens, None);
    assert_eq!(
        completion(json!({"prompt": "x"}))
            .unwrap()
            .params
            .max_tokens,
        Some(16)
    );
}

#[test]
fn choices_have_different_seeds_and_their_own_ids() {
    let tasks = chat(json!({"n": 3, "seed": 9}))
        .unwrap()
        .tasks("req-1", false);
    let seeds: Vec<_> = tasks.iter().map(|task| task.params.seed.unwrap()).collect();
    let ids: Vec<_> = tasks.iter().map(|task| task.id.as_str()).collect();
    assert_eq!(seeds, [9, 10, 11]);
    assert_eq!(ids, ["req-1", "req-1.1", "req-1.2"]);
}

#[test]
fn limits_have_several_names_and_minus_one_is_none() {
    let most = |extra: Value| chat(extra).map(|asked| asked.params.max_tokens);
    assert_eq!(most(json!({"max_tokens": -1})), Ok(None));
    assert_eq!(most(json!({"n_predict": 9.0})), Ok(Some(9)));
    assert_eq!(
        most(json!({"max_tokens": null, "n_predict": 9})),
        Ok(Some(9))
    );
    let most = |extra: Value| {
        let mut body = json!({"prompt": "x"});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        completion(body).map(|asked| asked.params.max_tokens)
    };
    assert_eq!(most(json!({"max_tokens": -1})), Ok(None));
    assert_eq!(most(json!({"n_predict": -1})), Ok(None));
    assert_eq!(most(json!({"max_tokens": null})), Ok(Some(16)));
    assert_eq!(
        most(json!({"min_tokens": 17})).unwrap_err().param,
        "min_tokens"
    );
}

#[test]
fn log_probabilities_are_asked_for_as_each_api_does() {
    let chat = |extra: Value| chat(extra).map(|asked| asked.params.logprobs);
    for (value, expected) in [
        (json!(0), None),
        (json!(false), None),
        (Value::Null, None),
        (json!(true), Some(0)),
        (json!(1), Some(0)),
    ] {
        assert_eq!(chat(json!({"logprobs": value})), Ok(expected), "{value}");
    }
    let text = |value: &Value| {
        completion(json!({"prompt": "x", "logprobs": value})).map(|asked| asked.params.logprobs)
    };
    for (value, expected) in [
        (json!(0), Some(0)),
        (json!(false), None),
        (Value::Null, None),
        (json!(true), Some(1)),
        (json!(5.0), Some(5)),
    ] {
        assert_eq!(text(&value), Ok(expected), "{value}");
    }
}

#[test]
fn an_empty_model_is_none_and_unknown_fields_are_noted() {
    let asked = chat(json!({"model": "", "frobnicate": 1, "user": "u"})).unwrap();
    assert_eq!(
        (asked.model, asked.ignored),
        (None, vec!["frobnicate".to_owned()])
    );
}

#[test]
fn one_plain_question_may_go_out_as_a_plain_task() {
    let payload = |extra: Value| {
        let asked = chat(extra).unwrap();
        let tasks = asked.tasks("r", true);
        assert!(asked.tasks("r", false)[0].plain.is_none());
        let payload = tasks[0].plain.as_deref();
        payload.map(|payload| String::from_utf8(payload.to_vec()).unwrap())
    };
    assert_eq!(payload(json!({})).as_deref(), Some("hi"));
    let task = payload(json!({"temperature": 0, "max_completion_tokens": 9})).unwrap();
    let task: Value = serde_json::from_str(&task).unwrap();
    assert_eq!(
        task,
        json!({"prompt": "hi", "temperature": 0, "max_tokens": 9})
    );
    for extra in [
        json!({"logprobs": true}),
        json!({"n": 2}),
        json!({"min_tokens": 3}),
        json!({"enable_thinking": false}),
        json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}),
    ] {
        assert_eq!(payload(extra.clone()), None, "{extra}");
    }
}

#[test]
fn probabilities_count_for_as_many_tokens_as_are_asked_for() {
    let memory = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "u"}]});
        let fields = extra.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        let asked = Asked::parse(Api::Chat, body.to_string().as_bytes(), 16).unwrap();
        asked.memory(Some(4096))
    };
    let long = json!({"n": 16, "max_tokens": 2000, "logprobs": true, "top_logprobs": 20});
    assert!(memory(long.clone()) >= 16 * 2000 * 21 * 96);
    let mut streamed = long;
    streamed["stream"] = true.into();
    assert!(memory(streamed) < 17 << 20);
    let endless = json!({"max_tokens": u32::MAX, "logprobs": true});
    assert!(memory(endless) < 1 << 20, "the context is its end");
    assert!(memory(json!({"max_tokens": u32::MAX})) < 20 << 10);
}

#[test]
fn prompts_come_in_four_shapes() {
    let count =
        |prompt: Value| completion(json!({"prompt": prompt})).map(|asked| asked.prompts.len());
    assert_eq!(count(json!("a")), Ok(1));
    assert_eq!(count(json!(["a", "b"])), Ok(2));
    assert_eq!(count(json!([1, 2, 3])), Ok(1));
    assert_eq!(count(json!([[1], [2, 3]])), Ok(2));
    for wrong in [
        json!([]),
        json!(5),
        json!(["a", 1]),
        json!([1, "a"]),
        json!([[-1]]),
        json!([[5_000_000_000_u64]]),
    ] {
        assert_eq!(count(wrong.clone()).unwrap_err().param, "prompt", "{wrong}");
    }
}

#[test]
fn harmless_fields_are_taken_as_they_are() {
    chat(json!({
        "user": "u", "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "store": false, "metadata": {}, "parallel_tool_calls": true, "service_tier": "auto", "top_logprobs": 0,
        "stream_options": {}, "n": 1.0, "stop": null, "best_of": null, "repeat_last_n": 64,
    }))
    .unwrap();
    completion(json!({"prompt": "x", "n": 2, "best_of": 2, "suffix": ""})).unwrap();
}

#[test]
fn what_is_wrong_or_not_there_is_named() {
    let cases = [
        (chat(json!({"tools": [{}]})), "tools", true),
        (chat(json!({"functions": [{}]})), "functions", true),
        (
            chat(json!({"tool_choice": "required"})),
            "tool_choice",
            true,
        ),
        (
            chat(json!({"response_format": {"type": "xml"}})),
            "response_format.type",
            false,
        ),
        (chat(json!({"modalities": ["audio"]})), "modalities", true),
        (
            chat(json!({"repeat_penalty": 1.1, "repeat_last_n": 64})),
            "repeat_last_n",
            true,
        ),
        (chat(json!({"n": 5})), "n", false),
        (chat(json!({"n": 0})), "n", false),
        (chat(json!({"max_tokens": 0})), "max_tokens", false),
        (chat(json!({"top_logprobs": 2})), "top_logprobs", false),
        (chat(json!({"logprobs": 2})), "logprobs", false),
        (
            chat(json!({"logprobs": true, "top_logprobs": 21})),
            "top_logprobs",
            false,
        ),
        (
            chat(json!({"stream_options": {"include_usage": true}})),
            "stream_options",
            false,
        ),
        (chat(json!({"messages": null})), "messages", false),
        (chat(json!({"model": 5})), "model", false),
        (chat(json!({"model": "m".repeat(513)})), "model", false),
        (completion(json!({})), "prompt", false),
        (
            completion(json!({"prompt": "x", "suffix": "y"})),
            "suffix",
            true,
        ),
        (
            completion(json!({"prompt": "x", "best_of": 3})),
            "best_of",
            true,
        ),
        (
            completion(json!({"prompt": "x", "echo": true, "logprobs": 1})),
            "logprobs",
            true,
        ),
        (
            completion(json!({"prompt": vec!["x"; 200]})),
            "prompt",
            false,
        ),
        (
            completion(json!({"prompt": vec!["x"; 100], "n": 2})),
            "n",
            false,
        ),
        (Asked::parse(Api::Chat, b"{\"model\":", 4), "body", false),
        (Asked::parse(Api::Chat, b"[]", 4), "body", false),
    ];
    for (result, param, unsupported) in cases {
        let invalid = result.expect_err(param);
        assert_eq!(
            (invalid.param.as_str(), invalid.unsupported),
            (param, unsupported),
            "{invalid}"
        );
    }
}
