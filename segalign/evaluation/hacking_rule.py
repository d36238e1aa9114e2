"""A rule that suspects a run of climbing its reward at the cost of its images.

It is told what each evaluation of a run has found; captions and noise are the same every time, so
that the first, of the start, is what later ones are held against. It suspects a run when the reward
that is trained on has risen since the start, and at the same time something says that images got
worse, at ``patience`` evaluations in a row:

- a held-out reward has fallen below its best;
- images look alike: those of other captions (cross-prompt similarity), or all of them like what
  captions have in common (similarity to V);
- detail is off by a factor: high frequencies, or sharpness;
- images of one caption look alike (diversity), or have drifted from those of the start as far as
  other noise would take them.

The last two are no fault by themselves. A model that learns to follow its captions draws the same
for any noise, and something else than before. So they are heard only where no held-out reward
confirms the gain, by having risen since the start and kept its best.

A rise or a fall counts if it exceeds its noise: the standard error of the mean over captions of the
differences, ``num_errors`` times; and a fall must be ``min_fall`` of the spread of the start's
captions besides, for with many images the smallest difference is no noise. Without values of single
images, any difference counts. What was not measured, at the start or now, is not heard.

The thresholds were set on the runs of ``benchmarks/scenes_overfit.py``. They are no values of the
literature, and of other images may have to be others.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from segalign.evaluation.hacking_settings import HackingSettings
from segalign.evaluation.reading import Reading, paired_error, spread

_State = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What the rule makes of an evaluation; plain data.

    Attributes:
        step: Optimizer steps so far.
        suspected: Whether the run is suspected now.
        is_new: Whether it was not so at the evaluation before: the moment to say so.
        reasons: What speaks against the images, a line each, with numbers; also where patience is
            not yet at its end.
        since: Step of the first of the evaluations in a row that found a reason, or None.
    """

    step: int
    suspected: bool
    is_new: bool
    reasons: tuple[str, ...]
    since: int | None


