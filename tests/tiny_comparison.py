"""A comparison of tiny runs, interrupted and resumed, made once a session."""

import contextlib
import functools
import json
import signal

import pytest
import yaml

from jaxpeft import cli
from jaxpeft.comparison import jobs as jobs_module
from jaxpeft.comparison import worker

COMPARISON = {
    "name": "tiny",
    "seeds": [0, 1],
    "together": 3,
    "cost_steps": 20,
    "base": {
        "model": {"name": "base"},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"num_steps": 4, "batch_size": 4, "warmup_steps": 1, "log_every_steps": 1, "eval_every_steps": 2},
        "evaluation": {"batch_size": 8},
    },
    "tasks": {
        "statements": {
            "task": "classification",
            "data": {"train_file": "labels.tsv", "max_length": 16, "bucket_lengths": [16]},
        }
    },
    "methods": {
        "lora": {"learning_rates": [1e-3, 1e-2]},
        "sparse-lora": {"learning_rates": [1e-2], "pruning": {"sparsity": 0.5, "begin": 0.4}},
        "broken": {"learning_rates": [1e30]},
        "full": {"learning_rates": [1e-4], "adapter": {"method": "full", "rank": None, "alpha": None}},
        "head": {"learning_rates": [1e-2], "adapter": {"method": "head", "rank": None, "alpha": None}},
    },
    "forgetting": {
        "data": {"name": None, "train_file": "train.txt", "validation_file": "validation.txt", "max_length": 16},
        "max_rows": 4,
        "head_steps": 10,
    },
}


class Jobs:
    """Does the jobs of a comparison in this process, and remembers them."""

    def __init__(self, *, stop_after=None):
        self.done, self.stop_after = [], stop_after

    def __call__(self, job, **environment):
        if self.stop_after is not None and len(self.done) == self.stop_after:
            raise SystemExit(128 + signal.SIGTERM)
        self.done.append(job)
        return f"status {status}" if (status := worker.do(json.loads(json.dumps(job)))) else None

    @property
    def trained(self):
        return [[run["name"] for run in job["runs"]] for job in self.done if job["do"] == "train"]


def compare(root, jobs, *flags):
    (root / "compare.yaml").write_text(yaml.safe_dump(COMPARISON))
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_module, "do", jobs)
        cli.main(["compare", "--config", "compare.yaml", *flags])
    return root / "runs" / "tiny"


@functools.cache
def compared(root):
    """Stopped after two jobs, then done to its end: its directory, and the jobs before and after."""
    first, second = Jobs(stop_after=2), Jobs()
    with pytest.raises(SystemExit) as stopped:
        compare(root, first)
    assert stopped.value.code == 128 + signal.SIGTERM
    return compare(root, second), first, second
