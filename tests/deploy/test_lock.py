"""`requirements/*.txt`: pinned by hash, in step with pyproject.toml, and the wheel that goes with them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPTIONS = dict(re.findall(r"^LOCK_(\S+) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
"""Options of uv by the name of the lock file."""
NAMES = [*OPTIONS, "build"]
PYTHONS = ("3.11", "3.12", "3.13")
REFRESH = "run `make lock` and commit requirements/"


def wanted(name):
    """The requirements that a lock file has to satisfy."""
    if name == "build":
        return [Requirement(text) for text in PYPROJECT["build-system"]["requires"]]
    found = list(PYPROJECT["project"]["dependencies"])
    for kind, value in re.findall(r"--(extra|group) (\S+)", OPTIONS[name]):
        found += PYPROJECT["project"]["optional-dependencies"][value] if kind == "extra" else group(value)
    return [Requirement(text) for text in found]


def group(name):
    return [
        text
        for entry in PYPROJECT["dependency-groups"][name]
        for text in ([entry] if isinstance(entry, str) else group(entry["include-group"]))
    ]


def pins(name):
    """Pinned requirements and their hashes."""
    text = (ROOT / f"requirements/{name}.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    split = [line.split(" --hash=") for line in lines]
    return [(Requirement(requirement.strip()), [each.strip() for each in hashes]) for requirement, *hashes in split]


def unsatisfied(requirements, pinned, python):
    """Requirements without a pin that Linux with this Python would install."""
    environment = {
        **{"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"},
        **{"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
        **{"implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": ""},
    }

    def applies(requirement):
        return requirement.marker is None or requirement.marker.evaluate(environment)

    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pinned if applies(pin)}
    return [
        str(requirement)
        for requirement in requirements
        if applies(requirement)
        and not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_lock_file_satisfies_pyproject(name, python):
    missing = unsatisfied(wanted(name), [pin for pin, _ in pins(name)], python)
    assert missing == [], f"requirements/{name}.txt lacks {', '.join(missing)}; {REFRESH}"


@pytest.mark.parametrize("name", NAMES)
def test_every_requirement_is_one_version_with_hashes_and_no_address(name):
    found = pins(name)
    assert len(found) >= len(wanted(name))
    for pin, hashes in found:
        assert pin.url is None
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)
    text = (ROOT / f"requirements/{name}.txt").read_text()
    assert re.search(r"://|--(extra-)?index-url|--find-links|@ ", text) is None


def test_the_input_of_the_build_lock_is_pyprojects():
    assert (ROOT / "requirements/build.in").read_text().split() == PYPROJECT["build-system"]["requires"]


@pytest.mark.parametrize(
    ("text", "pinned"),
    [
        ("a>=2", ["a==1.9 ; python_version >= '3.11'"]),
        ("a>=2", []),
        ("a>=2", ["a==2.0 ; sys_platform == 'win32'"]),
        ("a>=2,<3", ["a==3.0"]),
    ],
)
def test_a_lock_that_is_behind_is_detected(text, pinned):
    assert unsatisfied([Requirement(text)], [Requirement(pin) for pin in pinned], "3.12") != []


def test_a_wheel_has_the_same_bytes_whenever_and_wherever_it_is_built(tmp_path):
    digests = set()
    for name, modified in (("one", 1_700_000_000), ("two", 1_750_000_000)):
        copy = tmp_path / name
        for part in ("pyproject.toml", "README.md", "LICENSE", "worker"):
            source, target = ROOT / part, copy / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                copy.mkdir(exist_ok=True)
                shutil.copy(source, target)
        for path in copy.rglob("*"):
            os.utime(path, (modified, modified))
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(copy / "dist")]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1767225600"}
        subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120, env=environment)
        (wheel,) = (copy / "dist").glob("*.whl")
        digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(digests) == 1
