"""`deploy/` against its linters and the worker: settings, commands, timeouts, exit codes."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from worker.cli import command_line
from worker.config import ServiceSection, load_settings
from worker.errors import ConfigInvalid

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
COMPOSE = ROOT / "deploy/compose.yaml"
UNIT = ROOT / "deploy/worker.service"
RESET = "!reset"


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's tag `!reset`, which removes a key of the file that is overridden."""


ComposeLoader.add_constructor(RESET, lambda loader, node: RESET)
CPU_ONLY = yaml.load((ROOT / "deploy/compose.cpu.yaml").read_text(), ComposeLoader)


def merged(below, above):
    """Merge two Compose files as far as the override needs it: maps by key, `!reset` removes."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    joined = below | {key: merged(below.get(key), value) for key, value in above.items()}
    return {key: value for key, value in joined.items() if value != RESET}


def tool(name):
    """Return a program beside this Python or on PATH; skip the test if there is none."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def passes(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def instructions():
    """Instructions of the Dockerfile, continuation lines joined: (name, rest)."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.fixture(scope="module")
def last_stage(instructions):
    last = max(at for at, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.fixture(scope="module")
def unit():
    """Keys of the unit and their values, in order."""
    found = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def environment(text):
    return dict(assignment.split("=", 1) for assignment in shlex.split(text))


def accepted(command, settings, monkeypatch, config=None):
    """Return the command's settings; fail if the command, an option or a setting is unknown."""
    name, *options = command
    known = {opt for param in click_command(name).params for opt in param.opts}
    assert [option for option in options if option.startswith("--") and option not in known] == []
    for key, value in settings.items():
        if key.startswith(("WORKER_", "XDG_")):
            monkeypatch.setenv(key, re.sub(r"\$\{.*\}", "smollm2", value))
    return load_settings(config)


def click_command(name):
    return click_commands()[name]


def click_commands():
    from typer.main import get_command

    return get_command(command_line()).commands


def test_the_dockerfile_passes_its_linter():
    passes(tool("hadolint"), "--no-color", str(DOCKERFILE))


def test_the_compose_file_fits_the_compose_specification():
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


def test_the_override_without_a_gpu_changes_existing_services_and_removes_the_gpu(services, tmp_path, monkeypatch):
    assert CPU_ONLY["services"].keys() <= services.keys()
    both = merged(yaml.safe_load(COMPOSE.read_text()), CPU_ONLY)
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(both))
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(tmp_path / "compose.yaml"))
    worker = both["services"]["worker"]
    assert "deploy" not in worker
    assert accepted(["run"], worker["environment"], monkeypatch).engine.backend == "cpu"
    for name in ("pull", "worker", "gateway"):
        service = both["services"][name]
        assert service["image"] != services[name]["image"]
        assert service["build"] == {**services[name]["build"], "args": {"EXTRA": "cpu"}}


@pytest.mark.parametrize("name", ["redis", "worker", "gateway", "prometheus", "grafana"])
def test_compose_confines_each_service_and_publishes_its_ports_on_loopback_only(services, name):
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "build" in service or re.search(r":v?\d+\.\d+\.\d+[\w-]*@sha256:[0-9a-f]{64}$", service["image"])
    assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_compose_mounts_files_that_exist(services, name):
    sources = [volume.split(":")[0] for volume in services[name]["volumes"]]
    assert [source for source in sources if source.startswith("./") and not (COMPOSE.parent / source).exists()] == []


