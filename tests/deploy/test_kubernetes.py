"""`deploy/kubernetes/`: schemas, references, and what the worker and the gateway need of a cluster."""

from __future__ import annotations

import json
import re
import subprocess
from functools import reduce

import jsonschema
import kubernetes_validate
import pytest
import yaml

import worker
from tests.deploy.manifests import BASE, base, check, containers_of, dangling, find, name_of, pod_of
from tests.deploy.test_deploy import accepted, tool
from worker.jobs.keys import queue_key
from worker.redis_url import PORT, SENTINEL_PORT

OVERLAYS = BASE.parent / "overlays"
PROMETHEUS = BASE.parents[1] / "prometheus"
DOCUMENTS = base()
NAMES = [name_of(document) for document in DOCUMENTS]
KINDS = sorted({document["kind"] for document in DOCUMENTS})
GROUPS_OF_OPERATORS = ("keda.sh", "monitoring.coreos.com")

MISTAKES = {
    "ConfigMap": ("data.KEY", ["a list"]),
    "Deployment": ("spec.template.spec.containers.0.livenessProbe.periodSecond", 10),
    "HorizontalPodAutoscaler": ("spec.maxReplicas", "ten"),
    "Namespace": ("metadata.labels", ["restricted"]),
    "NetworkPolicy": ("spec.policyTypes", "Egress"),
    "PersistentVolumeClaim": ("spec.accessModes", "ReadWriteMany"),
    "PodDisruptionBudget": ("spec.maxUnavaible", 1),
    "PodMonitor": ("spec.podMetricsEndpoints.0.intervall", "15s"),
    "PrometheusRule": ("spec.groups.0.rules.0.expression", "up == 0"),
    "ScaledObject": ("spec.minReplicas", 0),
    "Service": ("spec.ports.0.port", "http"),
    "ServiceAccount": ("automountServiceAccountToken", "no"),
    "ServiceMonitor": ("spec.endpoints.0.interval", "15 seconds"),
    "TriggerAuthentication": ("spec.secretTargetRef.0.key", None),
}
"""For each kind a place, and a value that its schema must refuse there; None removes the key."""


def seeded(document, path, value):
    """Put a value at a path of keys and indices; None deletes the key."""
    *outer, last = (int(key) if key.isdigit() else key for key in path.split("."))
    holder = reduce(lambda inner, key: inner[key], outer, document)
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return document


