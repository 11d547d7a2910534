"""The Kubernetes base as Python objects, its schemas, and the references between its objects."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy/kubernetes/base"
CRDS = ROOT.parent / "shared/data/crds"
"""Definitions of KEDA's resources; not part of the repository."""
KUBERNETES = ("1.29", "1.37")
"""The oldest supported version, and the newest that kubernetes-validate knows."""
MONITORS = json.loads((ROOT / "tests/data/prometheus_operator.json").read_text())
CRD_FILES = {
    "ScaledObject": "keda-scaledobjects.yaml",
    "TriggerAuthentication": "keda-triggerauthentications.yaml",
}


def base():
    """The objects of the base: of its resource files, then the ConfigMaps that it generates."""
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    unknown = set(kustomization) - {
        *("apiVersion", "kind", "namespace", "resources", "labels", "configMapGenerator", "images")
    }
    assert unknown == set(), "teach this function what the key does"
    found = [each for name in kustomization["resources"] for each in yaml.safe_load_all((BASE / name).read_text())]
    for generator in kustomization["configMapGenerator"]:
        data = dict(literal.split("=", 1) for literal in generator["literals"])
        metadata = {"name": generator["name"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    return copy.deepcopy(found)  # YAML aliases are one object


def name_of(document):
    return f"{document['kind']}/{document['metadata']['name']}"


def find(documents, name):
    (found,) = (document for document in documents if name_of(document) == name)
    return found


def check(document, folder):
    """Fail with an exception if the object does not fit the schema of its kind."""
    kind, group = document["kind"], document["apiVersion"].rpartition("/")[0]
    if group == "keda.sh":
        check_keda(document, folder)
    elif group == "monitoring.coreos.com":
        jsonschema.validate(document, MONITORS[kind])
    else:
        for version in KUBERNETES:
            kubernetes_validate.validate(document, version, strict=True)


def check_keda(document, folder):
    definition = CRDS / CRD_FILES[document["kind"]]
    if not definition.exists():
        pytest.skip(f"KEDA's definitions are not here: {definition}")
    found = yaml.safe_load(definition.read_text())
    schema = closed(found["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    (folder / "schema.json").write_text(json.dumps(schema))
    (folder / "document.json").write_text(json.dumps(document))
    program = shutil.which("check-jsonschema", path=sysconfig.get_path("scripts"))
    command = [program, "--schemafile", str(folder / "schema.json"), str(folder / "document.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise jsonschema.ValidationError(done.stdout)


def closed(schema):
    """The schema without keys that it does not define: the API server would drop them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return inner | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else inner


def pod_of(deployment):
    return deployment["spec"]["template"]["spec"]


def containers_of(deployment):
    pod = pod_of(deployment)
    return [*pod.get("initContainers", []), *pod["containers"]]


def selects(selector, labels):
    return selector.get("matchLabels", selector).items() <= labels.items()


def dangling(documents):
    """References to objects, labels and ports that the documents do not have."""
    names = {name_of(document) for document in documents}
    pods = [d["spec"]["template"] for d in documents if d["kind"] == "Deployment"]
    problems = []
    for document in documents:
        where, spec = name_of(document), document.get("spec", {})
        wanted = _references(document)
        problems += [f"{where}: there is no {name}" for name in wanted if name not in names]
        selector = spec.get("podSelector", spec.get("selector")) or {}
        of_services = document["kind"] == "ServiceMonitor"
        labelled = [d for d in documents if d["kind"] == "Service"] if of_services else pods
        chosen = [each for each in labelled if selects(selector, each["metadata"].get("labels", {}))]
        if "selector" in spec or "podSelector" in spec:
            problems += [] if chosen else [f"{where}: selects nothing"]
            problems += [f"{where}: there is no port {port}" for port in _ports(document) - _offered(chosen)]
        if document["kind"] == "Deployment":
            problems += _of_containers(where, document)
    return problems


def _references(document):
    """Names of objects, as `name_of` gives them, that must exist beside this one."""
    spec, kind = document.get("spec", {}), document["kind"]
    if kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        yield f"Deployment/{spec['scaleTargetRef']['name']}"
    for trigger in spec.get("triggers", []):
        yield f"TriggerAuthentication/{trigger['authenticationRef']['name']}"
    if kind == "Deployment":
        pod = pod_of(document)
        yield f"ServiceAccount/{pod['serviceAccountName']}"
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                yield f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}"
        for container in containers_of(document):
            for source in container.get("envFrom", []):
                yield f"ConfigMap/{source['configMapRef']['name']}"


def _ports(document):
    """Names of ports that the object expects of what it selects."""
    spec = document["spec"]
    rules = [port for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
    monitored = spec.get("endpoints", []) + spec.get("podMetricsEndpoints", [])
    targets = [port["targetPort"] for port in spec.get("ports", [])]
    return {port for port in [*(each["port"] for each in rules + monitored), *targets] if isinstance(port, str)}


def _offered(selected):
    """Names of the ports of Services, or of pod templates' containers."""
    containers = [c for each in selected for c in each["spec"].get("containers", [])]
    return {port["name"] for each in [*containers, *(s["spec"] for s in selected)] for port in each.get("ports", [])}


def _of_containers(where, deployment):
    spec = deployment["spec"]
    if not selects(spec["selector"], spec["template"]["metadata"]["labels"]):
        yield f"{where}: does not select its own pods"
    volumes = {volume["name"] for volume in pod_of(deployment)["volumes"]}
    for container in containers_of(deployment):
        ports = {port["name"] for port in container.get("ports", [])}
        probes = [container[key] for key in container if key.endswith("Probe")]
        yield from (f"{where}: no port {p['httpGet']['port']}" for p in probes if p["httpGet"]["port"] not in ports)
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        yield from (f"{where}: no volume {name}" for name in mounts - volumes)
