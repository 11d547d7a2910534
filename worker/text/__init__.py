"""Text to token ids before the engine, token ids to published text after it.

- A prompt is tokenized in `tokenizer.py`: `Tokenizer.encode_prompt` for a raw prompt, `encode_chat`
  for messages, which `chat_template.py` renders in a child process that `template_process.py`
  limits: `chat_messages.py` adapts them to what `template_traits.py` finds out about the template;
  `traced_template.py` and `traced_text.py` record which characters come from the request.
- `vocabulary.py` reads the GGUF metadata; `special_tokens.py` splits special tokens from ordinary
  text, which `bpe.py` encodes, with the word patterns of `pre_tokenizers.py`.
- A token's text is withheld for a stop string in `detokenizer.py`. `parsers/` assigns it to a
  channel: reasoning, tool call or final, by the model's format.
- What an answer must be is a grammar: `answer_grammar.py` composes it of a job's format and tools,
  `grammar.py` compiles it and makes the masks of its tokens.
"""
