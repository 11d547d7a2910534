"""Chaos tests: a real server and real workers, which are killed, paused and stopped during a run.

    python -m tests.chaos --seed 7 --minutes 3

- `plan.py`, `schedule.py`: parameters of a run; its faults and their times, from its seed
- `workload.py`: jobs and their reference answers
- `orchestrator.py`: submits jobs and reads their events; `run_log.py` records both
- `worker_pool.py`, `server.py`: the processes, and faults injected into them; `clock.py`: their wall clocks
- `network.py`: a proxy between each process and the server, and its faults
- `run.py`: one run; `checker.py`: checks the streams and keys that it leaves on the server

docs/reliability.md lists the guarantees.
"""
