"""A worker process for tests: answer one job on the GPU, print its ids, exit as `worker`.

    python -m tests.gpu.child MODEL.gguf JOB

JOB is JSON: prompt, seed, temperature, tokens, replay; after `pause` ids it waits forever, after
`trap` ids it breaks the device with a kernel that traps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.gpu.served import load
from worker.engine import Sequence
from worker.errors import WorkerError
from worker.sampling import Sampling

TRAP = 'extern "C" __global__ void trap_now() { asm("trap;"); }'


def serve(path, job):
    sampling = Sampling(temperature=job["temperature"], seed=job["seed"])
    engine = load(path).engine
    engine.add(Sequence("job", job["prompt"], job["tokens"], sampling, replay=job["replay"]))
    published = 0
    while not engine.idle:
        for token in engine.step():
            if token.replayed:
                continue
            print(token.draw.id, flush=True)
            published += 1
            if published == job["pause"]:
                sys.stdin.read()
            if published == job["trap"]:
                break_the_device()


def break_the_device():
    import cupy

    cupy.RawKernel(TRAP, "trap_now")((1,), (1,), ())


def main():
    try:
        serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except WorkerError as error:
        print(f"worker: {error.code}: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
