"""The kit for a machine with a GPU: order, time, what a call leaves and continues, and all of it end to end with tiny shapes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from compiling import COMPILE_FAST

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import benchmarks.gpu.__main__ as gpu  # noqa: E402
from benchmarks.gpu import work  # noqa: E402
from benchmarks.gpu.record import GPU_BOUNDS, completed, continued, write  # noqa: E402
from benchmarks.gpu.steps import STEPS, TESTS, Step, case_of  # noqa: E402
from benchmarks.gpu.work import absent, wrong_in  # noqa: E402
from benchmarks.speed.cases import CASES, METHODS, peft_variants  # noqa: E402

ABOUT = {
    "device": "gpu",
    "device_name": "H",
    "machine": {"cpu": "A CPU"},
    "versions": {"ours": {"jax": "0.11"}, "theirs": {}},
    "tiny": False,
    "no_peft": "",
}
THREE = (Step("peaks", "peaks", 20), Step("a", "speed", 40, needs="peaks"), Step("b", "tests", 40))


def record(**steps):
    return {**ABOUT, "steps": steps}


def done(result):
    return {"status": "done", "result": result}


class Clock:
    """Each step takes as long as `takes` says."""

    def __init__(self, **takes):
        self.now, self.takes, self.limits = 0.0, takes, {}

    def __call__(self):
        return self.now

    def perform(self, step, limit):
        self.now += self.takes[step.name]
        self.limits[step.name] = limit
        return done({"of": step.name})


def run(found, clock, seconds):
    kept = []
    gpu.run_steps(
        THREE,
        found,
        seconds=seconds,
        perform=clock.perform,
        keep=lambda: kept.append(list(found["steps"])),
        clock=clock,
    )
    return kept


def test_the_record_is_kept_after_each_step_and_what_does_not_fit_is_left_out():
    found, clock = record(), Clock(peaks=10, a=35, b=1)
    kept = run(found, clock, seconds=60)
    assert kept == [["peaks"], ["peaks", "a"], ["peaks", "a", "b"]]
    assert clock.limits == {"peaks": 20, "a": 40}
    assert found["steps"]["a"]["seconds"] == 35
    assert found["steps"]["b"] == {"status": "left out", "why": "15 s of --minutes were left, and it may take 40"}


def test_a_step_gets_what_is_left_of_the_time():
    clock = Clock(peaks=10, a=25, b=1)
    run(record(), clock, seconds=60)
    assert clock.limits["b"] == 25


def test_the_next_call_does_what_is_missing():
    found, clock = record(peaks=done({}), a={"status": "failed", "why": "?"}), Clock(a=1, b=1)
    run(found, clock, seconds=60)
    assert list(clock.limits) == ["a", "b"]


def test_without_its_peak_a_comparison_is_left_out_and_the_others_go_on(capsys):
    found, clock = record(), Clock(peaks=1, b=1)
    clock.perform = lambda step, limit: {"status": "failed", "why": "no"} if step.name == "peaks" else done({})
    run(found, clock, seconds=100)
    assert [entry["status"] for entry in found["steps"].values()] == ["failed", "left out", "done"]
    assert "it needs the step 'peaks'" in found["steps"]["a"]["why"]
    assert "peaks: failed in 0 s: no" in capsys.readouterr().out


def settings(tmp_path, **more):
    return {"tiny": True, "rounds": 1, "data": "no.tsv", "ours": None, "theirs": None, "folder": str(tmp_path),
            "device": "cpu", "no_peft": "", **more}  # fmt: skip


def one(name):
    return next(step for step in STEPS if step.name == name)


def test_a_step_that_fails_says_its_last_lines(tmp_path):
    entry = gpu.perform_in_a_process(one("together"), 60, settings(tmp_path, rounds="three"), record())
    assert entry["status"] == "failed"
    assert "Error" in entry["why"].splitlines()[-1]
    assert len(entry["why"].splitlines()) <= gpu.ERROR_LINES


def test_a_step_that_takes_too_long_is_stopped_and_keeps_what_it_has(tmp_path):
    (tmp_path / "peaks.json").write_text('{"result": {"so": "far"}, "skipped": "", "wrong": ""}')
    entry = gpu.perform_in_a_process(one("peaks"), 0.05, settings(tmp_path), record())
    assert entry == {"status": "failed", "why": "it was stopped after 0 s", "result": {"so": "far"}}


def test_a_variant_of_peft_that_fails_leaves_the_others(tmp_path, monkeypatch):
    tried, kept = [], []

    def compare(case, runners, **options):
        tried.append([runner.column for runner in runners])
        if "compile" in tried[-1]:
            raise work.RunnerError(runners[2], "Traceback\nno compiler\n")
        return {}

    monkeypatch.setattr(work, "compare", compare)
    monkeypatch.setattr(work, "row", lambda case, method, timings, config, *, offered, measured: offered)
    monkeypatch.setattr(work, "summary", lambda *args: "")
    (tmp_path / "bert-base-gpu" / "model").mkdir(parents=True)
    for name in ("check.npz", "model/config.json"):
        (tmp_path / "bert-base-gpu" / name).write_text("{}")
    work.speed(one("bert-base-128"), settings(tmp_path, peak=1.0), lambda *result: kept.append(result))
    assert tried == [["ours", "eager", "compile"], ["ours", "eager"]]
    rows = {"lora": {"eager": "", "compile": "it failed: no compiler"}}
    assert kept == [({"bert-base-gpu": rows}, "lora, PEFT compile: it failed: no compiler\n")]


def test_what_the_machine_lacks_is_skipped_with_the_way_out(tmp_path):
    entry = gpu.perform_in_a_process(one("packed"), 60, settings(tmp_path), record())
    assert entry == {"status": "skipped", "why": "--data no.tsv is not a file; give SST-2's whole sentences"}
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "sitecustomize.py").write_text("import sys; sys.modules['chex'] = None; sys.modules['xdist'] = None\n")
    entry = gpu.perform_in_a_process(one("tests"), 60, settings(tmp_path, ours=str(lacking)), record())
    assert entry["status"] == "skipped", entry
    assert entry["why"].startswith("xdist, chex not installed; put wheels of")


def test_a_module_that_is_missing_is_found_out():
    assert absent(("json", "no_such_module"), {"PYTHONPATH": ""}) == ["no_such_module"]


def test_a_record_is_written_whole_and_continued_only_on_its_machine(tmp_path):
    output = tmp_path / "new" / "results.json"
    assert continued(record(), output)["steps"] == {}
    write(record(peaks=done({"bfloat16": {}})), output)
    assert [path.name for path in output.parent.iterdir()] == ["results.json"]
    assert list(continued(record(), output)["steps"]) == ["peaks"]
    with pytest.raises(ValueError, match=r"has another tiny than this call; remove it"):
        continued({**record(), "tiny": True}, output)
    output.write_text("[]")
    with pytest.raises(ValueError, match=r"results\.json is not a record of benchmarks\.gpu; give another"):
        continued(record(), output)


def measured(over=1.1, share=0.5, compiled=1.4, gain=5.0):
    lora = {"ours": {"share_of_peak": share}, "ratios": {"compile": {"median": compiled}, "eager": {"median": 6.0}}}
    qlora = {"ours": {}, "ratios": {}, "step_over_lora": {"median": over}}
    return {
        "bert-base-128": done({"bert-base-gpu": {"lora": lora}}),
        "bert-base-128-stored": done({"bert-base-gpu": {"qlora": qlora}}),
        "minilm": done({"minilm-gpu": {"lora": lora}}),
        "together": done({"gain": gain}),
    }


@pytest.mark.parametrize("missed", [{"over": 1.2}, {"share": 0.4}, {"compiled": 1.2}, {"gain": 3.9}])
def test_a_bound_that_is_missed_is_status_1(missed, capsys):
    assert gpu.judge(record(**measured())) == 0
    assert "MISSED" not in capsys.readouterr().out
    assert gpu.judge(record(**measured(**missed))) == 1
    assert capsys.readouterr().out.count("MISSED") == 1
    assert gpu.judge({**record(**measured(**missed)), "tiny": True}) == 0


def test_the_steps_of_a_case_make_one_table_and_every_bound_has_its_step():
    whole = completed(record(**measured()))
    assert list(whole["cases"]["bert-base-gpu"]) == ["lora", "qlora"]
    assert len(whole["bounds"]) == len(GPU_BOUNDS) == 5


def test_a_failed_step_is_status_1_and_one_that_is_left_out_is_not():
    assert gpu.judge(record(tests={"status": "failed", "why": "?", "result": {}})) == 1
    assert gpu.judge(record(tests={"status": "skipped", "why": "?"}, minilm={"status": "left out", "why": "?"})) == 0


def test_the_steps_are_of_cases_methods_and_tests_that_exist():
    assert len({step.name for step in STEPS}) == len(STEPS)
    names = [step.name for step in STEPS]
    assert all(names.index(step.needs) < names.index(step.name) for step in STEPS if step.needs)
    compared = [step for step in STEPS if step.kind == "speed"]
    assert {CASES[step.case].name for step in compared} == {c.name for c in CASES.values() if c.device == "gpu"}
    for step in compared:
        assert (
            set(step.variants) <= set(peft_variants(CASES[step.case], step.methods[0], "gpu")) or len(step.methods) > 1
        )
        assert case_of(step, tiny=True).rows == 4
    checked = [method for step in STEPS if step.kind == "correctness" for method in step.methods]
    assert sorted(checked) == sorted(METHODS)
    assert all((ROOT / "tests" / name).is_file() for name in TESTS)


def test_what_is_wrong_in_a_result_is_found():
    assert wrong_in({"lora": {"wrong": ""}, "hira": {"wrong": "float32: too far"}}) == "hira float32: too far"
    assert wrong_in({"summary": "1 failed", "wrong": "pytest ended"}) == "pytest ended"


def test_a_step_may_differ_from_the_cpu_s_by_rounding_only():
    from benchmarks.gpu.correctness import judge

    good = {"float32": 1e-6, "bfloat16": 2e-2}
    assert judge(good) == {"errors": good, "wrong": ""}
    said = "float32: 2.00e-04 from the CPU's step, and 1e-04 is allowed"
    assert judge({**good, "float32": 2e-4})["wrong"] == said
    assert judge({"float32": float("nan"), "bfloat16": 6e-2})["wrong"].count("allowed") == 2


def test_bad_flags_are_refused(capsys):
    for flags, message in (
        (["--minutes", "0"], "--minutes must be above 0, not 0"),
        (["--rounds", "-1"], "--rounds must be above 0, not -1"),
        (["--steps", "peak"], "invalid choice: 'peak'"),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu.parse(flags)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "identify", lambda paths: ({**ABOUT, "device": "cpu"}, ""))
    assert gpu.main(["--output", str(tmp_path / "r.json")]) == 2
    assert (
        capsys.readouterr().err == "error: jax found no GPU, only a CPU; give --tiny to try the kit with tiny shapes\n"
    )


def test_a_side_that_does_not_start(monkeypatch, capsys, tmp_path):
    """Without jaxpeft's nothing is done; without PEFT's the rest is, and the record says why."""
    broken = RuntimeError("the worker failed:\nTraceback\nModuleNotFoundError: No module named 'rich'\n")

    def about(side, paths):
        if side in failing:
            raise broken
        return {"device": "gpu", "device_name": "H", "versions": {side: "1"}}

    monkeypatch.setattr(gpu, "_about", about)
    monkeypatch.setattr(gpu, "absent", lambda modules, env: [])
    failing = ["ours"]
    assert gpu.main(["--output", str(tmp_path / "r.json")]) == 2
    said = (
        "error: jaxpeft's side does not start: ModuleNotFoundError: No module named 'rich'; see --jaxpeft_pythonpath\n"
    )
    assert capsys.readouterr().err == said
    failing = ["theirs"]
    found, why = gpu.identify(gpu.Paths())
    assert found["versions"] == {"ours": {"ours": "1"}, "theirs": {}}
    assert why == "its side does not start: ModuleNotFoundError: No module named 'rich'; see --peft_pythonpath"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_texts_in_one_row_without_padding():
    pytest.importorskip("torch")
    import torch

    from benchmarks.speed.varlen import WAYS, choose, one_row

    ids = np.asarray([[1, 2, 0], [3, 0, 0], [4, 5, 6]])
    row = one_row({"input_ids": ids, "attention_mask": ids > 0, "labels": np.zeros(3)})
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert row["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert row["offsets"].tolist() == [0, 2, 3, 6]
    name, attend = choose("cpu", torch.float32)
    assert name.startswith(tuple(WAYS))
    query, key, value = torch.randn(3, 6, 2, 8)
    found = attend(query, key, value, torch.tensor([0, 2, 3, 6], dtype=torch.int32), 3)
    for start, end in ((0, 2), (2, 3), (3, 6)):
        parts = (x[start:end].transpose(0, 1) for x in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)
        torch.testing.assert_close(found[start:end], expected)


def test_if_no_attention_works_each_reason_is_said(monkeypatch):
    pytest.importorskip("torch")
    import torch

    from benchmarks.speed import varlen

    def broken(*args):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(varlen, "WAYS", {"one": broken, "two": broken})
    with pytest.raises(RuntimeError, match="on cpu: one: NotImplementedError: not on this device; two: NotImpl"):
        varlen.choose("cpu", torch.bfloat16)


@pytest.mark.slow
def test_the_kit_end_to_end(tmp_path, monkeypatch, capfd):
    """Every step with tiny shapes on the CPU, and a second call that has nothing to do."""
    pytest.importorskip("peft")
    tiny_runs.package_model()
    monkeypatch.setenv("XLA_FLAGS", COMPILE_FAST)  # one device
    data, output = tmp_path / "sentences.tsv", tmp_path / "results.json"
    data.write_text("".join(f"a {'very ' * i}good film\t{i % 2}\n" for i in range(12)))
    flags = ["--tiny", "--rounds", "1", "--minutes", "30", "--data", str(data), "--output", str(output)]
    assert gpu.main(flags) == 0, capfd.readouterr()
    found = json.loads(output.read_text())
    assert {name: entry["status"] for name, entry in found["steps"].items()} == {step.name: "done" for step in STEPS}
    assert set(found["cases"]["bert-base-gpu"]) == {"lora", "qlora", "sparse-lora", "hira", "full"}
    lora = found["cases"]["bert-base-gpu"]["lora"]
    assert set(lora["ratios"]) == {"eager", "compile"}
    assert found["cases"]["bert-base-gpu"]["qlora"]["step_over_lora"]["median"] > 0
    packed = found["cases"]["sst2-packed-gpu"]["lora"]
    assert "varlen" in packed["varlen"]["attention"]
    assert packed["ours"]["flops"] > 0
    assert found["steps"]["together"]["result"]["members"] == 2
    assert found["steps"]["correctness"]["result"]["qlora"]["wrong"] == ""
    assert found["bounds"] == []
    before = found["steps"]
    assert gpu.main(flags) == 0
    assert json.loads(output.read_text())["steps"] == before