@pytest.mark.parametrize("name", NAMES)
def test_every_object_fits_the_schema_of_its_kind(name, tmp_path):
    check(find(base(), name), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_of_every_kind_refuses_a_wrong_key_or_value(kind, tmp_path):
    document = next(each for each in base() if each["kind"] == kind)
    with pytest.raises(jsonschema.ValidationError):
        check(seeded(document, *MISTAKES[kind]), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_of_every_kind_refuses_an_unknown_top_level_key(kind, tmp_path):
    document = next(each for each in base() if each["kind"] == kind)
    with pytest.raises(jsonschema.ValidationError):
        check({**document, "specification": {}}, tmp_path)


def test_a_kind_without_a_schema_is_an_error_and_not_skipped(tmp_path):
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({**find(base(), "Deployment/worker"), "kind": "Deploiment"}, tmp_path)


def test_every_file_of_the_base_is_one_of_its_resources():
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in BASE.iterdir() if path.name != "kustomization.yaml")


def test_every_reference_between_objects_resolves():
    assert dangling(DOCUMENTS) == []
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    ("name", "path", "value", "problem"),
    [
        (
            "Deployment/worker",
            "spec.template.metadata.labels",
            {"a": "b"},
            "Deployment/worker: does not select its own",
        ),
        ("Deployment/worker", "spec.template.spec.serviceAccountName", "x", "there is no ServiceAccount/x"),
        ("Deployment/worker", "spec.template.spec.volumes.0.persistentVolumeClaim.claimName", "x", "no Persistent"),
        ("Deployment/worker", "spec.template.spec.containers.0.envFrom.0.configMapRef.name", "x", "no ConfigMap/x"),
        ("Deployment/worker", "spec.template.spec.containers.0.livenessProbe.httpGet.port", "x", "no port x"),
        ("Deployment/gateway", "spec.template.spec.containers.0.volumeMounts.0.name", "x", "no volume x"),
        ("Service/gateway", "spec.selector", {"a": "b"}, "Service/gateway: selects nothing"),
        ("Service/gateway", "spec.ports.0.targetPort", "x", "Service/gateway: there is no port x"),
        ("HorizontalPodAutoscaler/gateway", "spec.scaleTargetRef.name", "x", "there is no Deployment/x"),
        ("PodDisruptionBudget/worker", "spec.selector.matchLabels", {"a": "b"}, "selects nothing"),
        ("NetworkPolicy/gateway-clients", "spec.podSelector.matchLabels", {"a": "b"}, "selects nothing"),
        ("NetworkPolicy/scrapes", "spec.ingress.0.ports.0.port", "x", "there is no port x"),
        ("PodMonitor/worker", "spec.podMetricsEndpoints.0.port", "x", "PodMonitor/worker: there is no port x"),
        ("ServiceMonitor/gateway", "spec.selector.matchLabels", {"a": "b"}, "ServiceMonitor/gateway: selects nothing"),
        ("ScaledObject/worker", "spec.scaleTargetRef.name", "x", "there is no Deployment/x"),
        ("ScaledObject/worker", "spec.triggers.0.authenticationRef.name", "x", "there is no TriggerAuthentication/x"),
    ],
)
def test_a_dangling_reference_is_found(name, path, value, problem):
    documents = base()
    seeded(find(documents, name), path, value)
    assert any(problem in found for found in dangling(documents))


