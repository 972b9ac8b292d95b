"""Rows of devices.toml, the user's own file, and what a pinned row changes: the price, never where it runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import mpcompile.hardware as here
from mpcompile import mpcompile
from mpcompile.devices import PLACE, Device, built_in, device, own_path, pinned, rows, write_row
from mpcompile.errors import RuleError
from mpcompile.formats import LOW
from mpcompile.hardware import cuda_row, resolve_policy, row_name
from mpcompile.policy import Policy
from mpcompile.tools.doctor import _measured

NAMES = ("cpu", "cpu-avx512-bf16", "cpu-amx", "cuda", "h200", "h100", "a100", "t4", "cpu-onnx", "cuda-onnx", "free-low")
ROW = "fp32 = 1e11\nbf16 = {bf16}\nfp16 = {fp16}\nbandwidth = 1e10\nlaunch = 2e-6\n"
SLOW = ROW.format(bf16="5e10", fp16="1e9")


@pytest.mark.parametrize("name", sorted({*NAMES, *built_in()}))
def test_every_row_is_there_and_says_where_its_numbers_are_from(name: str) -> None:
    row = pinned(name)
    assert row.name == name
    assert row.source
    assert all(0 < rate < math.inf for rate in (row.fp32, row.bf16, row.fp16, row.bandwidth, row.launch))


@pytest.mark.parametrize(("name", "low"), [("cpu", "bf16"), ("h200", "bf16"), ("a100", "bf16"), ("t4", "fp16"),
                                           ("free-low", "bf16")])  # fmt: skip
def test_auto_is_what_a_pinned_row_does_faster(name: str, low: str) -> None:
    assert resolve_policy(Policy(device=name), "cpu").low == low


def test_emulated_types_are_never_picked() -> None:
    row = device("t4")
    assert row.emulated == ["bf16"]
    assert Device("x", 1.0, 9.0, 9.0, 1.0, 1.0, emulated=("bf16", "fp16")).faster() == "fp32"


@pytest.mark.parametrize(
    ("product", "capability", "row"),
    [
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
        ("Tesla T4", (7, 5), "t4"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "a100"),
        ("NVIDIA B200", (10, 0), "h200"),
        ("Tesla V100-SXM2-16GB", (7, 0), "t4"),
    ],
)
def test_a_cuda_device_is_found_by_name_and_else_by_capability(product, capability, row) -> None:
    assert cuda_row(product, capability) == row


@pytest.mark.parametrize(
    ("capability", "low"), [((7, 5), "fp16"), ((7, 0), "fp16"), ((8, 0), "bf16"), ((6, 1), "fp32")]
)
def test_below_8_0_auto_is_fp16_whatever_torch_emulates(capability, low, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    here.has_native_bf16.cache_clear()
    try:
        if low == "bf16":
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        if low == "fp32":
            with pytest.warns(UserWarning, match="stays FP32"):
                assert resolve_policy(Policy(), "cuda").low == low
        else:
            assert resolve_policy(Policy(), "cuda").low == low
    finally:
        here.has_native_bf16.cache_clear()


def products(plan) -> set[str]:
    return {node.precision for node in plan.graph if node.kind == "matmul"}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_pinned_row_changes_the_plan_and_stands_in_the_report(backend: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(2, 8)
    found = {}
    for name in ("cpu", "free-low"):
        mp = mpcompile(model, f"bf16,device={name}", backend=backend)
        found[name] = mp.plan(x)
        report = mp.report(x).to_dict()
        assert report["device"] == name
        assert report["policy"].endswith(f"device={name}")
        assert Policy.parse(report["policy"]) == found[name].policy
    assert products(found["cpu"]) == {"fp32"}
    assert products(found["free-low"]) == {"bf16"}
    assert {plan.device for plan in found.values()} == {"cpu"}


def test_a_pinned_row_reaches_the_drop_in_and_the_step() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(2, 8)
    mp = mpcompile(model, "bf16,device=free-low", backend="eager")
    mp(x).sum().backward()
    assert products(mp.plans[-1]) == {"bf16"}
    step = mp.train_step(torch.optim.SGD(model.parameters(), 0.1), lambda m, x: m(x).square().mean())
    step(x)
    report = step.report().to_dict()
    assert report["device"] == "free-low"
    kinds = {row["precision"] for row in report["nodes"] if row["kind"] == "matmul"}
    assert kinds == {"bf16"}


def test_a_pinned_row_reaches_the_onnx_export(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    made = mpcompile(model, "fp16,device=free-low").export_onnx(tmp_path / "m.onnx", torch.randn(2, 8))
    assert any(node.precision in LOW for node in made.graph)
    text = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert text["mpcompile.policy"].endswith("device=free-low")


def test_a_file_pins_its_row(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[cpu]\n{SLOW}")
    policy = Policy(device=str(path))
    assert resolve_policy(policy, "cpu").low == "fp32"
    assert row_name(policy, "cpu") == str(path)
    mp = mpcompile(nn.Linear(512, 512), f"bf16,device={path}", backend="eager")
    assert products(mp.plan(torch.randn(512, 512))) == {"fp32"}
    path.write_text(f"[cpu]\n{ROW.format(bf16='1e15', fp16='1e15')}")
    assert resolve_policy(policy, "cpu").low == "bf16"


def test_a_row_of_a_file_with_several(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[cpu]\n{SLOW}[cuda]\nlike = 'cpu'\nbf16 = 7e14\n")
    assert device(f"{path}#cuda").bf16 == 7e14
    assert device(f"{path}#cuda").fp32 == 1e11
    with pytest.raises(RuleError, match="has 2 rows") as caught:
        device(str(path))
    assert f"{path}#cpu" in str(caught.value)
    with pytest.raises(RuleError, match="no row 'tpu'"):
        device(f"{path}#tpu")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not toml", "cannot be read"),
        ("x = 1", "is not a row"),
        ("[a]\nfp32 = 1.0", "needs a positive number bf16"),
        (f"[a]\n{SLOW}bandwith = 1.0", "did you mean 'bandwidth'"),
        (f"[a]\n{SLOW.replace('1e11', '0')}", "needs a positive number fp32"),
        (f"[a]\n{SLOW.replace('1e11', 'nan')}", "needs a positive number fp32"),
        (f"[a]\n{SLOW.replace('1e11', 'inf')}", "needs a positive number fp32"),
        (f"[a]\n{SLOW.replace('1e11', 'true')}", "needs a positive number fp32"),
        ("", "has 0 rows"),
    ],
)
def test_a_file_that_will_not_do_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RuleError, match="MP206") as caught:
        mpcompile(nn.Linear(2, 2), f"bf16,device={path}")
    assert says in str(caught.value)


def test_a_file_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="MP206"):
        mpcompile(nn.Linear(2, 2), f"bf16,device={tmp_path}/none.toml")


def test_the_users_own_file_stands_over_the_packages_rows(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "devices.toml"
    monkeypatch.setenv(PLACE, str(path))
    assert own_path() == path
    assert rows() == built_in()
    path.write_text(f"[cpu]\n{SLOW}")
    assert rows()["cpu"].bf16 == 5e10
    assert resolve_policy(Policy(), "cpu").low == "fp32"
    monkeypatch.setenv(PLACE, "")
    assert own_path() is None
    assert rows() == built_in()


def test_without_a_word_the_file_is_in_the_configuration_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(PLACE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert own_path() == tmp_path / "mpcompile" / "devices.toml"


def test_a_row_of_the_users_may_be_like_one_of_the_packages(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[cpu]\nlike = "cpu"\nbandwidth = 2e10\n[lab]\nlike = "h100"\n[other]\nlike = "lab"\n')
    mine, shipped = device(f"{file}#cpu"), built_in()["cpu"]
    assert (mine.bandwidth, mine.fp32, mine.low_call_overhead) == (2e10, shipped.fp32, shipped.low_call_overhead)
    assert device(f"{file}#other").bf16 == built_in()["h100"].bf16
    file.write_text('[cpu]\nlike = "h10"\n')
    with pytest.raises(RuleError, match=r"MP206.*is like 'h10'.*\n.*'h100'"):
        device(str(file))


def test_a_row_that_is_written_is_the_row_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "devices.toml"
    write_row(path, device("cpu"))
    write_row(path, device("t4"))
    assert device(f"{path}#cpu") == replace(device("cpu"), name=f"{path}#cpu")
    assert device(f"{path}#t4") == replace(device("t4"), name=f"{path}#t4")
    write_row(path, replace(device("cpu"), fp32=1.5e11, source='a "quoted" \\ source\nof two lines'))
    assert device(f"{path}#cpu").fp32 == 1.5e11
    assert device(f"{path}#cpu").source.endswith("of two lines")
    assert device(f"{path}#t4").emulated == ["bf16"]
    assert list(path.parent.iterdir()) == [path]


def test_a_row_is_not_written_over_what_is_no_device_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.toml"
    path.write_text("title = 1")
    with pytest.raises(RuleError, match="MP206"):
        write_row(path, device("cpu"))
    assert path.read_text() == "title = 1"
    with pytest.raises(RuleError, match="MP206"):
        write_row(path / "below.toml", device("cpu"))


def test_doctor_measures_a_row_and_auto_follows_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "devices.toml"
    (check,) = _measured(path)
    assert str(path) in check.found or str(path) in check.name
    row = device(str(path))
    assert all(0 < rate < math.inf for rate in (row.fp32, row.bf16, row.fp16, row.bandwidth, row.launch))
    assert row.source.startswith("measured by")
    monkeypatch.setenv(PLACE, str(path))
    faster = "bf16" if row.bf16 > row.fp32 else "fp32" if "fp16" in row.emulated else row.faster()
    assert resolve_policy(Policy(), "cpu").low == faster
