"""The package `instructor`, in a virtual environment of its own: it requires an older openai."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENT = "instructor>=1.17"
SCRIPT = """
import json, sys
import instructor, openai
from pydantic import BaseModel

class City(BaseModel):
    name: str
    capital: bool

url, question = sys.argv[1:]
client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
messages = [{"role": "user", "content": question}]
fields = {"model": "SmolLM2", "messages": messages, "max_tokens": 80, "temperature": 0, "max_retries": 0}
print(client.chat.completions.create(response_model=City, **fields).model_dump_json())
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the package."""
    folder = tmp_path_factory.mktemp("instructor")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", REQUIREMENT], check=True)
    return python


async def test_an_answer_is_parsed_into_a_model(smollm2_gate, python: Path) -> None:
    command = [python, "-c", SCRIPT, f"{smollm2_gate.url}/v1", "Answer in JSON. Name a city."]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert set(json.loads(output)) == {"name", "capital"}