def test_prometheus_scrapes_the_services_of_compose_at_their_ports(services, monkeypatch):
    config = yaml.safe_load((COMPOSE.parent / "prometheus/prometheus.yaml").read_text())
    targets = [
        target for job in config["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    ]
    settings = accepted(["run"], services["worker"]["environment"], monkeypatch)
    assert sorted(targets) == [f"gateway:{settings.gateway.port}", f"worker:{settings.http.port}"]
    assert {target.split(":")[0] for target in targets} <= services.keys()


@pytest.fixture
def installed_unit(tmp_path):
    """The unit with a program that exists on this machine."""
    path = tmp_path / "worker.service"
    path.write_text(UNIT.read_text().replace("/opt/worker/bin/worker", "/bin/true"))
    return path


def test_systemd_accepts_the_unit(installed_unit):
    done = passes(tool("systemd-analyze"), "verify", "--man=no", str(installed_unit))
    assert done.stderr == ""  # an unknown key is only a warning, with exit code 0


def test_the_unit_passes_systemds_security_threshold(installed_unit):
    passes(tool("systemd-analyze"), "security", "--offline=true", "--threshold=40", str(installed_unit))


def test_the_image_runs_as_an_unprivileged_user_and_has_a_health_check(last_stage):
    directives = dict(last_stage)
    assert directives["USER"].isdigit()
    assert int(directives["USER"]) > 0
    assert directives["HEALTHCHECK"].endswith('CMD ["worker", "health"]')


def test_the_image_has_a_lock_file_for_each_extra_and_copies_files_that_are_not_ignored(instructions):
    (default,) = (rest.removeprefix("EXTRA=") for name, rest in instructions if rest.startswith("EXTRA="))
    described = re.findall(r"EXTRA=([\w-]+)", DOCKERFILE.read_text())
    assert default == "gpu"
    for extra in (*described, *CPU_ONLY["x-image"]["build"]["args"].values()):
        assert (ROOT / f"requirements/{extra}.txt").exists()
    ignored = Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()
    sources = [s for name, rest in instructions if name == "COPY" and "--from" not in rest for s in rest.split()[:-1]]
    assert {"worker", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored


def test_the_image_runs_a_command_with_valid_settings(last_stage, monkeypatch):
    directives = dict(last_stage)
    command = yaml.safe_load(directives["CMD"])
    config = ROOT / command[command.index("--config") + 1].replace("/etc/worker", "configs")
    settings = accepted(command, environment(directives["ENV"]), monkeypatch, config)
    assert settings.http.host == "0.0.0.0"
    assert int(directives["EXPOSE"]) == settings.http.port


def test_models_and_compiled_kernels_are_on_the_volume(last_stage, services, monkeypatch):
    directives = dict(last_stage)
    volume, variables = directives["VOLUME"], environment(directives["ENV"])
    monkeypatch.setenv("XDG_CACHE_HOME", variables["XDG_CACHE_HOME"])
    settings = load_settings(ROOT / "configs/h100.toml")
    assert settings.hub.cache.is_relative_to(volume)
    assert settings.engine.kernel_cache.is_relative_to(volume)
    assert Path(variables["CUPY_CACHE_DIR"]).is_relative_to(volume)
    assert f"worker-cache:{volume}" in services["worker"]["volumes"]


def test_the_compose_worker_has_valid_settings_and_a_gpu(services, monkeypatch):
    worker = services["worker"]
    settings = accepted(["run"], worker["environment"], monkeypatch)
    assert settings.redis.url == "redis://redis:6379/0"
    assert settings.model.path == "smollm2"
    devices = worker["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert worker["healthcheck"]["test"] == ["CMD", "worker", "health"]
    assert worker["depends_on"]["redis"]["condition"] == "service_healthy"
    assert worker["depends_on"]["pull"]["condition"] == "service_completed_successfully"
    assert (COMPOSE.parent / worker["build"]["context"] / worker["build"]["dockerfile"]).resolve() == DOCKERFILE


@pytest.mark.parametrize(
    ("model", "pulled"),
    [("smollm2", ["pull smollm2"]), ("hf:a/b/c d.gguf", ["pull hf:a/b/c d.gguf"]), ("/models/x.gguf", [])],
)
def test_compose_pulls_a_model_that_has_a_name_and_leaves_a_path_alone(services, tmp_path, model, pulled):
    pull, worker = services["pull"], services["worker"]
    assert set(pull["volumes"]) <= set(worker["volumes"])
    assert pull["environment"]["MODEL"] == worker["environment"]["WORKER_MODEL__PATH"]
    record = tmp_path / "worker"
    record.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    record.chmod(0o755)
    command = [part.replace("$$", "$") for part in pull["entrypoint"]]
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(command, env={"MODEL": model, "PATH": path}, check=True, timeout=10)
    calls = tmp_path / "calls"
    assert (calls.read_text().splitlines() if calls.exists() else []) == pulled
    assert "pull" in click_commands()


def test_containers_have_an_init_process_and_no_privileges(services):
    for name in ("pull", "worker"):
        assert services[name]["init"] is True
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]


def test_the_compose_server_persists_data_and_evicts_nothing(services):
    redis = services["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert options == {"--appendonly": "yes", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction"}
    assert redis["volumes"] == ["redis-data:/data"]
    assert redis["ports"] == ["127.0.0.1:6379:6379"]  # it has no password


def test_the_unit_runs_a_command_with_valid_settings(unit, monkeypatch):
    _, *command = unit["ExecStart"][0].split()
    variables = environment(" ".join(unit["Environment"]).replace("%C", "/var/cache"))
    settings = accepted(command, variables, monkeypatch)
    assert str(settings.hub.cache) == f"/var/cache/{unit['CacheDirectory'][0]}"
    assert settings.log.format == "json"


def test_compose_and_systemd_wait_longer_than_the_grace_period_before_killing(services, unit):
    grace_s = ServiceSection().grace_s
    assert int(unit["TimeoutStopSec"][0]) > grace_s + 5
    assert int(services["worker"]["stop_grace_period"].removesuffix("s")) > grace_s + 5


def test_the_unit_restarts_unless_the_settings_are_invalid(unit):
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == [str(ConfigInvalid.exit_code)]


def test_the_unit_allows_the_devices_of_cuda(unit):
    allowed = [value.split()[0] for value in unit["DeviceAllow"]]
    for group in ("char-nvidia-frontend", "char-nvidia", "char-nvidia-uvm", "char-nvidia-caps"):
        assert any(fnmatch.fnmatch(group, pattern) for pattern in allowed)
    for forbidden in ("PrivateDevices", "ProcSubset", "MemoryDenyWriteExecute"):
        assert forbidden not in unit


def test_compose_starts_a_gateway_that_other_hosts_reach_and_that_may_finish_its_streams(services, monkeypatch):
    service = services["gateway"]
    section = accepted(service["command"], service["environment"], monkeypatch).gateway
    assert section.host == "0.0.0.0"
    assert service["ports"] == [f"127.0.0.1:{section.port}:{section.port}"]
    assert f":{section.port}/health" in service["healthcheck"]["test"][-1]
    assert int(service["stop_grace_period"].removesuffix("s")) > section.grace_s


def test_the_image_is_built_of_pinned_parts_only(instructions):
    bases = {rest.split(" AS ")[0] for name, rest in instructions if name == "FROM"}
    (base,) = bases
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    steps = [step for name, rest in instructions if name == "RUN" for step in rest.split("&&")]
    for step in steps:
        if " install --" in step and "/pip" in step:
            assert "--require-hashes" in step or {"--no-deps", "--no-index"} <= set(step.split())
        assert "apt-get" not in step
    assert any("SOURCE_DATE_EPOCH=" in rest for name, rest in instructions if name == "ARG")
