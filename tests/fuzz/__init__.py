"""Coverage-guided fuzzing of everything that reads foreign bytes: `make fuzz`.

| file | contents |
| --- | --- |
| `job_decoding.py`, `gguf_opening.py`, `chat_templates.py`, `tokenizers.py` | a target of the worker each |
| `gateway_requests.py`, `gateway_app.py` | a target of the gateway each |
| `source.py` | what the targets make of the fuzzer's bytes |
| `targets.py` | the list of targets, and what is a finding |
| `engine.py`, `__main__.py` | runs of one target with atheris, and of several |
| `regressions/TARGET/` | inputs that were findings; `test_fuzz.py` replays them |

A target has `seeds()`, well-formed inputs from which the fuzzer starts, and `run(data)`, which lets
pass no exception but those of findings.
"""
