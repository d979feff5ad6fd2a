# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The floor plan: who may import whom, how small the helper stays, and lists that must agree."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module may import those of earlier rows, not of its own: so there is no circle.
ORDER = (
    "nvfp4_utils.kernels",
    "nvfp4_utils.kernels.cuda nvfp4_utils.kernels.fake_quantize",
    "nvfp4_utils.kernels.joint_table",
    "nvfp4_utils.quantize",
    "nvfp4_utils.histogram",
    "nvfp4_utils.error nvfp4_utils.statistic_file",
    "nvfp4_utils.statistics",
    "nvfp4_utils.search nvfp4_utils.mover nvfp4_utils.forward",
    "nvfp4_utils.policies nvfp4_utils.sites nvfp4_utils.device_counter",
    "nvfp4_utils.counters",
    "nvfp4_utils.hooks",
    "nvfp4_utils",
    "studies",
    "studies.data",
    "studies.runs",
    "studies.checkpoints studies.engine",
    "studies.pages",
    "studies.report",
    "notebooks",
)
SHARED_PAGES = {"block_shapes", "interactive", "loss_tables", "plots", "regimes", "snr_tables", "tails"}
FIRST_PAGE = {"what_to_set"}  # whose verdict the first page and the cheat sheet repeat
HELPER = sorted((ROOT / "nvfp4_utils").rglob("*.py"))
STUDIES = sorted((ROOT / "studies").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in HELPER + STUDIES}


