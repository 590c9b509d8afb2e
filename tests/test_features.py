"""Features: from everything a user may pass to one matrix of unit-norm float32 rows on disk."""

import numpy as np
import pytest
from datasets import Dataset

from harp_hf.errors import DataError
from harp_hf.features import describe_features, load_features
from harp_hf.rundir import RunDir


def decode(ids):
    return " ".join(map(str, ids))


@pytest.fixture
def load(pool, tmp_path):
    def call(features, pool=pool, folder="run", seed=42, **given):
        run = RunDir(tmp_path / folder)
        return load_features(run, pool, features, text_field="text", decode=decode, seed=seed, **given)

    return call


class Lengths:
    """Encodes a text by the numbers of its words and letters, and remembers what it was asked."""

    def __init__(self):
        self.texts = []

    def encode(self, texts, batch_size, show_progress_bar):
        assert not show_progress_bar
        self.texts += texts
        return np.array([[len(t.split()), len(t), 1] for t in texts], np.float64)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """Folder of a real sentence-transformers model: one random vector a word, averaged."""
    from conftest import ANSWERS, WORDS
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<unk>", "wrong", *ANSWERS, *ANSWERS.values(), *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    weights = np.random.default_rng(0).standard_normal((len(vocabulary), 8)).astype(np.float32)
    folder = str(tmp_path_factory.mktemp("embedder"))
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights)], device="cpu").save(folder)
    return folder


@pytest.fixture(params=["array", "column", "tfidf", "object", "path"])
def source(request, features, pool, embedder):
    """Each kind of features, with the pool they belong to."""
    return {
        "array": lambda: (features, pool),
        "column": lambda: ("vector", pool.add_column("vector", features.tolist())),
        "tfidf": lambda: ("tfidf", pool),
        "object": lambda: (Lengths(), pool),
        "path": lambda: (embedder, pool),
    }[request.param]()


def test_rows_are_unit_norm_float32_and_memory_mapped(load, source):
    given, pool = source
    matrix = load(given, pool)
    assert isinstance(matrix, np.memmap)
    assert matrix.dtype == np.float32
    assert len(matrix) == len(pool)
    assert matrix.ndim == 2
    assert np.linalg.norm(matrix, axis=1) == pytest.approx(1, abs=1e-6)


def test_the_same_input_gives_the_same_bytes(load, source, tmp_path):
    given, pool = source
    load(given, pool, "one")
    load(given, pool, "two")
    assert (tmp_path / "one" / "features.npy").read_bytes() == (tmp_path / "two" / "features.npy").read_bytes()


def test_directions_are_those_given(load, features, pool):
    expected = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert load(features) == pytest.approx(expected, abs=1e-6)
    assert load("vector", pool.add_column("vector", features.tolist()), "column") == pytest.approx(expected, abs=1e-6)
    assert load((features * 1000).astype(int), folder="whole") == pytest.approx(expected, abs=2e-3)


def test_a_path_and_the_model_itself_give_the_same(load, embedder):
    from sentence_transformers import SentenceTransformer

    by_path, by_object = load(embedder), load(SentenceTransformer(embedder, device="cpu"), folder="object")
    assert np.array_equal(by_path, by_object)
    assert by_path.shape == (96, 8)


def test_tfidf_puts_similar_rows_near_each_other(load):
    matrix = load("tfidf")
    red, green = matrix[:24] @ matrix[:24].T, matrix[:24] @ matrix[24:48].T
    assert red.mean() > green.mean() + 0.1


def test_a_model_reads_what_each_row_asks_in_the_order_of_the_pool(load, pool):
    model = Lengths()
    load(model, batch_size=1)
    assert model.texts == [row["prompt"] for row in pool]


def test_answers_are_read_only_where_they_are_not_parted_from_the_question(load):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ciao"}]
    model = Lengths()
    load(model, Dataset.from_dict({"messages": [turns, turns[1:]]}))
    load(model, Dataset.from_dict({"text": ["hi ciao"]}), folder="text")
    assert model.texts == ["hi", "ciao", "hi ciao"]


