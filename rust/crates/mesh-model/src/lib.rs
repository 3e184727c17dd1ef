//! Models on disk: GGUF, tokenizer, chat template, streaming detokenisation.
