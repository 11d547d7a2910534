"""Visits every interleaving within bounds, breadth first, and checks each state once.

A step is one call of the server by one actor, a crash, or a restart of the server with an earlier
state. In every state every live worker is also run alone, without further faults: it must end the
job and leave the queue empty, or the first state in which it does not is a counterexample.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from tests.jobs.memory_streams import MemoryStreams
from tests.protocol_model.automaton import LOST, ActorAutomaton, Interned, ServerAutomaton, Values
from tests.protocol_model.automaton import Call as StreamsCall
from tests.protocol_model.programs import Orchestrator, Worker
from tests.protocol_model.properties import Facts
from tests.protocol_model.traces import describe

DEAD = NOT_SAVED = NOT_LOST = -1
COSTS = {"drain": "drains", "abandon": "abandons", "cancel": "cancels", "submit": "submissions"}
"""The faults that some operations count as."""


@dataclass(frozen=True)
class Faults:
    """How many faults of each kind may yet happen, and `in_all` of all kinds."""

    pauses: int = 0
    """Leases that expire although their worker lives, which goes on later with what it knew."""
    crashes: int = 0
    lost_replies: int = 0
    """To calls that changed the server. Other calls may as well be made later."""
    drains: int = 0
    abandons: int = 0
    cancels: int = 0
    submissions: int = 0
    """Of the same job, after the first one."""
    lost_seconds: int = 0
    """Restarts of the server with the state of any earlier moment."""
    in_all: int = 99

    def without(self, kind: str) -> Faults | None:
        """What is left after a fault; None if none is allowed."""
        left = getattr(self, kind)
        return replace(self, **{kind: left - 1, "in_all": self.in_all - 1}) if left and self.in_all else None


@dataclass(frozen=True)
class Bounds:
    """Two workers, one job with an answer of `tokens` tokens, and the faults of a run."""

    tokens: int = 1
    faults: Faults = Faults()


class State(NamedTuple):
    """Numbers of nodes: of the server, the workers (or DEAD), the orchestrator."""

    server: int
    w1: int
    w2: int
    orchestrator: int
    saved: int
    """The server's state that a restart returns to."""
    faults: int


class Step(NamedTuple):
    """Who did what; `call` and `reply` are -1 for what is no call."""

    actor: str
    what: str
    call: int = -1
    reply: int = -1


class Move(NamedTuple):
    """A step of an actor whose other circumstances do not matter."""

    step: Step
    cost: str
    """The kind of fault that it is; a pause is none if the other worker is dead."""
    server: int
    node: int
    lost: int
    """The actor's node if the reply is lost; NOT_LOST if the call changed nothing."""


class Violation(Exception):
    """A counterexample: what is wrong, and the steps that lead there."""

    def __init__(self, problem: str, trace: list[str]) -> None:
        super().__init__("\n".join([problem, *(f"{n:3} {line}" for n, line in enumerate(trace, 1))]))
        self.problem = problem
        self.trace = trace


