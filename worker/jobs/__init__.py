"""The jobs room: the wire contract, the transport on Redis streams and its in-memory twin, the orchestrator's client.

It knows nothing of models, engines or devices. Read `protocol.py` first, then `transport.py`.
"""
