"""The report: one page that stands alone, says the right numbers in words too, and takes every text for text."""

import builtins
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from datasets import Dataset

from harp_hf.card import figures
from harp_hf.effects import active_tasks, measured_effects
from harp_hf.errors import MissingExtraError
from harp_hf.hierarchy import Hierarchy
from harp_hf.measurements import Measurements
from harp_hf.posterior import infer
from harp_hf.result import Choice, HarpResult
from harp_hf.smoothness import smoothness

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure as Canvas

from harp_hf.drawing import _name_emoji
from harp_hf.report import draw_figures, write_report
from harp_hf.treemap import tiles

SECTIONS = ["tasks", "hierarchy", "effects", "greedy", "smoothness", "cost", "rows"]
VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }} </svg> & \"quoted\" 'text' \x00 {% raw %}"


def make(n_leaves=20, n_tasks=3, n_measured=12, *, tasks=None, pool=None, per_leaf=4, n_proxy=20, **measured):
    """A result made by hand: effects are linear in feature space, so near leaves have like effects."""
    random = np.random.default_rng(0)
    parent = (np.arange(n_leaves) // 4).astype(np.int32)
    large = (np.arange(parent.max() + 1) // 3).astype(np.int32)
    around = random.standard_normal((len(large), 6))[parent] + 0.5 * random.standard_normal((n_leaves, 6))
    centroids = (around / np.linalg.norm(around, axis=1, keepdims=True)).astype(np.float32)
    leaf = np.repeat(np.arange(n_leaves), per_leaf).astype(np.int32)
    hierarchy = Hierarchy(leaf, parent, large, centroids, centroids[: len(large)], random.random(len(leaf)) / 2)
    task = np.repeat(np.arange(n_tasks), n_proxy)
    null = random.random(len(task)) * 0.4 + 0.1
    leaves = np.sort(random.choice(n_leaves, n_measured, replace=False))
    effects = (centroids[leaves] @ (0.15 * random.standard_normal((6, n_tasks))))[:, task]
    scores = np.clip(null + effects + 0.02 * random.standard_normal((n_measured, len(task))), 0, 1)
    cost = {"finetunes": float(n_measured), "tokens_training": 1000.0 * n_measured, "seconds_training": 8.0,
            "tokens_evaluation": 500.0 * (n_measured + 1), "seconds_evaluation": 4.0}  # fmt: skip
    found, variances = measured_effects(scores, null, task, n_tasks)
    if pool is None:
        pool = Dataset.from_list([{"prompt": f"ask {i}", "completion": f"answer {i}"} for i in range(len(leaf))])
    return HarpResult(
        pool, tasks or [f"task{d}" for d in range(n_tasks)], ["exact_match"] * n_tasks, task, hierarchy,
        Measurements(leaves, scores[:, None], null, cost=cost, **measured),
        infer(found, variances, leaves, hierarchy), active_tasks(found, variances),
        Choice("harp-c", 30, None, ("all",)), {"features": 3.0, "training": 8.0, "evaluation": 4.0}, "digest",
    )  # fmt: skip


class Page(HTMLParser):
    """Checks that tags balance and ids are unique, and keeps texts and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.ids = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], "every tag is closed"
        assert len(set(self.ids)) == len(self.ids), "no id twice"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def alternatives(self):
        return [attrs["aria-label"] for _, attrs in self.tags if attrs.get("role") == "img"]


def written(result, path):
    return Page(write_report(result, path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def result():
    return make(failed={7: "CUDA ran out of <memory>"})


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(result, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "result" / "report.html").read_text(encoding="utf-8"))


def test_every_section_is_there_and_every_figure_in_it(page):
    assert [attrs.get("id") for tag, attrs in page.tags if tag == "section"] == SECTIONS
    assert sum(tag == "svg" for tag, _ in page.tags) == 1 + 1 + 3 + 2 + 1 == len(page.alternatives)


def test_the_page_stands_alone(folder):
    html = (folder / "result" / "report.html").read_text(encoding="utf-8")
    for tag, attrs in Page(html).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "image")
        for name, value in attrs.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value.startswith("#")
            assert not name.startswith("on")
    assert not re.search(r"@import|url\((?!#)", html)
    for used in re.findall(r"url\(#([^)]*)\)", html) + re.findall(r"xlink:href=\"#([^\"]*)\"", html):
        assert f'id="{used}"' in html, "what a figure refers to is in it"


def test_the_head_says_what_the_summary_says(result, page):
    rows = {
        variant: len(result.chosen(replace(result.choice, variant=variant))[0]) for variant in ("harp-c", "harp-e")
    }
    assert f"{rows['harp-c']} of 80 rows chosen for 3 tasks" in page.text
    assert f"HARP-E chooses {rows['harp-e']} rows" in page.text
    assert "12 on 12 of 20 leaves, 1 failed" in page.text
    assert "Seconds by stage: features 3, training 8, evaluation 4." in page.text
    for d, task in enumerate(result.tasks):
        c, e = (result.predicted(replace(result.choice, variant=v))[d] for v in ("harp-c", "harp-e"))
        assert f"{task} exact_match {result.null[d]:.3f} yes {c:.3f} {e:.3f}" in page.text
    assert "Leaf 7: CUDA ran out of <memory>" in page.text


def test_text_alternatives_hold_the_numbers_of_their_figures(result, page):
    scores, tree, *panels, c, e, smooth = page.alternatives
    mean, sd = result.posterior.mean, result.posterior.sd
    overall = mean.mean(axis=1)

    def minus(value):
        return f"{value:+.3f}".replace("-", "−")

    assert f"highest in leaf {overall.argmax()} ({minus(overall.max())})" in tree
    assert f"above 0 in {(overall > 0).sum()} leaves and below 0 in {(overall < 0).sum()}" in tree
    for d, panel in enumerate(panels):
        g = mean[:, d].argmax()
        low, high = minus(mean[g, d] - 1.645 * sd[g, d]), minus(mean[g, d] + 1.645 * sd[g, d])
        kind = "measured" if g in result.measurements.leaves else "inferred"
        assert f"leaf {g} {minus(mean[g, d])} ({low} to {high}, {kind})" in panel
        assert f"{(mean[:, d] - 1.645 * sd[:, d] > 0).sum()} have a 90 % interval above 0" in panel
    for variant, curve in (("harp-c", c), ("harp-e", e)):
        order = result.order(replace(result.choice, variant=variant))
        assert curve.startswith(f"Greedy curve of {variant.upper()}.")
        assert f"{minus(order.gains[: order.best_prefix].sum())}; all 20 leaves and 80 rows" in curve
        assert "The budget of 30 rows" in curve
    assert f"task0 {result.null[0]:.3f}, HARP-C" in scores
    assert smooth.count("pairs)") == 6


def test_costs_are_projected_to_every_leaf(page):
    assert "finetunes 12 20 60 %" in page.text
    assert "tokens trained 12,000 20,000 60 %" in page.text
    assert "tokens evaluated 6,500 10,500 62 %" in page.text, "the base model is evaluated once"


def test_pngs_for_the_card_are_written_and_nothing_else(folder):
    files = sorted(path.name for path in (folder / "result").iterdir())
    names = ["figures.json", "greedy-harp-c.png", "greedy-harp-e.png", "hierarchy.png", "report.html", "scores.png",
             "smoothness.png"]  # fmt: skip
    assert files == names
    for name in names:
        if name.endswith(".png"):
            assert (folder / "result" / name).read_bytes().startswith(b"\x89PNG")


def test_figures_of_another_choice_or_of_other_effects_are_not_taken_for_its_own(result, tmp_path):
    ours = replace(result, path=tmp_path)
    assert figures(ours) == []
    write_report(ours, tmp_path)
    drawn = sorted((tmp_path / "result").glob("*.png"))
    assert figures(ours) == figures(replace(ours, choice=replace(ours.choice, variant="harp-e"))) == drawn
    assert figures(replace(ours, choice=replace(ours.choice, budget=31))) == []
    (tmp_path / "result" / "another.png").write_bytes(b"")
    drawn.pop().unlink()
    assert figures(ours) == drawn, "those that it drew and that are still there"
    more = replace(ours.measurements, scores=ours.measurements.scores / 2)
    assert figures(replace(ours, measurements=more)) == []
    write_report(replace(ours, distinguishable=np.zeros(3, bool), choice=Choice("harp-c", 30)), tmp_path)
    assert figures(ours) == []
    none = figures(replace(ours, choice=Choice("harp-c", 30)))
    assert {path.name for path in drawn} - {path.name for path in none} == {"greedy-harp-c.png", "greedy-harp-e.png"}


def test_the_same_result_gives_the_same_bytes(result, folder, tmp_path):
    write_report(result, tmp_path)
    for file in (tmp_path / "result").iterdir():
        assert file.read_bytes() == (folder / "result" / file.name).read_bytes(), file.name


def test_figures_take_the_text_colour_of_the_page():
    for group in draw_figures(make(4, 1, 2)).values():
        for figure in group:
            assert "currentColor" in figure.svg
            assert "#1b1d20" not in figure.svg


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HOSTILE, "completion": HOSTILE},
        {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]},
        {"prompt": [{"role": "user", "content": HOSTILE}], "completion": [{"role": "assistant", "content": HOSTILE}]},
        {"text": HOSTILE},
        {"body": HOSTILE},
    ],
    ids=["prompt", "messages", "conversational", "text", "other-column"],
)
def test_rows_stay_text_in_every_format(row, tmp_path):
    page = written(make(2, 1, 2, pool=Dataset.from_list([row] * 8), n_proxy=5), tmp_path)
    assert HOSTILE.replace(" \x00", "").split(" {%")[0] in page.text
    assert not any(tag == "script" for tag, _ in page.tags)


def test_token_ids_and_long_rows_are_shown_short(tmp_path):
    ids = written(make(2, 1, 2, pool=Dataset.from_list([{"input_ids": [5, 6, 7]}] * 8)), tmp_path / "ids")
    assert "token ids 5 6 7" in ids.text
    long = [{"prompt": "x" * 5000, "completion": "y"}] * 8
    page = written(make(2, 1, 2, pool=Dataset.from_list(long)), tmp_path / "long")
    assert "x" * 420 + " … (4,580 letters more)" in page.text
    assert "x" * 421 not in page.text


def test_one_leaf_and_one_task(tmp_path):
    page = written(make(1, 1, 1), tmp_path)
    assert "of 1 leaves were measured" not in page.text, "nothing is assumed"
    assert "too few to see whether near leaves have like effects" in page.text
    assert "Leaf 0, the best and worst and most uncertain" in page.text
    assert all(page.alternatives)


def test_many_tasks_and_leaves_share_one_figure(tmp_path):
    names = ["mmlu/high school", "🦜 parrots", "$x^2$ \\frac", "</svg><script>x</script>", "a" * 200]
    page = written(make(300, 57, 20, tasks=names + [f"task{d}" for d in range(52)], per_leaf=2), tmp_path)
    assert len(page.alternatives) == 1 + 1 + 1 + 2 + 1
    for name in names:
        assert name in page.text
        assert any(name in alternative for alternative in page.alternatives)
    effects = page.alternatives[2]
    assert "24 of 300 leaves on 57 tasks" in effects
    assert (tmp_path / "result" / "effects.png").exists()


def test_nothing_active_still_gives_a_page(result, tmp_path):
    quiet = replace(result, choice=Choice("harp-e"), distinguishable=np.zeros(3, bool))
    page = written(quiet, tmp_path)
    assert "No task has measured effects that are distinguishable from none" in page.text
    assert "0 of 80 rows chosen" in page.text
    assert not any("Greedy" in alternative for alternative in page.alternatives)


def test_tasks_without_weight_still_give_a_page(result, tmp_path):
    choice = Choice(task_weights=dict.fromkeys(result.tasks, 0.0), active_tasks=("all",))
    page = written(replace(result, choice=choice), tmp_path)
    assert "All active tasks have the weight 0, so nothing is chosen." in page.text
    assert "0 of 80 rows chosen" in page.text


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_names_the_extra(result, tmp_path, monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "harp_hf.drawing")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        MissingExtraError, match=rf'needs the package {package}: run `pip install "harp-hf\[report\]"`'
    ):
        write_report(result, tmp_path)


@pytest.mark.parametrize("n_leaves", [1, 7, 500])
def test_tiles_are_apart_inside_and_as_large_as_their_rows(n_leaves):
    result = make(n_leaves, 1, 1)
    boxes = np.array(tiles(result.hierarchy))
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    assert (low >= 0).all()
    assert (high <= 1 + 1e-9).all()
    overlap = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low) > 1e-9).all(axis=2)
    assert overlap.sum() == n_leaves, "each tile overlaps only itself"
    areas = boxes[:, 2] * boxes[:, 3]
    assert areas.sum() > 0.7
    assert areas.max() < 2 * areas.min(), "leaves of equal size have tiles of about equal size"


def test_smoothness_tells_smooth_from_rough_from_noise():
    random = np.random.default_rng(3)
    points = random.standard_normal((30, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    smooth = smoothness(points[:, :1] * 0.3, np.full((30, 1), 1e-4), points)
    assert smooth.p_value < 0.01
    assert smooth.words().startswith("The assumption holds here")
    assert smooth.difference[0] < smooth.difference[-1]
    assert smooth.noise == pytest.approx(np.sqrt(2 / np.pi * 2e-4))
    assert smooth.pairs.sum() == 30 * 29 / 2
    rough = smoothness(random.standard_normal((30, 1)), np.full((30, 1), 1e-4), points)
    assert rough.p_value > 0.05
    assert not rough.words().startswith("The assumption holds")
    noise = smoothness(np.zeros((30, 1)), np.full((30, 1), 1e-2), points)
    assert noise.p_value == 1
    assert noise.words().startswith("Nothing can be seen here")
    assert smoothness(points[:4, :1], np.ones((4, 1)), points[:4]) is None


def test_emoji_are_named_in_pngs_and_stay_in_the_page(tmp_path):
    page = written(make(4, 2, 4, tasks=["🦜 birds", "plain é"]), tmp_path)
    assert "🦜 birds" in page.texts, "beside an axis"
    canvas = Canvas()
    axes = canvas.subplots()
    axes.set_yticks([0, 1], ["plain é", "x"])
    assert not _name_emoji(canvas)
    axes.set_yticks([0, 1], ["🦜 birds", "plain é"])
    assert _name_emoji(canvas)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["parrot birds", "plain é"]