class Explorer:
    """The reachable states of a server of `streams_class`."""

    def __init__(self, bounds: Bounds, streams_class: type[MemoryStreams] = MemoryStreams) -> None:
        self.bounds = bounds
        self.values = Values()
        self.server = ServerAutomaton(self.values, streams_class)
        self.actors = ActorAutomaton(self.values)
        self.transitions = 0
        self.came_from: dict[State, tuple[State, Step] | None] = {}
        """Every visited state, with the step by which it was reached first."""
        self._lost = self.values.of(LOST)
        self._none = self.values.of(None)
        self._faults = Interned()
        self._without: dict[tuple[int, str], int | None] = {}
        self._moves: dict[tuple[int, int], list[Move]] = {}
        """By the nodes of the server and of an actor."""
        self._facts: dict[int, Facts] = {}
        self._continued: set[tuple[int, int]] = set()
        self._ends_alone: set[tuple[int, int]] = set()

    def run(self, seconds: float = float("inf")) -> None:
        """Visit all states. Raises Violation, and TimeoutError after so many seconds."""
        until = time.monotonic() + seconds
        first = self._first_state()
        self.came_from[first] = None
        self._check(first)
        waiting = deque([first])
        while waiting:
            state = waiting.popleft()
            for step, following in self._steps(state):
                self.transitions += 1
                if following in self.came_from:
                    continue
                self.came_from[following] = (state, step)
                self._check(following)
                if step.what != "the server lost writes":
                    self._check_continuation(state, following)
                waiting.append(following)
            if time.monotonic() > until:
                raise TimeoutError(f"{len(self.came_from)} states visited, {len(waiting)} of them not expanded")

    def _first_state(self) -> State:
        """Two idle workers and one submitted job."""
        workers = (self.actors.add(Worker(name, self.bounds.tokens)) for name in ("w1", "w2"))
        idle = self.actors.add(Orchestrator())
        server, node = self.server.first, self.actors.begin(idle, "submit")
        while node in self.actors.call:
            server, reply = self.server.execute(server, self.actors.call[node])
            node = self.actors.reply(node, reply)
        return State(server, *workers, idle, NOT_SAVED, self._faults.number(self.bounds.faults))

    def _steps(self, state: State) -> Iterator[tuple[Step, State]]:
        server, w1, w2, orchestrator, saved, faults = state
        if w1 != DEAD:
            for step, after, w1_after, left in self._steps_of("w1", server, w1, faults, w2):
                yield step, State(after, w1_after, w2, orchestrator, saved, left)
        if w2 != DEAD:
            for step, after, w2_after, left in self._steps_of("w2", server, w2, faults, w1):
                yield step, State(after, w1, w2_after, orchestrator, saved, left)
        for step, after, node, left in self._steps_of("orchestrator", server, orchestrator, faults, DEAD):
            yield step, State(after, w1, w2, node, saved, left)
        yield from self._restarts(state)

    def _steps_of(
        self, actor: str, server: int, node: int, faults: int, other: int
    ) -> Iterator[tuple[Step, int, int, int]]:
        """Each step of an actor, with the server's node, the actor's and the faults left after it."""
        key = (server, node)
        if key not in self._moves:
            self._moves[key] = list(self._moves_of(actor, server, node))
        for step, cost, after, node_after, lost in self._moves[key]:
            left: int | None = faults
            if cost and (cost != "pauses" or other != DEAD):
                left = self._left(faults, cost)
            if left is None:
                continue
            yield step, after, node_after, left
            if lost != NOT_LOST and (left := self._left(left, "lost_replies")) is not None:
                yield step._replace(reply=self._lost), after, lost, left
        if actor != "orchestrator" and (left := self._left(faults, "crashes")) is not None:
            yield Step(actor, "crashes"), server, DEAD, left

    def _moves_of(self, actor: str, server: int, node: int) -> Iterator[Move]:
        """The next call of an actor, or the first one of each operation that it may begin."""
        for operation in self.actors.operations.get(node, [""]):
            begun = self.actors.begin(node, operation) if operation else node
            call = self.actors.call[begun]
            after, reply = self.server.execute(server, call)
            cost = COSTS.get(operation, "")
            if reply != self._none and self._takes_from_another(call):
                cost = "pauses"
            step = Step(actor, operation or self.actors.nodes[node].operation, call, reply)
            lost = NOT_LOST if after == server else self.actors.reply(begun, self._lost)
            yield Move(step, cost, after, self.actors.reply(begun, reply), lost)

    def _takes_from_another(self, number: int) -> bool:
        """Whether the call reclaims an entry that the other worker has not given back."""
        call: StreamsCall = self.values.value(number)
        if call.name != "reclaim":
            return False
        _, worker, row = call.args
        return row.idle_ms == 0 and row.consumer != worker

    def _restarts(self, state: State) -> Iterator[tuple[Step, State]]:
        left = self._left(state.faults, "lost_seconds")
        if left is None:
            return
        if state.saved == NOT_SAVED:
            yield Step("server", "saves"), state._replace(saved=state.server)
        elif state.saved != state.server:
            actors = {
                name: node if node == DEAD else self.actors.restarted(node)
                for name, node in zip(("w1", "w2", "orchestrator"), state[1:4], strict=True)
            }
            after = state._replace(server=state.saved, saved=NOT_SAVED, faults=left, **actors)
            yield Step("server", "the server lost writes"), after

    def _left(self, faults: int, kind: str) -> int | None:
        key = (faults, kind)
        if key not in self._without:
            left = self._faults[faults].without(kind)
            self._without[key] = None if left is None else self._faults.number(left)
        return self._without[key]

    def facts(self, server: int) -> Facts:
        """What the properties read of that state of the server."""
        if server not in self._facts:
            self._facts[server] = Facts(self.server.streams(server), self.bounds.tokens)
        return self._facts[server]

    def _check(self, state: State) -> None:
        facts = self.facts(state.server)
        if facts.at_any_time:
            raise Violation("; ".join(facts.at_any_time), self.trace(state))
        spent = self.bounds.faults.in_all - self._faults[state.faults].in_all
        if facts.epoch > 1 + spent:
            raise Violation(
                f"epoch {facts.epoch} after {spent} faults: a worker was fenced without one", self.trace(state)
            )
        for name, node in (("w1", state.w1), ("w2", state.w2)):
            if node != DEAD and (state.server, node) not in self._ends_alone:
                self._run_alone(state, name, node)

    def _check_continuation(self, before: State, after: State) -> None:
        pair = (before.server, after.server)
        if before.server == after.server or pair in self._continued:
            return
        self._continued.add(pair)
        if not self.facts(before.server).is_continued_by(self.facts(after.server)):
            raise Violation("a published event was changed or deleted", self.trace(after))

    def _run_alone(self, state: State, name: str, node: int) -> None:
        """Run the worker without faults and without the others until nothing is left to do."""
        server, passed, steps = state.server, {}, []
        while (server, node) not in self._ends_alone:
            facts = self.facts(server)
            idle = node in self.actors.operations and self.actors.operations[node] == ["claim"]
            problem = "; ".join(facts.at_any_time)
            if idle and not facts.left:
                problem = problem or "; ".join(facts.when_quiet)
                if not problem:
                    break
            elif (server, node) in passed:
                problem = problem or f"the worker {name} alone never ends the job; left: {facts.left}"
            if problem:
                raise Violation(problem, self.trace(state) + [self._describe(step) for step in steps])
            passed[server, node] = None
            if node in self.actors.operations:
                node = self.actors.begin(node, self.actors.operations[node][0])
            call, what = self.actors.call[node], self.actors.nodes[node].operation
            server, reply = self.server.execute(server, call)
            steps.append(Step(f"{name} alone", what, call, reply))
            node = self.actors.reply(node, reply)
        self._ends_alone.update(passed)

    def trace(self, state: State) -> list[str]:
        """The steps from the first state to this one, one line each."""
        steps: list[Step] = []
        origin = self.came_from[state]
        while origin is not None:
            steps.append(origin[1])
            origin = self.came_from[origin[0]]
        return [self._describe(step) for step in reversed(steps)]

    def _describe(self, step: Step) -> str:
        if step.call < 0:
            return f"{step.actor:<12} {step.what}"
        call, reply = self.values.value(step.call), self.values.value(step.reply)
        return f"{step.actor:<12} {step.what}: {describe(call)} -> {describe(reply)}"


def fault_names() -> list[str]:
    """The kinds of faults, as in `Faults`."""
    return [each.name for each in fields(Faults)]
