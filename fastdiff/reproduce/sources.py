"""What the four tutorials hold, and where each thing is here: a row for each, with its recipe, figure and test.

``python -m fastdiff.reproduce.sources`` writes the page beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastdiff import _io

PAGE = Path(__file__).with_name("SOURCES.md")
#: what they are
TUTORIALS = {
    "S0": "a history of diffusion models, from 2015 to Palette",
    "S1": "a short derivation of DDPM",
    "S2": "2-D data, predicting x0, strided sampling",
    "S3": "slides: DDPM, improved DDPM, DDIM, guidance, schedules, FID and IS",
}


class Row(NamedTuple):
    """``where`` in the sources; ``code`` is ``module:name``, ``shown`` ``recipe/file``, ``test`` ``file::name``."""

    what: str
    where: str
    code: str
    shown: str
    test: str


SYSTEMS = (
    Row("Sohl-Dickstein et al. 2015: MLP, mean and variance, the whole bound", "S0 S1", "fastdiff.models:MLP",
        "sohl-dickstein/trajectories.png", "test_losses.py::test_vlb_loss_is_the_kl_in_closed_form"),
    Row("DDPM", "S0 S1 S3", "fastdiff.solvers:ddpm", "ddpm/samples.png",
        "test_diffusion.py::test_posterior_is_equation_7"),
    Row("Improved DDPM: learned variance, hybrid loss", "S0 S1 S2 S3", "fastdiff.diffusion:Diffusion", "iddpm/bits.png",
        "test_losses.py::test_hybrid_loss_is_simple_plus_a_thousandth_of_the_bound"),
    Row("Guided diffusion: AdaGN, a classifier's gradient", "S0 S1 S3", "fastdiff.guidance:ClassifierGuidance",
        "guided/sweep.png", "test_guidance.py::test_an_exact_classifier_makes_the_exact_conditional_model"),
    Row("Palette: an image joined to the input", "S0", "fastdiff.models:UNet", "palette/inpainting.png",
        "test_conditional.py::test_image_to_image_by_a_condition_joined_to_the_input"),
    Row("DDIM", "S1 S3", "fastdiff.solvers:ddim", "ddim/steps.png",
        "test_solvers.py::test_step_by_step_parity_with_the_scalar_form"),
    Row("Classifier-free guidance", "S2 S3", "fastdiff.guidance:ClassifierFree", "cfg/sweep.png",
        "test_guidance.py::test_samples_of_an_affine_model_are_affine_in_the_scale"),
    Row("Variational diffusion: a learned, monotone schedule", "S2 S3", "fastdiff.learned_schedule:LearnedSchedule",
        "vdm/schedule.png", "test_learned_schedule.py::test_training_takes_the_variance_to_its_least"),
    Row("Predicting x0 with the weight of SNR differences", "S2", "fastdiff.losses:Tables", "x0-snr/parabola.png",
        "test_losses.py::test_snr_sample_loss_is_the_bound_in_x0_space"),
    Row("A class-conditional U-Net for letters", "S2", "fastdiff.models:UNet", "emnist-letters/samples.png",
        "test_reproduce.py::test_emnist_files"),
    Row("Sinusoidal time embedding", "S2", "fastdiff.models.layers:timestep_embedding", "ddpm/samples.png",
        "test_models.py::test_timestep_embedding_is_the_formula"),
    Row("x0, noise and score are one thing", "S2", "fastdiff.diffusion:Diffusion", "x0-snr/parabola-exact.png",
        "test_diffusion.py::test_conversions_are_the_definitions_and_invert"),
    Row("Exploring the latent space", "S0", "fastdiff.noise:slerp", "ddim/interpolation.png",
        "test_conditional.py::test_the_way_between_two_noises"),
)  # fmt: skip
ALGORITHMS = (
    Row("q(x_t | x_0) in closed form, and step by step", "S0 S1 S2 S3", "fastdiff.diffusion:Diffusion",
        "ddpm/forward.png", "test_diffusion.py::test_one_step_after_another_is_the_marginal"),
    Row("The posterior, and its variance between β̃ and β", "S0 S2", "fastdiff.diffusion:Diffusion", "iddpm/bits.png",
        "test_diffusion.py::test_bayes_rule_holds_pointwise"),
    Row("The bound, term by term", "S0 S1", "fastdiff.likelihood:variational_bound", "steps/bound.png",
        "test_likelihood.py::test_every_term_has_the_closed_form_mean"),
    Row("The simple loss; algorithms 1 and 2", "S1 S3", "fastdiff.diffusion:Diffusion", "ddpm/denoising.gif",
        "test_losses.py::test_simple_loss"),
    Row("Hybrid loss; log Σ between log β and log β̃", "S0", "fastdiff.losses:bound", "iddpm/bits.png",
        "test_likelihood.py::test_the_ends_of_the_learned_range_are_the_fixed_variances"),
    Row("Sub-sequences of the timesteps", "S2 S3", "fastdiff.schedule:Schedule", "x0-snr/moons-circles.png",
        "test_schedule.py::test_every_number_of_steps"),
    Row("How timesteps are drawn in training", "S0 S2", "fastdiff.training.timesteps:SAMPLERS", "iddpm/bits.png",
        "test_timesteps.py::test_second_moment_probabilities"),
    Row("The discretised decoder", "S0", "fastdiff.likelihood:variational_bound", "iddpm/bits.png",
        "test_likelihood.py::test_byte_probabilities_are_the_mass_of_the_bins"),
    Row("Guided ancestral sampling, μ + s Σ ∇ log p(y | x_t)", "S3", "fastdiff.guidance:ClassifierGuidance",
        "guided/samples-8.png", "test_guidance.py::test_ddpm_moves_its_mean"),
    Row("Guidance with a variance between β̃ and β (exponent v)", "S3", "fastdiff.solvers:ddpm", "cfg/sweep.png",
        "test_guidance.py::test_variances_between_the_posterior_s_and_the_forward_one"),
    Row("The last 250 of 1,000 steps", "S3", "fastdiff.sampler:Sampler", "steps/along-x.png",
        "test_reproduce.py::test_what_a_part_of_the_chain_gains"),
)  # fmt: skip
SCHEDULES = (
    Row("Linear betas", "S2 S3", "fastdiff.schedule:Schedule", "schedules/linear.png",
        "test_schedule.py::test_alpha_bar_is_the_product_of_one_minus_the_formula_betas"),
    Row("Cosine", "S2 S3", "fastdiff.schedule:Schedule", "schedules/cosine.png",
        "test_schedule.py::test_cosine_is_equation_17"),
    Row("Sigmoid betas", "S3", "fastdiff.schedule:Schedule", "schedules/sigmoid.png",
        "test_schedule.py::test_alpha_bar_has_all_digits_of_60_digit_arithmetic"),
    Row("Learned", "S0 S2", "fastdiff.learned_schedule:LearnedSchedule", "vdm/schedule.png",
        "test_learned_schedule.py::test_gamma_rises_whatever_the_weights"),
    Row("T = 500, 1,000, 2,000", "S3", "fastdiff.schedule:Schedule", "steps/along-x0.png",
        "test_reproduce.py::test_the_way_along_the_chain_ends_in_its_samples"),
)  # fmt: skip
METRICS = (
    Row("Fréchet distance", "S0 S3", "fastdiff.metrics:frechet_distance", "disturbances/fid.png",
        "test_frechet.py::test_commuting_covariances"),
    Row("Inception Score", "S3", "fastdiff.metrics:inception_score", "schedules/curves.png",
        "test_inception_score.py::test_the_score_is_its_definition"),
    Row("Precision and recall", "S0", "fastdiff.metrics:prdc", "guided/sweep.png",
        "test_metrics_neighbours.py::test_the_four_are_their_definitions"),
    Row("Bits per dimension", "S3", "fastdiff.likelihood:variational_bound", "iddpm/bits.png",
        "test_likelihood.py::test_the_bound_approaches_the_truth_from_above_as_steps_grow"),
    Row("Images of one channel: features of the data's own classifier", "S3", "fastdiff.training.run:ClassifierRun",
        "guided/sweep.png", "test_classifier.py::test_a_run_is_an_extractor"),
)  # fmt: skip
FIGURES = (
    Row("Swiss roll, forward and reverse", "S0", "fastdiff.figures:point_trajectories",
        "sohl-dickstein/trajectories.png", "test_figures.py::test_trajectories_go_from_data_to_noise_and_back"),
    Row("One image on its way to noise and back", "S0 S1 S2", "fastdiff.figures:noising_strip",
        "emnist-letters/corruption.png", "test_figures.py::test_a_strip_is_one_path_of_the_forward_process"),
    Row("2-D data, real and generated", "S2", "fastdiff.reproduce.plots:scatters", "x0-snr/moons-circles.png",
        "test_figures.py::test_scatters_share_the_first_s_axes"),
    Row("Animations of denoising, for several w", "S2 S3", "fastdiff.figures:animation", "cfg/denoising-2.gif",
        "test_figures.py::test_an_animation_is_its_frames"),
    Row("Image to image, triplets", "S0", "fastdiff.figures:labelled_grid", "palette/uncropping.png",
        "test_figures.py::test_a_grid_has_a_row_for_each_name"),
    Row("FID and IS along the chain and by schedule", "S3", "fastdiff.reproduce.plots:curves", "steps/along-x.png",
        "test_reproduce.py::test_the_way_along_the_chain_ends_in_its_samples"),
    Row("Terms of the bound by timestep", "S3", "fastdiff.reproduce.plots:curves", "steps/bound.png",
        "test_likelihood.py::test_the_curve_is_the_mean_of_each_timestep_s_term"),
    Row("Six disturbances", "S3", "fastdiff.reproduce.recipes.disturbances:DISTURBANCES", "disturbances/fid.png",
        "test_disturbances.py::test_distances_rise_with_every_disturbance"),
    Row("Evolution of the score", "S3", "fastdiff.reproduce.plots:bars", "evolution/bars.png",
        "test_figures.py::test_bars_are_means_with_their_intervals"),
    Row("Strips of schedules", "S3", "fastdiff.figures:noising_strip", "schedules/linear.png",
        "test_figures.py::test_a_strip_is_one_path_of_the_forward_process"),
)  # fmt: skip
ROWS = {
    "Systems": SYSTEMS,
    "Algorithms": ALGORITHMS,
    "Schedules": SCHEDULES,
    "Metrics": METRICS,
    "Figures": FIGURES,
}


def page() -> str:
    """The page, in Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# The sources, and where each thing of theirs is"
    yield ""
    yield "Written by `python -m fastdiff.reproduce.sources`. A figure is made by `fastdiff reproduce RECIPE`."
    yield ""
    yield from (f"- **{name}**: {what}" for name, what in TUTORIALS.items())
    for title, rows in ROWS.items():
        yield from ("", f"## {title}", "", "| what | in | code | recipe and figure | test |", "|---|---|---|---|---|")
        yield from map(_line, rows)


def _line(row: Row) -> str:
    recipe, _, file = row.shown.partition("/")
    shown = f"[{recipe}](recipes/{recipe.replace('-', '_')}.py), {file}"
    test, _, name = row.test.partition("::")
    module, _, attribute = row.code.partition(":")
    return f"| {row.what} | {row.where} | `{module}.{attribute}` | {shown} | [{name}](../../tests/{test}) |"


if __name__ == "__main__":
    _io.replace(PAGE, page().encode())
