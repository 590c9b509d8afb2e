"""How HARP's computing grows to a million rows, beside flat k-means and scikit-learn's faster ones.

    python recipes/benchmarks/scale.py --folder runs/scale --results scale.json
    python recipes/benchmarks/scale.py --folder runs/scale --results scale.json --features mine.npy

Rows are synthetic, or near copies of those of `--features` (a matrix of your own). Finetunes are left out: the effects
of the measured leaves are made up. It may be stopped and called again, with other rows and methods too: every line of
the table is kept in `--results` as soon as it is done.

Every line is measured in a process of its own with one thread, and its seconds are those of the processor. Memory is
the largest resident set of the whole process, with the interpreter, its libraries and the pages of the mapped matrix
that it has touched. The distance is the mean cosine distance of rows to the direction of their leaf's mean, and beside
it the mean Euclidean distance to that mean. Flat k-means is faiss's, spherical, 25 iterations on all rows: it takes at
most 256 rows a leaf, and there are fewer. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harp_hf.design import choose_leaves
from harp_hf.envelopes import VARIANTS, greedy
from harp_hf.hierarchy import build_hierarchy
from harp_hf.posterior import infer
from harp_hf.similarity import leaf_similarity, nearest_rows

DIMENSIONS = 384
REGIONS, TOPICS = 200, 10_000
BLOCK = 16_384
# Of flat k-means; those that faiss takes where it is not told.
ITERATIONS = 25
STAGES = ("hierarchy", "similarity", "design", "posterior", *VARIANTS)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, smallest first, and print the tables."""
    asked = _parse(argv)
    if asked.cell:
        print(json.dumps(_measure(asked)))
        return
    results = Path(asked.results)
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    asked.folder.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    source = "replicated" if asked.features else "synthetic"
    for rows in sorted(asked.rows):
        for method in sorted(asked.methods, key=list(METHODS).index):
            key = {"source": source, "rows": rows, "leaf_size": asked.leaf_size, "method": method}
            if _find(known, **key):
                continue
            path = asked.folder / f"{source}-{rows}.npy"
            if not path.exists():
                write_features(path, rows, asked.features, asked.seed)
            harp = _find(known, **key | {"method": "harp"})
            if method != "harp" and not harp:
                raise SystemExit(f"{method} gets as many leaves as harp has: measure that with {rows} rows first.")
            known.append(key | _in_a_process(asked, path, method, harp["leaves"] if harp else 0))
            results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(known[-1], flush=True)
    print(tables(known))


def _find(known: list[dict[str, Any]], **key: Any) -> dict[str, Any] | None:
    return next((line for line in known if all(line[name] == value for name, value in key.items())), None)


