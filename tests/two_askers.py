"""A program that a test starts on two processes: each asks every other request, and writes what it got."""

import json
import sys
from pathlib import Path

from image_requests import instances, load, make_images, to_generate, to_score
from lm_eval.api.model import CachingLM

from harness_tasks.vlm import MedForgetVLM


def main(folder: Path) -> None:
    model = load(MedForgetVLM, str(folder / "model"))
    computed = {"images": 0, "rows": 0}
    share = model._share

    def count(batch):
        computed["images"] += len(batch)
        computed["rows"] += sum(len(part.rows) for part in batch)
        return share(batch)

    model._share = count
    facts = {"rank": model.rank, "world": model.world_size}

    def ask(name, kind, asked, of=model):
        own = instances(kind, asked[model.rank :: model.world_size])
        answers = getattr(of, kind)(own)
        model.barrier()
        facts[name] = {"answers": answers, **computed}
        computed.update(images=0, rows=0)

    images = make_images()
    texts, scores = to_generate(model, images), to_score(model, images)
    texts = [text for i in range(len(images)) for text in texts[i :: len(images)]]  # each asks about every image
    ask("generate", "generate_until", texts)
    ask("again", "generate_until", texts + texts[1:])  # the same, asked by the other process too
    ask("score", "loglikelihood", scores)
    ask("cached", "generate_until", texts, CachingLM(model, str(folder / f"first_rank{model.rank}.db")))
    # As after a crash: the first process has its answers, and the other one none.
    kept = "first" if model.rank == 0 else "second"
    ask("resumed", "generate_until", texts, CachingLM(model, str(folder / f"{kept}_rank{model.rank}.db")))
    (folder / f"{model.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
