"""The HTTP gateway: OpenAI's and Anthropic's APIs over the job queue, in a stateless process.

| question | module |
| --- | --- |
| routes, request ids, authentication, drain | `app.py`, `server.py` |
| what all requests share | `context.py` |
| which models are served, when a request is refused for lack of a worker | `models.py` |
| API keys, tenants, rates | `keys.py` |
| the jobs of a request: ids, submission, events, cancellation | `jobs.py` |
| server-sent events, disconnects | `sse.py` |
| validation of request bodies | `request.py`; status and body of errors: `errors.py` |
| Chat Completions and Completions | `chat.py`, `chat_chunks.py`, `completions.py` |
| Responses | `responses.py`, `responses_request.py`, `responses_events.py`, `response_store.py` |
| Anthropic's Messages, token counts | `messages.py`, `messages_request.py`, `messages_events.py` |
| the parts of an answer of these two | `answer_parts.py` |
| files | `files.py`, `file_store.py` |
| batches | `batches.py`, `batch_store.py`, `batch_runner.py`, `batch_jobs.py`, `batch_lines.py` |

It imports the job client, never a model, the engine or a device. Read `jobs.py` first, then
`chat.py`.
"""