def _in_a_process(asked: argparse.Namespace, path: Path, method: str, leaves: int) -> dict[str, Any]:
    flags = {"cell": method, "folder": path, "rows": leaves, "leaf_size": asked.leaf_size, "seed": asked.seed,
             "tasks": asked.tasks, "measured": asked.measured}  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, *(f"--{name}={value}" for name, value in flags.items())],
        env=os.environ | dict.fromkeys(THREADS, "1"), stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def write_features(path: Path, rows: int, own: Path | None, seed: int) -> None:
    """Unit-norm rows, block by block: synthetic, or rows of `own` with near copies of them.

    Synthetic rows lie around 10^4 topics, which lie around 200 regions, in directions of falling variance. A copy of a
    row is moved by a part of the difference between two others, so that copies differ as rows do.
    """
    random = np.random.default_rng(seed)
    if own is not None:
        matrix = np.load(own).astype(np.float32)
        matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    else:
        spread = (1 + np.arange(DIMENSIONS)) ** -0.5
        regions = random.standard_normal((REGIONS, DIMENSIONS))
        topics = regions[random.integers(0, REGIONS, TOPICS)] + 0.8 * random.standard_normal((TOPICS, DIMENSIONS))
    aside = path.with_suffix(".part")
    shape = (rows, DIMENSIONS if own is None else matrix.shape[1])
    made = np.lib.format.open_memmap(aside, "w+", np.float32, shape)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        if own is None:
            block = topics[random.integers(0, TOPICS, count)] + 0.6 * random.standard_normal((count, DIMENSIONS))
            block *= spread
        else:
            copied, plus, minus = random.integers(0, len(matrix), (3, count))
            block = matrix[copied] + 0.3 * (matrix[plus] - matrix[minus])
        made[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    made.flush()
    aside.replace(path)


def _measure(asked: argparse.Namespace) -> dict[str, Any]:
    features = np.load(asked.folder, mmap_mode="r")
    started = time.monotonic()
    labels, found = METHODS[asked.cell](features, asked)
    found |= {"wall": time.monotonic() - started, "memory": _peak() / features.nbytes, "peak": _peak()}
    cosine, euclidean = within(features, labels)
    return {"matrix": features.nbytes} | found | {"cosine": cosine, "euclidean": euclidean}


def _peak() -> int:
    """Largest resident memory of this process in bytes; the pages of memory-mapped files count."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def within(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean distance of rows to the mean of their leaf: of cosine (to its direction), and Euclidean."""
    sums = np.zeros((labels.max() + 1, features.shape[1]))
    for rows, block in _blocks(features):
        np.add.at(sums, labels[rows], block)
    means = sums / np.maximum(np.bincount(labels), 1)[:, None]
    directions = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    cosine = euclidean = 0.0
    for rows, block in _blocks(features):
        cosine += (1 - (block * directions[labels[rows]]).sum(axis=1)).sum()
        euclidean += np.linalg.norm(block - means[labels[rows]], axis=1).sum()
    return cosine / len(features), euclidean / len(features)


def _blocks(features: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, np.asarray(features[rows], np.float64)


def _harp(features: np.ndarray, asked: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        before = time.process_time()
        done = work()
        seconds[stage] = time.process_time() - before
        return done

    hierarchy = timed("hierarchy", lambda: build_hierarchy(features, leaf_size=asked.leaf_size, seed=asked.seed))
    random = np.random.default_rng(asked.seed)
    task, proxy = _proxy(features, asked.tasks, random)
    nearest = timed("similarity", lambda: nearest_rows(features, proxy))
    similarity = leaf_similarity(nearest, hierarchy, task, asked.tasks)
    leaves = timed("design", lambda: choose_leaves(hierarchy, asked.measured, similarity))
    # Effects made up: a part smooth in feature space, a part by similarity, a part of the leaf's own, and noise.
    directions = random.standard_normal((features.shape[1], asked.tasks))
    true = 0.03 * hierarchy.centroids[leaves] @ directions + 0.005 * np.minimum(similarity[leaves], 10)
    true += 0.01 * random.standard_normal(true.shape)
    variances = 0.02**2 * random.uniform(0.5, 2, true.shape)
    effects = true + np.sqrt(variances) * random.standard_normal(true.shape)
    posterior = timed("posterior", lambda: infer(effects, variances, leaves, hierarchy, similarity=similarity))
    null, weights = random.uniform(0.2, 0.7, asked.tasks), np.ones(asked.tasks)
    for variant in VARIANTS:
        timed(variant, lambda variant=variant: greedy(posterior.mean, null, weights, variant=variant))
    found = {"leaves": hierarchy.n_leaves, "tasks": asked.tasks, "measured": len(leaves), "proxy_rows": len(proxy)}
    sizes = {"smallest": int(hierarchy.sizes.min()), "largest": int(hierarchy.sizes.max())}
    return hierarchy.leaf, found | sizes | {"seconds": seconds["hierarchy"], "stages": seconds}


def _proxy(features: np.ndarray, tasks: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """25 rows a task, around a row of the pool."""
    task = np.repeat(np.arange(tasks), 25)
    middle = features[random.integers(0, len(features), tasks)]
    plus, minus = (features[random.integers(0, len(features), len(task))] for _ in range(2))
    rows = middle[task] + 0.5 * (plus - minus)
    return task, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _faiss(features: np.ndarray, asked: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """Flat spherical k-means on all rows."""
    import faiss

    faiss.omp_set_num_threads(1)
    before = time.process_time()
    rows = np.ascontiguousarray(features)
    model = faiss.Kmeans(
        rows.shape[1], asked.rows[0], niter=ITERATIONS, spherical=True, seed=asked.seed,
        min_points_per_centroid=1, max_points_per_centroid=len(rows),
    )  # fmt: skip
    model.train(rows)
    labels = model.index.search(rows, 1)[1][:, 0]
    return labels, {"leaves": asked.rows[0], "seconds": time.process_time() - before}


def _scikit_learn(name: str) -> Callable[[np.ndarray, argparse.Namespace], tuple[np.ndarray, dict[str, Any]]]:
    def cluster(features: np.ndarray, asked: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
        import sklearn.cluster

        before = time.process_time()
        labels = getattr(sklearn.cluster, name)(asked.rows[0], random_state=asked.seed).fit(features).labels_
        return labels, {"leaves": asked.rows[0], "seconds": time.process_time() - before}

    return cluster


METHODS: dict[str, Callable[[np.ndarray, argparse.Namespace], tuple[np.ndarray, dict[str, Any]]]] = {
    "harp": _harp,
    "faiss": _faiss,
    "minibatch": _scikit_learn("MiniBatchKMeans"),
    "bisecting": _scikit_learn("BisectingKMeans"),
}


def tables(known: list[dict[str, Any]]) -> str:
    """All that is known in Markdown: the methods beside each other, then the stages of HARP."""
    known = sorted(
        known, key=lambda r: (r["source"], r["leaf_size"], r["rows"], list(METHODS).index(r["method"]))
    )  # fmt: skip
    lines = [
        "| features | rows | leaves | method | seconds | times HARP's | within-leaf distance | against flat | "
        "Euclidean | peak memory, GB | times the matrix |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in known:
        same = {name: line[name] for name in ("source", "rows", "leaf_size")}
        harp, flat = (_find(known, **same, method=method) for method in ("harp", "faiss"))
        against = f"{line['cosine'] / flat['cosine'] - 1:+.1%}" if flat else ""
        times = f"{line['seconds'] / harp['seconds']:.1f}" if harp else ""
        lines.append(
            f"| {line['source']} | {line['rows']:,} | {line['leaves']:,} | {line['method']} | {line['seconds']:.1f} | "
            f"{times} | {line['cosine']:.4f} | {against} | {line['euclidean']:.4f} | {line['peak'] / 1e9:.2f} | "
            f"{line['memory']:.2f} |"
        )
    lines += ["", f"| features | rows | leaves | measured | {' | '.join(STAGES)} | posterior, greedy of hierarchy |"]
    lines.append("|---" * (5 + len(STAGES)) + "|")
    harps = [line for line in known if line["method"] == "harp"]
    for line in harps:
        stages = line["stages"]
        share = sum(stages[name] for name in ("posterior", *VARIANTS)) / stages["hierarchy"]
        lines.append(
            f"| {line['source']} | {line['rows']:,} | {line['leaves']:,} | {line['measured']} | "
            f"{' | '.join(f'{stages[name]:.2f}' for name in STAGES)} | {share:.1%} |"
        )
    for kind in sorted({(line["source"], line["leaf_size"]) for line in harps}):
        points = [(line["rows"], line["seconds"]) for line in harps if (line["source"], line["leaf_size"]) == kind]
        if len(points) > 1:
            slope = np.polyfit(*np.log(points).T, 1)[0]
            lines += ["", f"The hierarchy's time grows like rows^{slope:.2f} ({kind[0]}, leaves of {kind[1]})."]
    return "\n".join([*lines, ""])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="Where feature matrices are written.")
    parser.add_argument("--results", help="File of everything measured.")
    parser.add_argument("--features", type=Path, help="An npy file with a matrix of your own, to be replicated.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--leaf_size", type=int, default=128, help="50 makes 20,000 leaves of a million rows.")
    parser.add_argument("--tasks", type=int, default=57, help="Tasks, as many as MMLU has.")
    parser.add_argument("--measured", type=int, default=180, help="Leaves measured.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", choices=METHODS, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if not (asked.results or asked.cell):
        parser.error("--results is needed: the file that keeps every line of the tables")
    return asked


if __name__ == "__main__":
    main()
