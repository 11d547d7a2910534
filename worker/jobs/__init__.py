"""Jobs on Redis streams: wire contract, protocol scripts, the worker's transport, the client.

| question | module |
| --- | --- |
| what is in a job, an event, a key | `protocol.py`, `events.py`, `keys.py` |
| what each call does on the server | `streams.py` (interface), `lua/` (scripts, one step each) |
| how the calls reach Redis | `redis_streams.py`, the only module that imports redis |
| how a worker claims, writes and settles a job | `transport.py`, `consumer.py` |
| where a lease is renewed | `Transport.renew` → `Consumer.renew` → `lua/renew.lua` on the server |
| where a stale worker is fenced | `lua/take.lua` begins an epoch, `lua/append.lua` checks it |
| heartbeats, worker events, drain and cancel commands | `Registration` in `consumer.py` |
| how an orchestrator submits and reads | `client.py` (`Client`, `SyncClient`) |
| which events a reader has not received, when it gives up | `reader.py`, `event_reader.py` |
| how many readers share a few connections | `shared_reads.py` |

Imports no model, engine or device code. Read `protocol.py` first, then `transport.py`.
"""