@pytest.mark.parametrize("name", ["worker", "gateway"])
def test_pods_run_unprivileged_on_a_read_only_root_without_a_token(name):
    deployment = find(DOCUMENTS, f"Deployment/{name}")
    pod = pod_of(deployment)
    assert pod["automountServiceAccountToken"] is False
    assert find(DOCUMENTS, f"ServiceAccount/{pod['serviceAccountName']}")["automountServiceAccountToken"] is False
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert not any("hostPath" in volume for volume in pod["volumes"])
    for container in containers_of(deployment):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"]["requests"].keys()
        assert {"memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()


def test_the_user_of_the_pods_is_that_of_the_image():
    text = (BASE.parents[1] / "Dockerfile").read_text()
    for name in ("worker", "gateway"):
        context = pod_of(find(DOCUMENTS, f"Deployment/{name}"))["securityContext"]
        assert f"--uid {context['runAsUser']}" in text
        assert f"--gid {context['runAsGroup']}" in text


def test_a_worker_has_one_gpu_and_an_update_needs_no_second_one():
    deployment = find(DOCUMENTS, "Deployment/worker")
    resources = pod_of(deployment)["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1
    rolling = deployment["spec"]["strategy"]
    assert rolling == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


def settings_of(name, command, monkeypatch):
    """Settings of a Deployment's container, its ConfigMaps and literal variables included."""
    container = pod_of(find(DOCUMENTS, f"Deployment/{name}"))["containers"][0]
    variables = {}
    for source in container["envFrom"]:
        variables |= find(DOCUMENTS, f"ConfigMap/{source['configMapRef']['name']}")["data"]
    variables |= {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert container["args"] == command
    return accepted(command, variables, monkeypatch), container


def test_the_worker_has_valid_settings_its_folders_are_mounted_and_the_model_is_read_only(monkeypatch):
    settings, container = settings_of("worker", ["run"], monkeypatch)
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts[str(settings.hub.cache)] is True
    assert mounts[str(settings.engine.kernel_cache)] is False
    (pull,) = pod_of(find(DOCUMENTS, "Deployment/worker"))["initContainers"]
    assert str(settings.hub.cache) in [m["mountPath"] for m in pull["volumeMounts"] if not m.get("readOnly")]
    assert container["ports"] == [{"name": "http", "containerPort": settings.http.port}]
    assert settings.http.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("model", "pulled"), [("smollm2", "pull smollm2\n"), ("hf:a/b/c d.gguf", "pull hf:a/b/c d.gguf\n"), ("/x.gguf", "")]
)
def test_the_init_container_pulls_a_model_that_has_a_name_and_leaves_a_path_alone(tmp_path, model, pulled):
    program, calls = tmp_path / "worker", tmp_path / "calls"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    calls.touch()
    (pull,) = pod_of(find(DOCUMENTS, "Deployment/worker"))["initContainers"]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WORKER_MODEL__PATH": model}
    subprocess.run(pull["command"], env=variables, timeout=60, check=True)
    assert calls.read_text() == pulled


def test_probes_use_the_pages_that_worker_and_gateway_have():
    worker_container = pod_of(find(DOCUMENTS, "Deployment/worker"))["containers"][0]
    paths = [worker_container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")]
    assert paths == ["/readyz", "/livez", "/readyz"]
    gateway = pod_of(find(DOCUMENTS, "Deployment/gateway"))["containers"][0]
    paths = [gateway[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")]
    assert paths == ["/metrics", "/metrics", "/health"]  # /health is 503 without the Redis server


def test_pods_are_killed_only_after_the_grace_period_of_their_settings(monkeypatch):
    settings, container = settings_of("worker", ["run"], monkeypatch)
    pod = pod_of(find(DOCUMENTS, "Deployment/worker"))
    assert pod["terminationGracePeriodSeconds"] > settings.service.grace_s + 10
    assert container["lifecycle"]["preStop"]["exec"]["command"][0] == "sh"
    settings, container = settings_of("gateway", ["gateway"], monkeypatch)
    _, delay_s = container["lifecycle"]["preStop"]["exec"]["command"]
    pod = pod_of(find(DOCUMENTS, "Deployment/gateway"))
    assert pod["terminationGracePeriodSeconds"] > settings.gateway.grace_s + int(delay_s) + 10


def test_the_gateway_has_api_keys_and_takes_requests_for_the_model_while_no_worker_runs(monkeypatch):
    settings, container = settings_of("gateway", ["gateway"], monkeypatch)
    folder = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "keys")
    assert settings.gateway.api_keys.startswith(f"{folder}/")
    assert settings.gateway.host == "0.0.0.0"
    served = find(DOCUMENTS, "ConfigMap/worker-settings")["data"]
    assert settings.gateway.models == (served["WORKER_MODEL__NAME"],)
    assert settings.redis.queue == served["WORKER_REDIS__QUEUE"]


def test_keda_scales_to_zero_by_the_length_of_the_queue_that_the_workers_serve(monkeypatch):
    settings, _ = settings_of("worker", ["run"], monkeypatch)
    spec = find(DOCUMENTS, "ScaledObject/worker")["spec"]
    assert spec["minReplicaCount"] == 0
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "redis-streams"
    assert trigger["metadata"]["stream"] == queue_key(settings.redis.queue)
    assert int(trigger["metadata"]["streamLength"]) == settings.engine.max_running
    assert not {"consumerGroup", "lagCount", "pendingEntriesCount", "password"} & trigger["metadata"].keys()
    assert "replicas" not in find(DOCUMENTS, "Deployment/worker")["spec"]


def test_everything_is_denied_that_no_network_policy_allows():
    policies = [document for document in DOCUMENTS if document["kind"] == "NetworkPolicy"]
    deny = find(policies, "NetworkPolicy/default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies:
        rules = [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
        assert all(rule.get("ports") for rule in rules), "a rule without ports allows all of them"
        assert all("from" in rule for rule in policy["spec"].get("ingress", []))
    downloads = find(policies, "NetworkPolicy/model-downloads")["spec"]["egress"][0]
    assert "169.254.0.0/16" in downloads["to"][0]["ipBlock"]["except"]  # the cloud's metadata service


def test_the_ports_of_each_server_that_a_setting_may_name_are_open():
    policies = [document for document in DOCUMENTS if document["kind"] == "NetworkPolicy"]
    opened = {
        port["port"]
        for policy in policies
        if policy["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "worker-orcd"}}
        for rule in policy["spec"].get("egress", [])
        if "to" not in rule
        for port in rule["ports"]
    }
    assert opened == {PORT, 6380, SENTINEL_PORT, 4318}  # of TLS, and of OTLP over HTTP


def test_the_image_has_the_version_of_the_package():
    (image,) = yaml.safe_load((BASE / "kustomization.yaml").read_text())["images"]
    assert image == {"name": "worker-orcd", "newTag": worker.__version__}


def jobs_of_monitors(documents):
    """The label `job` of the series of each monitor."""
    for document in documents:
        for endpoint in document["spec"].get("podMetricsEndpoints", []) + document["spec"].get("endpoints", []):
            yield {each["targetLabel"]: each["replacement"] for each in endpoint["relabelings"]}["job"]


def test_monitors_give_the_label_job_that_rules_match_and_compose_has():
    monitors = [document for document in DOCUMENTS if document["kind"] in ("PodMonitor", "ServiceMonitor")]
    jobs = set(jobs_of_monitors(monitors))
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())["scrape_configs"]
    assert jobs == {each["job_name"] for each in scraped}
    matched = re.findall(r'\bjob=~?"([^"]+)"', (PROMETHEUS / "rules.yaml").read_text())
    assert matched
    assert {job for pattern in matched for job in pattern.split("|")} <= jobs


def test_the_prometheus_rule_has_the_alerts_of_the_rule_file():
    written = find(DOCUMENTS, "PrometheusRule/worker")["spec"]
    assert written == yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())


def test_the_server_of_the_trial_is_the_pinned_image_of_compose():
    deployment = next(yaml.safe_load_all((OVERLAYS / "trial/redis.yaml").read_text()))
    (container,) = pod_of(deployment)["containers"]
    compose = yaml.safe_load((BASE.parents[1] / "compose.yaml").read_text())
    assert container["image"] == compose["services"]["redis"]["image"]


def rendered(folder):
    """What kubectl makes of a kustomization; the test skips where kubectl is missing."""
    command = [tool("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return list(yaml.safe_load_all(done.stdout))


def test_kustomize_renders_the_objects_that_the_other_tests_check():
    found = rendered(BASE)
    kinds = ("ConfigMap",)  # their names get a digest
    assert {name_of(d) for d in found if d["kind"] not in kinds} == {n for n in NAMES if not n.startswith(kinds)}
    assert {d["metadata"]["namespace"] for d in found if d["kind"] != "Namespace"} == {"inference"}


@pytest.mark.parametrize("name", ["core", "trial"])
def test_overlays_need_no_operator_and_their_objects_fit_their_schemas(name, tmp_path):
    found = rendered(OVERLAYS / name)
    for document in found:
        assert not document["apiVersion"].startswith(GROUPS_OF_OPERATORS)
        check(document, tmp_path)
    assert find(found, "Deployment/worker")["spec"]["replicas"] == 1


def test_the_trial_needs_no_gpu_and_no_secret_of_others():
    found = rendered(OVERLAYS / "trial")
    assert "nvidia.com/gpu" not in json.dumps(
        find(found, "Deployment/worker")["spec"]["template"]["spec"]["containers"]
    )
    secrets = {d["metadata"]["name"] for d in found if d["kind"] == "Secret"}
    deployments = [d for d in found if d["kind"] == "Deployment"]
    named = [
        each["valueFrom"]["secretKeyRef"]
        for deployment in deployments
        for container in containers_of(deployment)
        for each in container.get("env", [])
        if "secretKeyRef" in each.get("valueFrom", {})
    ]
    assert {ref["name"] for ref in named if not ref.get("optional")} <= secrets