def test_a_pool_that_comes_tokenised_is_decoded(load):
    model = Lengths()
    load(model, Dataset.from_dict({"input_ids": [[5, 6], [7]]}))
    assert model.texts == ["5 6", "7"]


def test_features_are_computed_once_a_run_directory(load):
    model = Lengths()
    first = np.array(load(model))
    asked = len(model.texts)
    assert asked == 96
    assert np.array_equal(load(model), first)
    assert len(model.texts) == asked


def test_a_row_without_any_feature_is_zero(load, features):
    features = features.copy()
    features[3] = 0
    matrix = load(features)
    assert not matrix[3].any()
    assert np.linalg.norm(np.delete(matrix, 3, axis=0), axis=1) == pytest.approx(1, abs=1e-6)


def test_tiny_and_huge_vectors_keep_their_direction(load, features):
    features = features.copy()
    features[0] *= 1e-12
    features[1] *= 1e12
    assert np.linalg.norm(load(features)[:2], axis=1) == pytest.approx(1, abs=1e-5)


def test_tfidf_of_equal_rows_and_of_one_row(load):
    same = load("tfidf", Dataset.from_dict({"text": ["one word"] * 5}), "same")
    assert same @ same.T == pytest.approx(1, abs=1e-5)
    assert load("tfidf", Dataset.from_dict({"text": ["alone"]}), "one").shape == (1, 1)


def test_tfidf_without_words(load):
    with pytest.raises(DataError, match='The pool has no words, so features="tfidf" cannot tell its rows apart'):
        load("tfidf", Dataset.from_dict({"text": ["!", "?"]}))


def test_a_matrix_of_another_pool_is_refused(load, features, pool):
    load(features)
    with pytest.raises(DataError, match=r"features.npy has 96 rows, but the pool has 95"):
        load(features, pool.select(range(95)))


def test_a_model_that_fails_late_leaves_nothing(load, tmp_path, pool):
    class Fails(Lengths):
        def encode(self, texts, **given):
            if self.texts:
                raise RuntimeError("out of memory")
            return super().encode(texts, **given)

    with pytest.raises(RuntimeError, match="out of memory"):
        load(Fails(), batch_size=1)
    assert not list((tmp_path / "run").iterdir())


def test_features_are_identified_by_what_they_are(features):
    assert describe_features("tfidf") == "tfidf"
    assert describe_features(features) == describe_features(np.asfortranarray(features))
    assert describe_features(features) != describe_features(features + 1e-9)
    assert describe_features(Lengths()) == describe_features(Lengths())

    class OtherLengths(Lengths):
        def encode(self, texts, **settings):
            return super().encode(texts, **settings) + 1

    OtherLengths.__name__ = "Lengths"
    assert describe_features(OtherLengths()) != describe_features(Lengths())


def test_a_column_and_an_array_are_read_in_blocks(load, features, pool, monkeypatch):
    whole = load(features, folder="whole")
    monkeypatch.setattr("harp_hf.features._BLOCK", 5)
    assert np.array_equal(load(features, folder="array"), whole)
    assert np.array_equal(load("vector", pool.add_column("vector", features.tolist()), folder="column"), whole)
    ragged = pool.add_column("vector", [row[: 3 + (number > 7)] for number, row in enumerate(features.tolist())])
    with pytest.raises(DataError, match="same length"):
        load("vector", ragged, folder="ragged")


def test_a_folder_of_features_is_known_by_its_files_unless_it_is_a_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text("{}")
    before = describe_features("model")
    (tmp_path / "model" / ".cache").mkdir()
    (tmp_path / "model" / ".cache" / "a.lock").write_text("")
    assert describe_features("model") == before != "model"
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text("[]")
    assert describe_features("model") != before
    assert describe_features("model", ["prompt", "model"]) == "model"
    (tmp_path / "tfidf").mkdir()
    assert describe_features("tfidf") == "tfidf"
