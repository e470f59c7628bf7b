"""Held-out wordings that no row trains on, across all rows.

A model words many sections' questions alike, and calls a wording held out here that it gave for training there. So the
part of a wording is decided once for all rows: the one that more rows want it for, unless a row would be left with too
few of a part. A row that nothing else helps takes fixed wordings, whose parts stand from the beginning.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from ..phrasings import IDENTITY, Phrasings, contains
from .replies import MIN_HELD_OUT, MIN_TRAINING, Draft, wording_key


def set_apart(drafts: Mapping[str, Draft], *, image: str) -> tuple[dict[str, Phrasings], list[str]]:
    """Decide for every wording of every row whether it is trained on or held out.

    The result depends on the drafts alone and not on their order.

    Args:
        drafts (`Mapping[str, Draft]`): Row id to what the row could ask.
        image (`str`): What the questions call an image; those of identity are trained on, too.

    Returns:
        `tuple[dict[str, Phrasings], list[str]]`: Row id to its wordings, at least four for training and one held out;
        and the ids of the rows that took fixed wordings.

    Raises:
        ValueError: A row has neither wordings of its own nor fixed ones for a part; the message is its id.
    """
    fixed = _fixed_parts(drafts, image)
    held_out = _held_out(drafts, fixed)
    decided, filled = {}, []
    for id, draft in drafts.items():
        own: dict[str, dict[str, str]] = {"training": {}, "held_out": {}}
        for wording in sum(draft.phrasings, ()):
            key = wording_key(wording)
            own["held_out" if key in held_out else "training"][key] = wording
        before = len(own["training"]), len(own["held_out"])
        for part, least in (("training", MIN_TRAINING), ("held_out", MIN_HELD_OUT)):
            for wording in _usable(draft, getattr(draft.spare, part)):
                if len(own[part]) < least and fixed[wording_key(wording)] == part:
                    own[part].setdefault(wording_key(wording), wording)
            if len(own[part]) < least:
                raise ValueError(id)
        if before != (len(own["training"]), len(own["held_out"])):
            filled.append(id)
        decided[id] = Phrasings(tuple(own["training"].values()), tuple(own["held_out"].values()))
    return decided, filled


def _fixed_parts(drafts: Mapping[str, Draft], image: str) -> dict[str, str]:
    spares = [draft.spare for draft in drafts.values()]
    parts = {wording_key(wording): "held_out" for spare in spares for wording in spare.held_out}
    spares += [phrasings.fill(image=image) for phrasings in IDENTITY.values()]
    return parts | {wording_key(wording): "training" for spare in spares for wording in spare.training}


def _held_out(drafts: Mapping[str, Draft], fixed: dict[str, str]) -> set[str]:
    """Keys of the wordings that are held out, with as few rows as can be left short of a part."""
    rows: dict[str, list[str]] = {}
    wanted: dict[str, Counter[str]] = defaultdict(Counter)
    of_rows: dict[str, list[str]] = defaultdict(list)
    for id in sorted(drafts):
        for part, wordings in drafts[id].phrasings._asdict().items():
            for key in map(wording_key, wordings):
                wanted[key][part] += 1
                of_rows[key].append(id)
                rows.setdefault(id, []).append(key)
    share = {key: counts["held_out"] / counts.total() for key, counts in wanted.items()}
    held_out = {key for key in wanted if (fixed[key] == "held_out" if key in fixed else share[key] > 0.5)}
    trained = {id: sum(key not in held_out for key in keys) for id, keys in rows.items()}
    for id, keys in rows.items():
        by_share = sorted((key for key in keys if key not in fixed), key=lambda key: (share[key], key))
        for key in by_share:
            if trained[id] >= MIN_TRAINING or key not in held_out:
                continue
            if all(len(rows[other]) - trained[other] > MIN_HELD_OUT for other in of_rows[key]):
                held_out.remove(key)
                trained |= {other: trained[other] + 1 for other in of_rows[key]}
        for key in reversed(by_share):
            if len(keys) - trained[id] >= MIN_HELD_OUT or key in held_out:
                continue
            if all(trained[other] > MIN_TRAINING for other in of_rows[key]):
                held_out.add(key)
                trained |= {other: trained[other] - 1 for other in of_rows[key]}
    return held_out


def _usable(draft: Draft, wordings: tuple[str, ...]) -> Iterator[str]:
    """Fixed wordings that do not give the answer away; a letter is not looked for."""
    return (wording for wording in wordings if draft.options or not contains(wording, draft.answer))
