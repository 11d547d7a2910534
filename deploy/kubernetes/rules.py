"""Writes base/rules.yaml, the PrometheusRule with the alerts of deploy/prometheus/rules.yaml.

Run `python deploy/kubernetes/rules.py` after a change there; tests/deploy compares both.
"""

from pathlib import Path
from textwrap import indent

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parent / "prometheus/rules.yaml"
TARGET = FOLDER / "base/rules.yaml"
HEAD = """\
# Written by deploy/kubernetes/rules.py from deploy/prometheus/rules.yaml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: worker
spec:
"""


def manifest() -> str:
    """The object with the groups of the rule file."""
    rules = SOURCE.read_text("utf-8")
    return HEAD + indent(rules[rules.index("groups:") :], "  ")


if __name__ == "__main__":
    TARGET.write_text(manifest(), "utf-8")