class HackingRule:
    """Decides after each evaluation of a run whether it is suspected; it computes nothing else.

    Args:
        settings: What is watched, and the thresholds.
    """

    def __init__(self, settings: HackingSettings | None = None) -> None:
        self.settings = settings or HackingSettings()
        self._state: _State = {}

    def judge(self, reading: Reading) -> Verdict:
        """Take in an evaluation; the first one is what later ones are held against.

        A step that was judged before gets the verdict that it had, which is not new, and counts
        once.
        """
        if not self._state:
            self._state = {"start": self._keep(reading), "best": {}, "since": None, "streak": 0}
        elif reading.step <= self._state["verdict"]["step"]:
            known = self._state["verdict"]
            return Verdict(**known | {"reasons": tuple(known["reasons"]), "is_new": False})
        reasons = tuple(self._reasons(reading))
        self._remember_best(reading)
        state = self._state
        state["streak"] = state["streak"] + 1 if reasons else 0
        state["since"] = (state["since"] or reading.step) if reasons else None
        suspected = state["streak"] >= self.settings.patience
        is_new = suspected and not state.get("verdict", {}).get("suspected", False)
        verdict = Verdict(reading.step, suspected, is_new, reasons, state["since"])
        state["verdict"] = vars(verdict) | {"reasons": list(reasons)}
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._state = copy.deepcopy(dict(state_dict))

    # What speaks against the images

    def _reasons(self, now: Reading) -> Iterator[str]:
        if not self._has_risen(self.settings.reward, now):
            return
        yield from self._fallen_rewards(now)
        for witness in (self._cross_prompt, self._to_v):
            yield from witness(now)
        for name in self.settings.details:
            yield from self._detail(name, now)
        if not self._is_confirmed(now):
            yield from self._diversity(now)
            yield from self._drift(now)

    def _fallen_rewards(self, now: Reading) -> Iterator[str]:
        for name in self._held_out(now):
            best = self._state["best"][name]
            found = now.values[name]
            if self._has_fallen(name, now):
                yield (
                    f"`{name}` has fallen from {best['value']:.4g} at step {best['step']} to "
                    f"{found:.4g}, while `{self.settings.reward}` rose"
                )

    def _cross_prompt(self, now: Reading) -> Iterator[str]:
        name = self.settings.cross_prompt
        for start, found in self._pair(name, now):
            if start < 1 and (found - start) / (1 - start) > self.settings.max_cross_prompt:
                yield f"images of other captions look alike: `{name}` {start:.4g} to {found:.4g}"

    def _to_v(self, now: Reading) -> Iterator[str]:
        name = self.settings.to_v
        unit = spread(self._state["start"]["captions"].get(name, ()))
        for start, found in self._pair(name, now):
            if unit and found - start > self.settings.max_to_v * unit:
                yield f"images fit any caption better: `{name}` {start:.4g} to {found:.4g}"

    def _detail(self, name: str, now: Reading) -> Iterator[str]:
        for start, found in self._pair(name, now):
            limit = self.settings.max_detail
            if start > 0 and not 1 / limit <= found / start <= limit:
                yield f"detail is off: `{name}` {start:.4g} to {found:.4g}"

    def _diversity(self, now: Reading) -> Iterator[str]:
        for name in now.ending(self.settings.diversity):
            for start, found in self._pair(name, now):
                if found < self.settings.min_diversity * start:
                    yield f"images of one caption look alike: `{name}` {start:.4g} to {found:.4g}"

    def _drift(self, now: Reading) -> Iterator[str]:
        for name in now.ending(self.settings.drift):
            found = now.value(name)
            if found is not None and found > self.settings.max_drift:
                yield f"images have left those of the start: `{name}` {found:.4g}"

    # Rewards

    def _held_out(self, now: Reading) -> list[str]:
        """List the held-out rewards that are known now and before, without their parts."""
        first = self.settings.held_out
        return [
            name
            for name in sorted(self._state["best"])
            if now.value(name) is not None and "/" not in name.removeprefix(first)
        ]

    def _is_confirmed(self, now: Reading) -> bool:
        names = self._held_out(now)
        kept = not any(self._has_fallen(name, now) for name in names)
        return kept and any(self._has_risen(name, now) for name in names)

    def _has_risen(self, name: str, now: Reading) -> bool:
        start, found = self._state["start"], now.value(name)
        if found is None or name not in start["values"]:
            return False
        error = paired_error(now.of_captions(name), start["captions"].get(name, ()))
        rise: float = found - start["values"][name]
        return rise > self.settings.num_errors * error

    def _has_fallen(self, name: str, now: Reading) -> bool:
        best = self._state["best"][name]
        error = paired_error(now.of_captions(name), best["captions"])
        unit = spread(self._state["start"]["captions"].get(name, ()))
        fall: float = best["value"] - now.values[name]
        return fall > max(self.settings.num_errors * error, self.settings.min_fall * unit)

    # What is kept

    def _pair(self, name: str, now: Reading) -> list[tuple[float, float]]:
        """Return a value of the start and of now, if both are known; else nothing."""
        start, found = self._state["start"]["values"].get(name), now.value(name)
        return [] if start is None or found is None else [(start, found)]

    def _keep(self, reading: Reading) -> _State:
        """Keep of the start what later evaluations are held against."""
        chosen = self.settings
        names = [chosen.reward, chosen.cross_prompt, chosen.to_v, *chosen.details]
        names += reading.ending(chosen.diversity)
        names += [name for name in reading.values if name.startswith(chosen.held_out)]
        known = {n: value for n in names if (value := reading.value(n)) is not None}
        kept = [name for name in known if name.startswith((chosen.reward, chosen.held_out))]
        kept += [chosen.to_v] if chosen.to_v in known else []
        return {"values": known, "captions": {name: reading.of_captions(name) for name in kept}}

    def _remember_best(self, reading: Reading) -> None:
        best = self._state["best"]
        for name in reading.values:
            value = reading.value(name)
            if value is None or not name.startswith(self.settings.held_out):
                continue
            if name not in best or value > best[name]["value"]:
                captions = reading.of_captions(name)
                best[name] = {"step": reading.step, "value": value, "captions": captions}
