"""The keys of a command, which decide the node of a cluster and are named by a missing right."""

from collections.abc import Mapping, Sequence

from worker.jobs.keys import CONTROL
from worker.jobs.redis_resp import Command

_KEY_POSITION: Mapping[str, int] = {"EVALSHA": 3, "XGROUP": 2, "XINFO": 2}
"""Index of the first key in a command; 1 for commands that are not listed."""
_KEYLESS = ("TIME", "SCRIPT", "MULTI", "EXEC", "WAIT")


def key_of(command: Command) -> str:
    """The key that decides which node of a cluster executes the command.

    Commands without a key go to the node of CONTROL, so that all clients read the same clock.
    """
    name = str(command[0])
    if name in _KEYLESS:
        return CONTROL
    if name in ("XREAD", "XREADGROUP"):
        return str(command[command.index("STREAMS") + 1])
    return str(command[_KEY_POSITION.get(name, 1)])


def keys_of(command: Command) -> Sequence[str]:
    """The keys that a script is called with, or the first key of another command, if it has any.

    A command that is not known is empty.
    """
    if command and command[0] == "EVALSHA":
        return [str(key) for key in command[3 : 3 + int(command[2])]]
    return [] if not command or command[0] in _KEYLESS else [key_of(command)]