def source(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere in it; of ours, the full name."""
    package = module_name(path).split(".") if path.suffix == ".py" else []
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(source(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{name}.{alias.name}" for alias in node.names} & MODULES
            found |= inner or {name}
    return found


def row(module: str) -> int:
    """Where a module stands in ``ORDER``: by its own name, else by its package's."""
    for i, names in enumerate(ORDER):
        if module in names.split():
            return i
    return row(module.rpartition(".")[0])


@pytest.mark.parametrize("path", HELPER + STUDIES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    own, ours = (
        module_name(path),
        {i for i in imports(path) if i.split(".")[0] in ("nvfp4_utils", "studies")},
    )
    if own.startswith("studies.bench"):
        assert not [i for i in ours if i.startswith("studies.pages")]
        return
    assert not [i for i in ours if i.startswith("studies.bench")]
    peers = own.rpartition(".")[0] if own.startswith("studies.") else None
    assert [i for i in ours if row(i) >= row(own) and not (peers and i.startswith(peers + "."))] == []


def test_no_circle_within_a_folder_of_studies() -> None:
    graph = {module_name(path): imports(path) & MODULES for path in HELPER + STUDIES}

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        for other in graph[module] - {module}:
            visit(other, (*above, module))

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_uses_shared_modules_and_its_own(path: Path) -> None:
    pages = {i.split(".")[2] for i in imports(path) if i.startswith("studies.pages.")}
    assert pages <= SHARED_PAGES | {path.stem} | (
        FIRST_PAGE if path.stem in ("index", "cheat_sheet") else set()
    )
    assert not [i for i in imports(path) if i.startswith("studies.bench")]


def test_each_page_module_is_shared_or_a_notebook() -> None:
    pages = {p.stem for p in (ROOT / "studies" / "pages").glob("*.py")} - {"__init__"}
    assert pages - SHARED_PAGES <= {p.stem for p in NOTEBOOKS}


def test_the_helper_is_small() -> None:
    modules = [p for p in HELPER if p.name != "__init__.py"]
    lines = {module_name(p): len(p.read_text().splitlines()) for p in HELPER}
    assert len(modules) <= 16
    # 2,200 at the split. After it came the block-weighted SNR, the policies that use the room above the
    # amax, and the checks that a site sees every sequence once; then sites found by structure on any
    # architecture, mixtures of experts, a check of every batch, a statistic's file that is checked in
    # full, and an oracle that is exact and fast.
    assert sum(lines.values()) <= 3400
    assert max(lines.values()) <= 300, lines
    assert len(list((ROOT / "nvfp4_utils").rglob("*.cu"))) == 1


def test_importing_the_helper_is_light() -> None:
    script = (
        "import sys, time, torch, numpy; began = time.perf_counter(); import nvfp4_utils;"
        "print(time.perf_counter() - began, *sys.modules)"
    )
    # The best of three: the first may read files from a slow disk.
    runs = [subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split() for _ in range(3)]  # fmt: skip
    heavy = {"matplotlib", "pandas", "IPython", "scipy", "pyarrow", "triton", "transformers", "studies"}
    assert not heavy & set(runs[0][1:])
    assert min(float(r[0]) for r in runs) < 0.3


def test_lists_of_policies_and_sites_agree() -> None:
    from nvfp4_utils.policies import POLICIES
    from nvfp4_utils.sites import SITES
    from studies.pages import plots, q2_which_policy, snr_tables

    assert list(plots.POLICY_STYLE) == list(POLICIES)
    assert list(q2_which_policy.policy_table().index) == list(POLICIES)
    assert set(snr_tables.NOT_ONE_SCALE) == {n for n, p in POLICIES.items() if not p.one_scale}
    assert list(plots.KIND_STYLE) == list(plots.KIND_COLORS) == list(SITES)


def test_no_kind_of_site_is_left_out_of_a_page() -> None:
    """Also one that no list knows: a site named by a pattern."""
    import pandas as pd

    from nvfp4_utils.sites import SITES
    from studies.pages import plots, q1_more_calibration

    kinds = [*SITES, "fc1"]
    columns = ["amax", "snr_db", "snr_low", "snr_high"]
    one = pd.DataFrame({"n": [1, 2], **dict.fromkeys(columns, 1.0)})
    sizes = pd.concat([one.assign(site=f"layers.0.{kind}") for kind in kinds])
    drawn = [ax.get_title() for ax in q1_more_calibration.size_figure(sizes).axes]
    assert [title for title in drawn if title] == kinds
    shares = q1_more_calibration.share_figure(q1_more_calibration.share_table(sizes))
    assert [line.get_label() for line in shares.axes[0].get_lines()] == kinds
    assert list(q1_more_calibration.kind_table(sizes).index) == kinds
    assert len({plots.kind_style(kind).marker for kind in kinds}) == len(kinds)


def test_colours_mean_policies_only() -> None:
    from studies.pages import plots

    other = [style.color for style in (*plots.UNDERFLOW_STYLE.values(), *plots.KIND_STYLE.values())]
    assert all(color[1:3] == color[3:5] == color[5:7] for color in other)  # black to grey
    colors = [style.color for style in plots.POLICY_STYLE.values()]
    assert len(set(colors)) == len(colors)


def test_touching_a_page_module_reruns_one_notebook(tmp_path: Path) -> None:
    """What make would do, with every page executed already."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for notebook in NOTEBOOKS:
        (tmp_path / notebook.name).touch()

    def rerun(touched: str) -> set[str]:
        command = ["make", "-n", "-o", ".venv/.book", "-o", "models/downloaded/.asked",
                   "-W", touched, f"EXECUTED={tmp_path}",
                   *(f"{tmp_path}/{n.name}" for n in NOTEBOOKS)]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True,
                              env={k: v for k, v in os.environ.items() if k != "MAKEFLAGS"})  # fmt: skip
        return {n.stem for n in NOTEBOOKS if f"notebooks/{n.name} " in done.stdout}

    assert rerun("README.md") == set()
    assert rerun("studies/pages/theory.py") == {"theory"}
    assert rerun("studies/pages/what_to_set.py") == {"what_to_set", "index", "cheat_sheet"}
    assert rerun("studies/pages/plots.py") == {n.stem for n in NOTEBOOKS}
    assert rerun("nvfp4_utils/kernels/joint_table.cu") == {n.stem for n in NOTEBOOKS}


def test_the_code_that_makes_results_is_hashed_and_pages_are_not() -> None:
    from studies.runs.store import result_code

    hashed = {p.relative_to(ROOT).as_posix() for p in result_code()}
    assert {
        "nvfp4_utils/kernels/joint_table.cu",
        "studies/runs/store.py",
        "studies/data/mixes.py",
    } <= hashed
    assert not [p for p in hashed if p.startswith(("studies/pages", "studies/bench", "scripts"))]


def test_the_wheel_quantizes_in_an_empty_environment(tmp_path: Path) -> None:
    """Built from the repository, unpacked alone: the helper with its CUDA source and no studies."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run([str(part) for part in build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    script = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import torch;"
        " from nvfp4_utils import fake_quantize, capture; import nvfp4_utils;"
        "assert '.whl' in nvfp4_utils.__file__;"
        "print(fake_quantize(torch.full((1, 16), 1.25), 1.25 / 2688)[0, 0].item())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1.25", done.stderr
    names = zipfile.ZipFile(wheel).namelist()
    assert "nvfp4_utils/kernels/joint_table.cu" in names
    assert not [n for n in names if n.startswith("studies")]
