"""Write tests/data/prometheus_operator.json: the JSON schemas of the kinds that the base has.

They are those of prometheus-operator (Apache-2.0) as the package `cloudcoil.models.prometheus_operator`
has them, closed: a key without a definition is an error. Run it in an environment of its own, since
that package adds a plugin to pytest: `pip install cloudcoil.models.prometheus_operator`, then
`python -m tests.deploy.make_monitor_schemas`.
"""

import importlib
import json
from pathlib import Path

TARGET = Path(__file__).parents[1] / "data/prometheus_operator.json"
KINDS = ("PodMonitor", "PrometheusRule", "ServiceMonitor")
NO_RULES = ("title", "default", "description")


def closed(schema):
    """The schema without texts, in which objects have no keys but those defined."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if isinstance(schema, str):
        return schema.replace("^(?i)", "(?i)^")  # Python accepts flags at the beginning only
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items() if key not in NO_RULES or isinstance(value, dict)}
    return result | {"additionalProperties": False} if "properties" in result else result


def main():
    models = importlib.import_module("cloudcoil.models.prometheus_operator.v1")
    schemas = {name: closed(getattr(models, name).model_json_schema()) for name in KINDS}
    TARGET.write_text(json.dumps(schemas, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
