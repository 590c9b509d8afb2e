"""What tests/test_accelerate.py runs in two processes: each writes what it saw to `<folder>/seen-<rank>.json`."""

import json
import sys
from pathlib import Path

from datasets import Dataset

import harp_hf.finetune
from harp_hf import HarpConfig, HarpError, measure
from harp_hf.finetune import LeafTrainer
from harp_hf.processes import from_main, is_main, leave, main_first, mean

folder, model = Path(sys.argv[1]), sys.argv[2]
seen: dict = {}


def fail():
    raise ZeroDivisionError("of one\nprocess")


class LosesOne(LeafTrainer):
    """The loss of the first finetune is not a number on the second process alone."""

    finetunes = 0

    def train(self, **given):
        done = super().train(**given)
        LosesOne.finetunes += 1
        return done._replace(training_loss=float("nan")) if LosesOne.finetunes == 1 and not is_main() else done


args = HarpConfig(
    output_dir=str(folder / "run"), features="vector", leaf_size=12, branching=2, max_measurements=3, max_steps=3,
    learning_rate=3e-2, use_cpu=True, bf16=False, active_tasks=["all"],
)  # fmt: skip
seen["world_size"] = args.world_size
pool, proxy = (main_first(lambda name=name: Dataset.from_json(str(folder / name))) for name in
               ("pool.jsonl", "proxy.jsonl"))  # fmt: skip
seen["from_main"] = from_main(lambda: f"said by {'the main one' if is_main() else 'another'}")
seen["mean"] = [mean(1.0 if is_main() else 3.0), str(mean(1.0 if is_main() else float("nan")))]
try:
    from_main(fail)
except (HarpError, ZeroDivisionError) as error:
    seen["failed"] = f"{type(error).__name__}: {error}"

harp_hf.finetune.LeafTrainer = LosesOne
result = measure(pool, proxy, model, args)
seen["failed_leaves"] = list(result.measurements.failed)
seen["rows"] = result.select()["harp_row"][:]
seen["finetunes"] = LosesOne.finetunes

# One measurement is lost, as in a run that was killed: only that one is made again.
lost = folder / "run" / "measurements" / f"{result.measurements.leaves[0]}-{args.seed}.npz"
from_main(lost.unlink)
again = measure(pool, proxy, model, args)
seen["finetunes_again"] = LosesOne.finetunes - seen["finetunes"]
seen["same"] = bool(abs(again.measurements.scores - result.measurements.scores).max() < 1e-6)
rank = 0 if is_main() else 1
(folder / f"seen-{rank}.json").write_text(json.dumps(seen))
leave()
