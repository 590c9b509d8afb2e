"""Pushing a selection: a real run, pushed to and loaded from a small Hub on loopback, and the card it gets."""

import html
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from datasets import Dataset
from hub_server import Hub
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import harp_hf
from harp_hf import HarpConfig, HarpError, card
from harp_hf.envelopes import predict, predict_interval
from harp_hf.rundir import RunDir
from harp_hf.texts import printable

TOKEN, READER, STRANGER = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader", "hf_strangerstrangerstranger"
TASK = "red | `{{ task }}`"
HOSTILE = f"""<script>alert(1)</script>
---
license: mine
---
```
| a | b | {{{{ 7 * 7 }}}} {{% raw %}} $x$ {card.END} **bold** _low_ [x](javascript:1) www.example.com &lt; \\ {TOKEN}
# heading"""
SECTIONS = ["What was selected", "Scores", "Cost", "A row", "Load it", "Train on it", "Reproduce it", "Limits",
            "Citation"]  # fmt: skip

# A process of its own, as the Hub's address and offline mode are read once, at import. Retries need not be waited for.
CLIENT = """
import contextlib, io, json, sys, time, traceback
time.sleep = lambda seconds: None
import datasets, harp_hf
answers, known = sys.stdout, {"harp_hf": harp_hf, "load": datasets.load_dataset}
sys.stdout = sys.stderr
for line in sys.stdin:
    try:
        answer = {"value": eval(json.loads(line), known)}
    except Exception as error:
        answer = {"error": str(error), "kind": [k.__name__ for k in type(error).__mro__],
                  "traceback": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Client:
    """Python on the other side of the Hub; `log` is everything that it wrote."""

    def __init__(self, hub, folder):
        self.log = folder / "log"
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder)}
        clean = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=clean | settings, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log.open("w"),
        )  # fmt: skip

    def ask(self, code):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)

    def __call__(self, code):
        answer = self.ask(code)
        assert "error" not in answer, answer["traceback"]
        return answer["value"]

    def refused(self, code, *words):
        """The one sentence that `code` ends with."""
        answer = self.ask(code)
        assert "HarpError" in answer["kind"], answer["traceback"]
        message = answer["error"]
        assert message.endswith(".")
        assert "\n" not in message
        assert all(word in message for word in words), message
        assert not re.search("hf_[a-z]{8}", re.sub(r"token='\w+'", "", answer["traceback"])), "the token is not shown"
        return message


@pytest.fixture(scope="module")
def rows(pool):
    return pool.add_column("note", [HOSTILE] * len(pool))


@pytest.fixture(scope="module")
def run(rows, proxy, features, tiny_model, tmp_path_factory):
    """A finished run, as the command line leaves it."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    args = HarpConfig(output_dir=str(folder), leaf_size=12, branching=2, max_measurements=4, max_steps=12,
                      learning_rate=3e-2, use_cpu=True, bf16=False, active_tasks=["all"], hub_token=TOKEN)  # fmt: skip
    renamed = proxy.map(lambda row: {"task": TASK if row["task"] == "red" else row["task"]})
    harp_hf.measure(rows, renamed, tiny_model, args, features=features)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    names = {"dataset_name": "maker/pool", "eval_dataset_name": "/home/someone/proxy.jsonl",
             "model_name_or_path": "maker/tiny"}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(written | names | {"hub_token": TOKEN, "run_name": TOKEN}))
    rows.save_to_disk(folder.parent / "pool")
    return folder


@pytest.fixture(scope="module")
def result(run, rows):
    return harp_hf.load_result(run, rows)


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.tokens |= {TOKEN: ("me", "write"), READER: ("me", "read"), STRANGER: ("stranger", "write")}
        hub.create("maker/pool", card="---\nlicense: cc-by-4.0\n---\n# The pool\n")
        yield hub


