"""The scripts of `lua/` and the commands that run them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha1
from importlib import resources

from worker.jobs.redis_resp import Command, Value

_PREPENDED = {
    "job": ("take", "append", "cancel", "state"),
    "queue": ("renew", "settle"),
    "": ("reclaim", "pending", "enqueue", "find", "position", "depth", "overview", "remove_consumers"),
}
"""The scripts, by the file that is prepended to them, after `rights.lua`."""


@dataclass(frozen=True, slots=True)
class Script:
    """One script, and the hash by which servers know it."""

    source: str
    sha: str

    def call(self, keys: Sequence[str], args: Sequence[Value]) -> Command:
        """The command that runs it."""
        return ("EVALSHA", self.sha, len(keys), *keys, *args)


def load_scripts() -> Mapping[str, Script]:
    """All scripts by name."""
    found = {}
    for prepended, names in _PREPENDED.items():
        for name in names:
            source = _lua("rights") + (_lua(prepended) if prepended else "") + _lua(name)
            found[name] = Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest())
    return found


def _lua(name: str) -> str:
    return (resources.files("worker.jobs") / "lua" / f"{name}.lua").read_text()
