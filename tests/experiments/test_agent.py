"""A real agent of W&B, against the few answers of a server that it needs."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from experiments.grid import make_runs, read_sweep

ROOT = Path(__file__).parents[2]
TEXT = """
method: grid
metric: {name: eval/scene_accuracy, goal: maximize}
command: ["${env}", "${interpreter}", -m, experiments.run, "${args}"]
parameters:
  paper: {values: [paella, vq_diffusion, improved_vqd, muse, ldmae]}
  scale: {value: micro}
  data.shards: {value: null}
  sampling: {parameters: {steps: {value: 3}}}
"""


class Answers:
    """What the server of a sweep knows: its file, and the points that no agent has had.

    Args:
        text: the file.
    """

    def __init__(self, text: str) -> None:
        table = yaml.safe_load(text)["parameters"]
        values = [given.get("values", [given.get("value")]) for given in table.values()]
        steps = table["sampling"]["parameters"]["steps"]["value"]
        points = (dict(zip(table, chosen, strict=True)) for chosen in itertools.product(*values))
        self.points = [{**point, "sampling": {"steps": steps}} for point in points]
        self.text, self.given = text, 0

    def of(self, operation: str) -> dict[str, Any]:
        """Answer an operation of GraphQL by its name."""
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "a"}}}
        if operation == "Heartbeat":
            order: dict[str, Any] = {"type": "exit"}
            if self.given < len(self.points):
                point = self.points[self.given].items()
                args = {name: {"value": value} for name, value in point}
                order = {"type": "run", "run_id": f"r{self.given}", "program": "", "args": args}
                self.given += 1
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps([order])}}
        sweep = {"id": "s", "name": "s", "state": "RUNNING", "config": self.text}
        return {
            "viewer": {"entity": "e", "username": "u", "teams": {"edges": []}},
            "serverInfo": {"features": []},
            "project": {"sweep": {**sweep, "runs": {"edges": []}}},
        }


@contextmanager
def served(answers: Answers) -> Iterator[dict[str, str]]:
    """Answer on this machine alone; gives the environment that leads an agent there."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            operation = re.search(r"(?:query|mutation)\s+(\w+)", json.loads(body)["query"])
            assert operation is not None
            data = json.dumps({"data": answers.of(operation[1])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
        }
    finally:
        server.shutdown()
        server.server_close()


def test_a_real_agent_plans_every_point_as_a_sweep_here_does(tmp_path: Path) -> None:
    """The runs only plan: their stages are known by what they are made of."""
    (tmp_path / "s.yaml").write_text(TEXT)
    runs = make_runs(read_sweep(tmp_path / "s.yaml"), [], None)[1]
    answers = Answers(TEXT.replace("experiments.run,", "experiments.run, --dry-run, --json,"))
    agent = [sys.executable, "-m", "wandb", "agent", "e/p/s"]
    with served(answers) as environment:
        said = subprocess.run(
            agent,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert said.returncode == 0, said.stderr
    planned = [json.loads(found) for found in re.findall(r"^\[$.*?^\]$", said.stdout, re.M | re.S)]
    assert [[stage["key"] for stage in stages] for stages in planned] == [
        [stage.key for stage in run.plan.stages] for run in runs
    ]
    assert answers.given == len(runs) == 5
