"""Load and soak: real servers, `worker run` and `worker gateway` processes, and a bound for each figure.

`make soak` runs every scenario, `python -m tests.soak NAME…` some of them; `test_scenarios.py` runs
their short forms. A scenario is one module with `run(plan, folder)`, which returns figures, and two
plans: `FULL` and `SHORT`.

| module | question |
| --- | --- |
| `backlog.py` | do 4 workers drain 10,000 queued jobs, each once and in order? |
| `memory.py` | do worker and server keep their size over 50,000 jobs? |
| `cancels.py` | how soon does a running job stop, one at a time and 200 at once? |
| `readers.py` | do 500 readers of running jobs receive each token once, and how late? |
| `deaths.py` | how soon does another worker continue, and an idle one stop? |
| `outage.py` | do 64 streams survive 30 s without a server, killed or suspended? |
| `gateway.py` | 1,000 streams, and the gateway's size over 20,000 requests |
"""
