"""Chaos: a real server, real workers that are killed, paused and stopped, and a checker that replays every stream.

    python -m tests.chaos --seed 7 --minutes 3

`schedule.py` says what is done to whom and when, `questions.py` what is asked and what an undisturbed engine answers,
`orchestrator.py` asks and reads, `fleet.py` and `server.py` are the processes, `run.py` brings them together, and
`checker.py` judges what is left on the server. docs/reliability.md says what is promised.
"""
