"""Faults of single settings: keys, predictions, clipping, guidance, lengths."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

import torch

from fastdiff.adapters.doctor.description import SPACINGS, Description
from fastdiff.adapters.doctor.facts import CLASSES, KEYS, OTHERS, SIGMAS
from fastdiff.adapters.doctor.finding import FAULT, WARNING, Finding
from fastdiff.models.settings import is_number
from fastdiff.ops.row import PREDICTIONS

#: what a class that ignores them would have to do for these
ASKING = {**SIGMAS, "rescale_betas_zero_snr": False, "thresholding": False, "clip_sample": False}


def scheduler_class(d: Description) -> Iterator[Finding]:
    """A class that there is not."""
    if d.ours or d.name in CLASSES or d.name in OTHERS:
        return
    near = difflib.get_close_matches(d.name, [*CLASSES, *OTHERS], 1, 0.0)
    known = "_class_name is missing" if d.name == "None" else f"no scheduler {d.name} is known here"
    cost = "its timesteps are not examined, and a pipeline may not load it"
    yield Finding("scheduler_class", WARNING, known, cost, {"_class_name": near[0]}, note="if that is meant")


def unknown_keys(d: Description) -> Iterator[Finding]:
    """Keys that nobody reads."""
    known = d.known if d.ours else KEYS
    if known is None or d.name in OTHERS:
        return
    for key in (key for key in d.given if key not in known and not key.startswith("_")):
        near = difflib.get_close_matches(key, sorted(known), 1, 0.75)
        problem = f"nothing is called {key!r}" + (f": the nearest is {near[0]!r}" if near else "")
        cost = f"{d.given[key]!r} has no effect" + (f", {d.values.get(near[0], 'the default')!r} holds" if near else "")
        set_ = {near[0]: d.given[key]} if near else {}
        yield Finding("unknown_keys", FAULT if near else WARNING, problem, cost, set_, (key,))


def ignored_keys(d: Description) -> Iterator[Finding]:
    """Keys of other classes, that ask this one for something it does not do."""
    if d.name not in CLASSES:
        return
    for key in ASKING:
        if d.given.get(key) and key not in d.facts.defaults:
            problem = f"{d.name} has no {key}, and passes over it"
            takers = [name for name, facts in CLASSES.items() if key in facts.defaults]
            cost = f"{key} = {d.given[key]!r} has no effect"
            yield Finding("ignored_keys", WARNING, problem, cost, remove=(key,), note=f"or {', '.join(takers[:3])}")


def spacing_name(d: Description) -> Iterator[Finding]:
    """A spacing that there is not."""
    spacing = d.values.get("timestep_spacing")
    if not d.ours and spacing is not None and str(spacing) not in SPACINGS:
        near = difflib.get_close_matches(str(spacing), list(SPACINGS), 1, 0.0)
        problem = f"timestep_spacing {spacing!r} is none of {', '.join(SPACINGS)}"
        yield Finding("spacing_name", FAULT, problem, "set_timesteps raises", {"timestep_spacing": near[0]})


def sigmas(d: Description) -> Iterator[Finding]:
    """Several ways to space noise levels at once."""
    used = [key for key in SIGMAS if d.given.get(key)]
    if len(used) > 1:
        problem = f"{' and '.join(used)} are all true: only one can be"
        yield Finding(
            "sigmas", FAULT, problem, "the scheduler cannot be made: ValueError", dict.fromkeys(used[1:], False)
        )


def final_level(d: Description) -> Iterator[Finding]:
    """The plain DPM-Solver, whose last noise level cannot be 0."""
    plain = d.values.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver")
    if plain and d.values.get("final_sigmas_type") == "zero":
        problem = f"algorithm_type {d.values['algorithm_type']} with final_sigmas_type zero would divide by log(0)"
        yield Finding(
            "final_level",
            FAULT,
            problem,
            "the scheduler cannot be made: ValueError",
            {"final_sigmas_type": "sigma_min"},
        )


def prediction(d: Description) -> Iterator[Finding]:
    """What the network predicts: not said, or nothing that there is."""
    said, default = d.values.get("prediction_type"), d.facts.defaults.get("prediction_type")
    known = PREDICTIONS if d.ours else d.facts.predictions
    if default is None or (d.known is not None and said is None):
        return
    if not d.ours and d.given.get("prediction_type") is None:
        problem = "prediction_type is not written down"
        cost = f"the network is taken to predict {default}: right only if it does"
        yield Finding("prediction", WARNING, problem, cost, d.named({"prediction_type": default}))
    elif said not in known:
        near = difflib.get_close_matches(str(said), known, 1, 0.0)
        problem = f"{d.name} knows no prediction_type {said!r}, only {', '.join(known)}"
        yield Finding("prediction", FAULT, problem, "the first step raises", d.named({"prediction_type": near[0]}))


# ---- clipping ---------------------------------------------------------------------------------


def clipped_latents(d: Description) -> Iterator[Finding]:
    """Latents that are clipped as if they were pixels."""
    if d.network.latent and d.values.get("clip_sample") and not d.values.get("thresholding"):
        reach = d.values["clip_sample_range"]
        problem = f"clip_sample is true, and cuts latents off at {reach:g}, which have no such range"
        cost = f"{_outside(reach):.1%} of latents of variance 1 lie outside"
        yield Finding("clipped_latents", FAULT, problem, cost, {"clip_sample": False})


def _outside(reach: float) -> float:
    """The share of a normal variable beyond +-reach."""
    return math.erfc(reach / math.sqrt(2))


def thresholded_latents(d: Description) -> Iterator[Finding]:
    """Dynamic thresholding of latents, which have no range (Saharia et al. 2022 is about pixels)."""
    if not (d.network.latent and d.values.get("thresholding")):
        return
    ratio, most = d.values["dynamic_thresholding_ratio"], d.values["sample_max_value"]
    quantile = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(ratio, dtype=torch.float64)))
    reach = min(max(1.0, quantile), most)
    cut = f"{_outside(reach):.1%} of latents of variance 1 are cut off"
    cost = f"{cut}, at {reach:.3g}, and all are divided by that"
    yield Finding("thresholded_latents", FAULT, "thresholding is true for latents", cost, {"thresholding": False})


def unclipped_pixels(d: Description) -> Iterator[Finding]:
    """A network that predicts the noise of pixels, whose estimate of the image nothing keeps in range."""
    clips = d.values.get("clip_sample", True) or d.values.get("thresholding")
    if d.network.latent is not False or clips or d.values.get("prediction_type") != "epsilon" or not d.alpha_bar.size:
        return
    problem = f"clip_sample is false for pixels ({d.network.in_channels} channels), which lie in [-1, 1]"
    cost = f"an error of the noise is {d.ratio[-1]:.3g} times as large in the image at t = {d.total - 1}, and stays"
    yield Finding("unclipped_pixels", WARNING, problem, cost, {"clip_sample": True})


# ---- guidance and lengths ---------------------------------------------------------------------


def guidance(d: Description) -> Iterator[Finding]:
    """A guidance scale as in Ho & Salimans (w), where s = 1 + w is meant."""
    scale = d.given.get("guidance_scale")
    if scale is None or not is_number(scale) or scale >= 1 or not math.isfinite(scale):
        return
    problem = f"guidance_scale {scale:g} is below 1, the conditional model alone: s = 1 + w, if it is the paper's w"
    cost = f"the condition has {scale:.0%} of its weight" + (": labels are ignored" if scale == 0 else "")
    yield Finding("guidance", WARNING, problem, cost, {"guidance_scale": 1 + scale})


def training_length(d: Description) -> Iterator[Finding]:
    """A scheduler of another T than the network was trained with."""
    for place, total in d.trained.items():
        if total != d.total:
            problem = f"num_train_timesteps is {d.total}, but {total} in {place}"
            outside = max(0, d.total - total)
            cost = (
                f"{outside} of {d.total} timesteps were never seen"
                if outside
                else f"the network's noisiest t = {total - 1} is never reached"
            )
            yield Finding("training_length", FAULT, problem, cost, {"num_train_timesteps": total})
