"""The job protocol, explored exhaustively for small bounds.

The model has no transitions of its own: a worker is the project's `Transport`, the orchestrator its
`Client`, and the server `MemoryStreams`, which defines the Lua scripts. `automaton.py` runs their
coroutines from one call of the server to the next and restores them at any such point, `programs.py`
has the order of a worker's calls, `explorer.py` visits every interleaving, `properties.py` states
what must hold, and `conformance.py` repeats the visited calls on a real server.
`python -m tests.protocol_model --help` explores larger bounds than the tests do.
"""
