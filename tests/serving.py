"""`hybrid serve` as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

KEY = "s3cret"


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def client(self, **options: object) -> openai.OpenAI:
        settings = {"base_url": self.base_url, "api_key": KEY, "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(**settings)  # type: ignore[arg-type]

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=KEY, max_retries=0, timeout=120)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from cli.main import main; main()", *arguments]


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    """`hybrid serve` with these arguments on some free port, once it listens."""
    process = subprocess.Popen(
        command("serve", *map(str, arguments), "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HYBRID_API_KEY": KEY},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        yield Server(process, line.split()[-1])
    finally:
        process.kill()
        process.communicate()
