"""From pool to selection with SmolLM2-135M and MiniLM, both from their PyPI packages."""

import numpy as np
import pytest
from peft import LoraConfig

import harp_hf

pytestmark = pytest.mark.smollm


def test_the_useful_skill_is_chosen_and_the_damaged_one_is_not(tmp_path):
    from harp_hf.demo import demo_data, demo_embedder, demo_model

    data = demo_data()
    skills = np.array(data.pool["skill"])
    wanted = ["plural", "plural_damaged", "capital"]
    pool = data.pool.select(np.concatenate([np.flatnonzero(skills == skill)[:64] for skill in wanted]))
    proxy = data.proxy.filter(lambda row: row["task"] == "plural")
    args = harp_hf.HarpConfig(
        output_dir=str(tmp_path), features=str(demo_embedder()), leaf_size=64, max_measurements=3, max_steps=8,
        per_device_train_batch_size=16, per_device_eval_batch_size=24, learning_rate=1e-3, metric="likelihood",
    )  # fmt: skip
    peft_config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    result = harp_hf.measure(pool, proxy, str(demo_model()), args, peft_config)
    chosen = result.select("harp-c")
    assert np.mean(np.array(chosen["skill"]) == "plural") > 0.8
    best = result.posterior.mean[chosen[0]["harp_leaf"], 0]
    assert best > 0.3
    assert result.null[0] < 0.1