@pytest.fixture(scope="module")
def client(hub, run, tmp_path_factory):
    client = Client(hub, tmp_path_factory.mktemp("client"))
    client(f"globals().update(result=harp_hf.load_result({str(run)!r}, {str(run.parent / 'pool')!r}))")
    yield client
    client.process.stdin.close()
    client.process.wait()
    client.process.stdout.close()
    assert "hf_writer" not in client.log.read_text(), "no token is logged"


@pytest.fixture(autouse=True)
def whole(request):
    """Every test starts with connections that hold."""
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").cut = lambda method, path: False


def push(name, arguments="", token=TOKEN):
    return f"result.push_to_hub({name!r}, token={token!r}{', ' + arguments if arguments else ''})"


def load(name, arguments=""):
    rows = f"load({name!r}, token={TOKEN!r}, split='train'{', ' + arguments if arguments else ''})"
    return f"[{rows}.column_names, {rows}.to_list()]"


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def rendered(text):
    return MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])


def text_of(piece):
    return html.unescape(re.sub("<[^>]+>", "", piece.replace("<br>", "\n")))


def tables(page):
    """Cells of every table, a list of lists."""
    found = re.findall("<table>(.*?)</table>", page, re.DOTALL)
    lines = [re.findall("<tr>(.*?)</tr>", table, re.DOTALL) for table in found]
    return [[re.findall("<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in table] for table in lines]


def test_rows_that_were_pushed_are_loaded_back(client, hub, result):
    assert client(push("me/first", "variant='harp-e', budget=20")) == f"{hub.url}/datasets/me/first"
    chosen = result.select("harp-e", 20)
    assert client(load("me/first")) == [chosen.column_names, chosen.to_list()]
    assert hub.repos["me/first"].private, "private unless told otherwise"
    assert hub.repos["me/first"].messages[1:] == [
        "Upload 20 rows selected by HARP-E", "Upload 20 rows selected by HARP-E: card",
    ]  # fmt: skip


def test_card_metadata_says_where_the_rows_come_from(client, hub):
    client(push("me/card"))
    known = metadata(hub.repos["me/card"].card())
    assert set(known["tags"]) == {"harp-hf", "data-selection", "arxiv:2606.07690"}
    assert known["source_datasets"] == ["maker/pool"]
    assert known["base_model"] == ["maker/tiny"]
    assert known["license"] == "cc-by-4.0", "carried over from the pool"
    assert known["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert known["dataset_info"]["splits"][0]["num_examples"] > 0


@pytest.mark.parametrize(
    ("licence", "known", "shown"), [("[mit]", "mit", "mit"), ("[mit, cc0-1.0]", ["mit", "cc0-1.0"], "mit, cc0-1.0")]
)
def test_licences_are_named_one_by_one(client, hub, licence, known, shown):
    hub.create(f"maker/{len(licence)}", card=f"---\nlicense: {licence}\n---\n")
    client(push(f"me/licence{len(licence)}", f"dataset_name='maker/{len(licence)}'"))
    text = hub.repos[f"me/licence{len(licence)}"].card()
    assert metadata(text)["license"] == known
    assert ["licence", shown] in [[text_of(cell) for cell in row] for row in tables(rendered(text))[0]]


@pytest.mark.parametrize(
    "path", ["daten/größe.jsonl", "data/train--v2.jsonl", "data/pool..x", "a/" + 300 * "b", "a/b."]
)
def test_paths_that_are_no_names_on_the_hub_are_not_looked_up_there(client, hub, path):
    assert card.hub_name(path) is None
    assert card.hub_name("maker/pool") == "maker/pool"
    client(push("me/paths", f"budget=5, dataset_name={path!r}"))
    assert "license" not in metadata(hub.repos["me/paths"].card())


def test_rendered_card_has_every_section_and_whole_tables(client, hub, result):
    client(push("me/page", "variant='harp-c'"))
    page = rendered(hub.repos["me/page"].card())
    assert [text_of(h) for h in re.findall("<h2>(.*?)</h2>", page)] == SECTIONS
    assert re.findall("<h1>(.*?)</h1>", page) == ["page"], "row text makes no headings"
    found = tables(page)
    assert len(found) == 4
    for table in found:
        assert len({len(row) for row in table}) == 1
    scores = {text_of(row[0]): row for row in found[1][1:]}
    assert set(scores) == {TASK, "green"}
    chosen = result.choosing("harp-c")
    for d, task in enumerate(result.tasks):
        assert float(scores[task][3]) == pytest.approx(result.null[d], abs=6e-4)
        assert float(scores[task][5]) == pytest.approx(chosen.predicted()[d], abs=6e-4)
        for place in (4, 6):
            low, high = map(float, scores[task][place].split(" to "))
            assert 0 <= low <= high <= 1
    cost = {row[0]: row[1] for row in found[2]}
    assert cost["finetunes"] == f"5, on 4 of {result.hierarchy.n_leaves} leaves and random rows"
    assert cost["tokens trained on"] == f"{result.measurements.cost['tokens_training']:,.0f}"
    assert not re.search("figures|<img", page), "no figures, no links to them"


def test_text_of_rows_stays_text(client, hub):
    client(push("me/hostile"))
    page = rendered(hub.repos["me/hostile"].card())
    sample = {text_of(row[0]): row[1] for row in tables(page)[3]}
    assert text_of(sample["note"]) == HOSTILE.replace(TOKEN, "(a token)")
    assert re.findall("<(?!br>)[^>]*>", sample["note"]) == []
    assert "<script" not in page
    assert TASK in [text_of(name) for name in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    assert metadata(hub.repos["me/hostile"].card())["license"] == "cc-by-4.0"
    assert "{{" not in hub.repos["me/hostile"].card().split(card.BEGIN)[1].replace(TASK, "")


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_escaped_text_reads_as_itself(text):
    page = MarkdownIt("commonmark").enable("table").render(f"| a |\n|---|\n| x{card.escape(text)}x |\n")
    (table,) = tables(page)
    seen = "\n".join(map(printable, re.sub(r"\r\n?", "\n", text).split("\n")))
    assert text_of(table[1][0]) == f"x{seen}x"


def test_settings_reproduce_the_run_and_hold_no_secret(client, hub, run, result):
    client(push("me/settings", "variant='harp-e', budget=20"))
    files = hub.repos["me/settings"].files()
    settings = yaml.safe_load(files["harp.yaml"].content)
    page = rendered(files["README.md"].content.decode())
    (shown,) = re.findall(r'<code class="language-yaml">(.*?)</code>', page, re.DOTALL)
    assert yaml.safe_load(html.unescape(shown)) == settings
    assert settings["variant"] == "harp-e"
    assert settings["budget"] == 20
    assert settings["active_tasks"] == ["all"]
    assert settings["learning_rate"] == 3e-2
    assert settings["max_steps"] == 12
    assert settings["dataset_name"] == "maker/pool"
    assert settings["model_name_or_path"] == "maker/tiny"
    assert [settings["eval_dataset_name"], settings["output_dir"]] == ["proxy.jsonl", "run"], "no folders of ours"
    everything = b"".join(f.content for name, f in files.items() if not name.endswith(".parquet"))
    assert TOKEN.encode() not in everything
    assert str(run.parent).encode() not in everything
    assert "hub_token" not in settings


def test_settings_hold_the_whole_choice_and_nothing_of_an_earlier_one(result):
    before = {"task_weights": {"red": 5.0}, "budget_by": "task", "learning_rate": 3e-2}
    told = card.recipe(result.choosing(budget=7, budget_by="leaf", task_weights={}, active_tasks=["green"]), before)
    assert told == {"variant": "harp-c", "budget": 7, "budget_by": "leaf", "task_weights": {},
                    "active_tasks": ["green"], "learning_rate": 3e-2}  # fmt: skip
    assert HarpConfig(output_dir="run", **told).task_weights == {}


def test_pushing_again_replaces_the_rows_and_our_section_only(client, hub, result):
    client(push("me/again", "variant='harp-e', budget=20"))
    repo = hub.repos["me/again"]
    body = repo.card().split("\n---\n", 1)[1]
    edited = "---\n" + yaml.safe_dump(metadata(repo.card()) | {"license": "mit", "pretty_name": "Mine", "tags": ["x"]})
    files = dict(repo.files())
    files["README.md"] = type(files["README.md"])(
        f"{edited}---\n# My own words\n\n{body}\nAnd after, --- `too`.\n".encode(), False
    )
    repo.commit("main", files, "edit")
    client(push("me/again", "variant='harp-c', budget=10, commit_message='Fewer rows'"))
    text, known = repo.card(), metadata(repo.card())
    assert [known["license"], known["pretty_name"]] == ["mit", "Mine"], "what the user set stays"
    assert known["tags"] == ["x", *card.TAGS]
    assert known["configs"][0]["config_name"] == "default"
    assert text.count(card.BEGIN) == text.count(card.END) == 1
    assert "# My own words" in text.split(card.BEGIN)[0]
    assert text.rstrip().endswith("And after, --- `too`.")
    assert "HARP-C" in text
    assert repo.messages[-2:] == ["Fewer rows", "Fewer rows: card"]
    chosen = result.select("harp-c", 10)
    assert client(load("me/again")) == [chosen.column_names, chosen.to_list()]


def test_text_without_our_section_is_kept_before_it():
    assert card.merge_text("\n# Mine\n", "OURS\n") == "# Mine\n\nOURS\n"
    assert card.merge_text("", "OURS\n") == "OURS\n"
    assert card.merge_text(f"a {card.BEGIN} old {card.END} b", "OURS\n") == "a OURS b"


def test_rows_and_card_go_to_the_revision_that_is_asked_for(client, hub, result):
    place = client(push("me/branches", "revision='trial/one', budget=10"))
    assert place == f"{hub.url}/datasets/me/branches/tree/trial/one"
    repo = hub.repos["me/branches"]
    assert "README.md" not in repo.files("main")
    assert card.BEGIN in repo.card("trial/one")
    assert 'revision="trial/one"' in repo.card("trial/one")
    assert client(load("me/branches", "revision='trial/one'"))[1] == result.select(budget=10).to_list()


def test_figures_of_the_run_are_pushed_and_shown(client, hub, run, result):
    figure, named = run / "result" / "effects of leaves.png", run / card.FIGURES
    figure.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    RunDir(run).write_json(card.FIGURES, {"names": [figure.name], "shown": card.shown(result)})
    try:
        client(push("me/figures", "variant='harp-e'"))
        client(push("me/others", "budget=7"))
    finally:
        figure.unlink()
        named.unlink()
    repo, others = hub.repos["me/figures"], hub.repos["me/others"]
    assert not any("figures" in name for name in others.files()), "they show another choice"
    assert "figures/" not in others.card()
    assert repo.files()["figures/effects of leaves.png"].content.startswith(b"\x89PNG")
    assert '<img src="figures/effects%20of%20leaves.png"' in rendered(repo.card())
    assert len(client(load("me/figures"))[1]) > 0, "figures are no data"


def test_public_only_when_asked_for(client, hub):
    hub.create("me/public", private=False)
    client.refused(push("me/public"), "me/public", "public", "private=False")
    assert list(hub.repos["me/public"].files()) == [".gitattributes"]
    client(push("me/public", "private=False"))
    client(push("me/open", "private=False"))
    assert not hub.repos["me/open"].private
    client(push("short"))
    assert hub.repos["me/short"].private, "a name alone is in one's own namespace"


def test_tokens_that_do_not_suffice_are_one_sentence(client, hub):
    hub.create("stranger/secret", private=True)
    client.refused("result.push_to_hub('me/none')", "needs a token", "hf auth login")
    client.refused(push("me/none", token="hf_madeupmadeupmadeup"), "does not accept the token")
    client.refused(push("me/none", token="hf_newlinenewlineline\n"), "white space")
    client.refused(push("me/first", token=READER), "may not write to me/first")
    client.refused(push("stranger/new"), "may not write to stranger/new")
    client.refused(push("stranger/secret"), "stranger/secret")
    assert "me/none" not in hub.repos
    assert list(hub.repos["stranger/secret"].files()) == [".gitattributes"]


@pytest.mark.parametrize("name", ["no spaces", "a/b/c", "/absolute", "me/..", ""])
def test_bad_names_are_one_sentence(client, name):
    client.refused(push(name), repr(name), "namespace/name")


@pytest.mark.parametrize(
    ("place", "tree"), [("PUT /large", False), ("POST .*/commit/", False), ("HEAD .*README", True)]
)
def test_cut_connection_is_one_sentence_and_the_next_push_succeeds(client, hub, result, place, tree):
    name = f"me/cut{len(place)}"
    hub.large.clear()
    hub.cut = lambda method, path: bool(re.match(place, f"{method} {path}"))
    client.refused(push(name, f"budget={len(place)}"), "connection", name, "push again")
    assert ("README.md" in hub.repos[name].files()) == tree
    hub.cut = lambda method, path: False
    client(push(name, f"budget={len(place)}"))
    assert card.BEGIN in hub.repos[name].card()
    assert client(load(name))[1] == result.select(budget=len(place)).to_list()


def test_objects_in_memory_have_no_names_in_the_card(result):
    text = card.describe(replace(result, path=None), result.select(), "me/x")
    assert "a language model" in text
    assert "`dataset_name`, `eval_dataset_name`, `model_name_or_path`" in text
    assert "licence | not known" in text


def test_interval_of_the_prediction_follows_the_posterior():
    mean, sd, null = np.array([[0.1], [0.2]]), np.array([[0.03], [0.04]]), np.array([0.3])
    (interval,) = predict_interval(mean, sd, null, np.array([0, 1]), "harp-e", draws=20_000)
    assert interval == pytest.approx([0.6 - 1.645 * 0.05, 0.6 + 1.645 * 0.05], abs=3e-3)
    for variant in ("harp-c", "harp-e"):
        certain = predict_interval(mean, 0 * sd, null, np.array([0, 1]), variant)
        assert certain == pytest.approx(np.repeat(predict(mean, null, np.array([0, 1]), variant), 2)[None])
        assert np.array_equal(predict_interval(mean, sd, null, np.array([], int), variant), [[0.3, 0.3]])
    again = predict_interval(mean, sd, null, np.array([1]), "harp-c")
    assert np.array_equal(again, predict_interval(mean, sd, null, np.array([1]), "harp-c")), "seeded"


def test_offline_mode_is_one_sentence(result):
    with pytest.raises(HarpError, match=r"^The Hub cannot be reached in offline mode: unset HF_HUB_OFFLINE\.$"):
        result.push_to_hub("me/x", token=TOKEN)


def test_null_intervals_are_wide_even_where_no_row_is_right():
    low, high = card._wilson(np.array([0.0]), np.array([8]))[0]
    assert low == 0
    assert 0.2 < high < 0.3


def test_no_row_is_needed_to_say_what_a_value_is():
    rows = Dataset.from_dict({"messages": [[{"role": "user", "content": "é"}]], "n": [0.123456], "t": ["x" * 900]})
    shown = card._sample(rows)
    assert json.loads(shown["messages"]) == [{"role": "user", "content": "é"}]
    assert shown["n"] == "0.1235"
    assert shown["t"].endswith(" ...")
    assert len(shown["t"]) < 700
