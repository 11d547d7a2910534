"""The JSON-Schema-Test-Suite against masks: an unsupported schema is refused, no invalid instance is accepted.

    python -m tests.text.schema_suite FOLDER

FOLDER is `tests/draft2020-12` of the suite; the sources of the package jsonschema contain it below
`json/`. A valid instance may be rejected: the order of properties is fixed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from tests.text.masks import accepts, byte_level_vocabulary, compiled
from worker.errors import InvalidRequest


def main() -> int:
    """Print counts and each invalid instance that was accepted; return their number."""
    tokenizer, counts, wrong = byte_level_vocabulary(), Counter[str](), 0
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        for group in json.loads(path.read_text("utf-8")):
            try:
                grammar = compiled(tokenizer, "json_schema", group["schema"])
            except InvalidRequest:
                counts["schemas refused"] += 1
                continue
            counts["schemas compiled"] += 1
            for test in group["tests"]:
                text = json.dumps(test["data"], ensure_ascii=False, separators=(",", ":"))
                accepted = accepts(grammar, tokenizer, text)
                counts[f"{'valid' if test['valid'] else 'invalid'}, {'accepted' if accepted else 'rejected'}"] += 1
                if accepted and not test["valid"]:
                    wrong += 1
                    print(f"{path.name}: {group['description']}: {test['description']}: {text}")
    print(dict(counts))
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
